"""What can be wrong with a model's folder, said in one line."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from torch_ext.encoder.huggingface.safetensors import LFS_ADVICE, is_lfs_pointer

__all__ = ["FolderError", "at_least_one", "chain", "count_or_none", "first_line", "is_disk_full", "refuse_pointer"]


class FolderError(Exception):
    """A model cannot be used as it is; the message says what was expected, what was found, and what to do."""


def at_least_one(value: object, where: str) -> int:
    """A count that a file of the folder holds.

    Args:
        value: What the file holds.
        where: The file and the name of the value, for the error.

    Raises:
        FolderError: It is no whole number, or below 1.
    """
    count = count_or_none(value)
    if count is None:
        raise FolderError(f"{where}: expected at least 1, got {value!r:.80}")
    return count


def refuse_pointer(data: bytes, where: str) -> None:
    """Refuses the content of a file that git left where Git LFS has the file itself.

    Args:
        data: The content, or how it begins.
        where: The file, for the error.

    Raises:
        FolderError: It is a pointer.
    """
    if is_lfs_pointer(data):
        raise FolderError(f"{where}: {LFS_ADVICE}")


def count_or_none(value: object) -> int | None:
    """A value that is a whole number of at least 1; None for any other."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and everything that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, or what it was raised from, says that a disk or a quota is full.

    Libraries in C++ and Rust report it as text.
    """
    for item in chain(error):
        if isinstance(item, OSError) and item.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        if re.search(r"no space left on device|disk quota exceeded|os error (28|122)\b", str(item), re.IGNORECASE):
            return True
    return False


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line that says something of an exception's message, at most `limit` characters.

    One that ends in a colon says what the next one does.
    """
    lines = [line for line in (line.strip() for line in str(error).splitlines()) if line]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
