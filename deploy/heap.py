"""The heap of the C library: what it keeps of memory that was freed. Only glibc has these functions."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["M_MMAP_THRESHOLD", "M_TRIM_THRESHOLD", "give_back", "set_thresholds"]

M_TRIM_THRESHOLD = -1
"""Of malloc.h: how much may be free at the end of an arena."""

M_MMAP_THRESHOLD = -3
"""Of malloc.h: from which size a block is mapped, and returned as soon as it is freed."""


@functools.cache
def _function(name: str, *arguments: str) -> Callable[..., int] | None:
    """A function of glibc's allocator; None: the C library is another one."""
    import ctypes  # Takes 4 to 6 ms.

    try:
        function: Any = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    function.argtypes = [getattr(ctypes, kind) for kind in arguments]
    found: Callable[..., int] = function
    return found


def set_thresholds(sizes_bytes: Mapping[int, int]) -> None:
    """Sets thresholds, by their numbers in malloc.h; they do not grow from then on."""
    if (mallopt := _function("mallopt", "c_int", "c_int")) is not None:
        for threshold, size_bytes in sizes_bytes.items():
            mallopt(threshold, size_bytes)


def give_back() -> None:
    """Returns memory that was freed to the system: Python and glibc keep it. Takes milliseconds."""
    gc.collect()  # What objects that have ended refer to each other by.
    if (trim := _function("malloc_trim", "c_size_t")) is not None:
        trim(0)
