"""What can be wrong with a model's folder, said in one line."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

__all__ = ["FolderError", "chain", "first_line", "is_disk_full"]


class FolderError(Exception):
    """A model cannot be used as it is; the message says what was expected, what was found, and what to do."""


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
    """The first line that says something of an exception's message, at most `limit` characters."""
    lines = (line.strip() for line in str(error).splitlines())
    text = next((line for line in lines if line), "") or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
