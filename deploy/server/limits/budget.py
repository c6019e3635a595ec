"""Memory that all requests and connections hold together, so that many at once are refused instead of killed.

What a request holds is estimated before it is there, from above: `BODY_FACTOR` times its body (the bytes, and texts of
up to four bytes a character), its token ids, the numbers of its answer. What connections hold is counted every second.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ...heap import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, set_thresholds
from ..errors import ApiError
from .bounds import BOUNDS, exceeded
from .callers import Caller

__all__ = [
    "BODY_FACTOR",
    "CONNECTION_BYTES",
    "SMALL_BODY_BYTES",
    "TEXT_BYTES",
    "MemoryBudget",
    "settle_malloc",
]

BODY_FACTOR = 5
"""Bytes that a byte of a body may hold: itself, and up to 4 when decoded, where a character of the text needs them."""

TEXT_BYTES = 256
"""Bytes that the ids and the result of a text hold besides their numbers."""

SMALL_BYTES = 8 << 10
"""Requests that hold less are not counted one by one: there is at most one of them for each connection."""

CONNECTION_BYTES = 16 << 10
"""Bytes that an open connection holds, a small request included."""

SMALL_BODY_BYTES = SMALL_BYTES // BODY_FACTOR
"""Such a request may have this body."""

LARGE_BYTES = 256 << 10
"""Requests that held this much leave memory behind that the allocator keeps; smaller ones use it again."""

CONNECTIONS_BYTES = 1 << 20
"""Connections that held this much, 64 or one that left an answer unread, leave memory behind as large requests do."""

TRIM_BYTES = 128 << 20
"""How much large requests may leave behind while others are at work."""

QUIET_CHECKS = 10
"""So many checks after memory was returned it is returned once more, if nothing large came since."""

LEAST_BYTES = 64 << 20
"""Where hardly any memory is left, the server still serves."""

MALLOC_KEEPS_BYTES = 256 << 10
"""glibc returns freed blocks of this size at once, and keeps less than this free at the end of an arena."""

_UNKNOWN_BYTES = 1 << 62

_MALLOC_SETTINGS = {"MALLOC_TRIM_THRESHOLD_": M_TRIM_THRESHOLD, "MALLOC_MMAP_THRESHOLD_": M_MMAP_THRESHOLD}
"""Variables of glibc, and the same for `set_thresholds`."""


class MemoryBudget:
    """Counts what is held. Methods are called on the event loop.

    Attributes:
        limit_bytes: Most that may be held.
        request_bytes: What requests hold.
        connection_bytes: What connections hold.
    """

    __slots__ = (
        "_left_bytes",
        "_most_connection_bytes",
        "_quiet_checks",
        "_retry_after",
        "connection_bytes",
        "limit_bytes",
        "request_bytes",
    )

    def __init__(self, limit_bytes: int, retry_after: Callable[[], str]) -> None:
        """An empty budget.

        Args:
            limit_bytes: Most that may be held.
            retry_after: Says in how many seconds there may be room again.
        """
        self.limit_bytes = limit_bytes
        self._retry_after = retry_after
        self.request_bytes = 0
        self.connection_bytes = 0
        self._most_connection_bytes = 0
        self._left_bytes = 0
        self._quiet_checks = 0

    @classmethod
    def of(cls, max_memory_mb: int | None, retry_after: Callable[[], str]) -> MemoryBudget:
        """A budget of so many MB; None: not known before `settle`."""
        return cls(_UNKNOWN_BYTES if max_memory_mb is None else max_memory_mb << 20, retry_after)

    def settle(self, available_bytes: int | None) -> None:
        """Sets the limit to half of what is available, where no option has set it.

        Args:
            available_bytes: Memory that can be had once the model is loaded; None where it is not known.
        """
        if self.limit_bytes == _UNKNOWN_BYTES and available_bytes is not None:
            self.limit_bytes = max(available_bytes // 2, LEAST_BYTES)

    @property
    def limit_mb(self) -> int:
        """The limit in MB."""
        return self.limit_bytes >> 20

    @property
    def held_bytes(self) -> int:
        """What is held in all."""
        return self.request_bytes + self.connection_bytes

    def hold(self, caller: Caller, size_bytes: int) -> None:
        """Holds memory for a request until `release`.

        Raises:
            ApiError: Others hold too much (429), or there will never be as much (413).
        """
        if size_bytes < SMALL_BYTES and self.connection_bytes < self.limit_bytes:
            return  # Counted with its connection.
        if self.request_bytes + self.connection_bytes + size_bytes > self.limit_bytes:
            raise self._refusal(caller.held_bytes + size_bytes)
        self.request_bytes += size_bytes
        caller.held_bytes += size_bytes

    def hold_body(self, caller: Caller, size_bytes: int) -> None:
        """Holds memory for a part of a request's body, and what it is decoded to; see `hold`."""
        self.hold(caller, BODY_FACTOR * size_bytes)

    def release(self, caller: Caller) -> None:
        """Ends what a request holds; it is answered, or nobody waits any more."""
        size_bytes, caller.held_bytes = caller.held_bytes, 0
        self.request_bytes -= size_bytes
        if size_bytes >= LARGE_BYTES:
            self._left_bytes += size_bytes

    def hold_connections(self, size_bytes: int) -> None:
        """Says what connections hold now. Many that have ended leave memory behind, as large requests do."""
        self.connection_bytes = size_bytes
        ended_bytes = self._most_connection_bytes - size_bytes
        if ended_bytes >= CONNECTIONS_BYTES:
            self._left_bytes += ended_bytes
        if ended_bytes < 0 or ended_bytes >= CONNECTIONS_BYTES:
            self._most_connection_bytes = size_bytes

    def _refusal(self, asked_bytes: int) -> ApiError:
        limit_mb, asked_mb = self.limit_mb, -(-asked_bytes >> 20)
        if asked_bytes > self.limit_bytes:
            return ApiError("too_large", exceeded("memory", limit_mb, asked_mb))
        return ApiError(
            "memory_full",
            f"requests and connections hold {self.held_bytes >> 20} MB of at most {limit_mb}, and this one may need "
            f"{asked_mb}; {BOUNDS['memory'].option} sets this limit; try again later",
            {"Retry-After": self._retry_after()},
        )

    def trim_due(self) -> bool:
        """Whether enough was left behind to return it to the system; the caller does. Called every second."""
        if self._left_bytes < TRIM_BYTES and (not self._left_bytes or self.request_bytes):
            # What others held among what was left is free by now, too.
            if not self._quiet_checks or self.request_bytes:
                return False
            self._quiet_checks -= 1
            return not self._quiet_checks
        self._left_bytes = 0
        self._quiet_checks = QUIET_CHECKS
        return True


def settle_malloc() -> None:
    """Lets glibc return memory when it is freed, on whatever thread.

    Its thresholds grow with each large block that is freed, to 32 MB for a block that is returned at once and 64 MB
    at the end of an arena. Each thread that allocates has an arena, and `malloc_trim` looks at the end of the main one
    alone: after a burst of large requests every helper thread kept several MB. Thresholds that are set stay. The number
    of arenas is left as it is, so threads do not wait for each other.

    Whoever has set glibc's own variables keeps them.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(map(os.environ.get, _MALLOC_SETTINGS)):
        return
    set_thresholds(dict.fromkeys(_MALLOC_SETTINGS.values(), MALLOC_KEEPS_BYTES))
