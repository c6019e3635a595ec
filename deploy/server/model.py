"""What is named on the command line: a bundle, or a model that was not exported, described from its own files."""

from __future__ import annotations

from pathlib import Path

from ..bundle import CONFIG_FILE, MANIFEST_FILE, Manifest, load_manifest
from .process import UsageError

__all__ = ["describe"]


def describe(model: str, task: str | None) -> tuple[Manifest, bool]:
    """The manifest of what shall be served, and whether it is a bundle, whose files are not looked at yet.

    Args:
        model: A folder, or an id on the hub.
        task: What the model is for, where its files do not say.

    Raises:
        BundleError: It is a bundle, and damaged.
        UsageError: It is neither a bundle nor a model that can be served as it is.
    """
    folder = Path(model)
    if (folder / MANIFEST_FILE).exists() or (folder.is_dir() and not _is_model(folder)):
        if task is not None:
            raise UsageError(
                f"--task {task}: only for a model that was not exported; {model} is a bundle, which says it"
            )
        return load_manifest(folder, verify=False, variants=()), True
    from ..folder.describe import describe_folder
    from ..folder.errors import FolderError

    try:
        return describe_folder(model, task), False
    except FolderError as error:
        raise UsageError(str(error)) from error


def _is_model(folder: Path) -> bool:
    """Whether a folder looks like a model's of Hugging Face or sentence-transformers."""
    return (folder / CONFIG_FILE).exists() or (folder / "modules.json").exists()
