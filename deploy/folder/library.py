"""The tokenizer of a folder as the library tokenizers has it, which raises plain exceptions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploy.bundle import TOKENIZER_FILE
from deploy.folder.errors import FolderError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["read_by_library"]


def read_by_library(text: str, folder: Path) -> Tokenizer:
    """The tokenizer that a text describes.

    Args:
        text: Content of `tokenizer.json`.
        folder: The model's, for the error.

    Raises:
        FolderError: The library cannot read it.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        raise FolderError(f"{folder / TOKENIZER_FILE}: not a usable tokenizer: {first_line(error)}") from error
