"""What to call where a folder is given for an encoder's file, or a bundle for a folder of Hugging Face."""

from __future__ import annotations

from pathlib import Path

__all__ = ["encoder_files", "folder_advice"]


def encoder_files(folder: Path) -> list[str]:
    """Names of the files of encoders that ``python -m deploy export`` has written into a folder."""
    return sorted(path.name for path in folder.glob("encoder_*.safetensors"))


def folder_advice(folder: Path) -> str:
    """What to call, where the file of an encoder is expected and a folder was given."""
    found = f"expected the file of an encoder, got the folder {folder}"
    if files := encoder_files(folder):
        return f"{found}: name one of its files, {', '.join(files)}"
    if (folder / "config.json").is_file():
        return f"{found}: a folder of Hugging Face is read by Encoder.from_pretrained"
    return f"{found}: name a file that torch_ext.Encoder.save or python -m deploy export wrote"
