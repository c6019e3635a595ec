"""How much API keys have used, in memory that workers share. Standard library only.

Each key is counted in a place that follows from its hash: a client whose connections are with several workers has one
budget, and a file of keys that is read again leaves it as it is.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time

__all__ = ["Meters"]

PLACES = 16_384
"""Most keys that are counted together, those of files before included, until the server ends."""

_PLACE = struct.Struct("<8sdd")
_MINUTE_S = 60.0


class Meters:
    """How far each budget is used: for each, the time when it will be full again."""

    def __init__(self, fd: int | None = None) -> None:
        """Nothing is used yet.

        Args:
            fd: Memory of `make`, which several processes share; None: memory of this process.
        """
        self._fd = fd
        self._memory = mmap.mmap(-1 if fd is None else fd, PLACES * _PLACE.size)

    @staticmethod
    def make() -> int:
        """Memory for several processes."""
        fd = os.memfd_create("deploy-keys", os.MFD_CLOEXEC)
        os.ftruncate(fd, PLACES * _PLACE.size)
        return fd

    def place(self, digest: bytes) -> int:
        """Where a key is counted, as an offset.

        Raises:
            OverflowError: There have been too many keys.
        """
        name = digest[:8]
        first = int.from_bytes(name, "little") % PLACES
        self._lock(0, 0)
        try:
            for step in range(PLACES):
                offset = (first + step) % PLACES * _PLACE.size
                found = bytes(self._memory[offset : offset + 8])
                if found == bytes(8):
                    self._memory[offset : offset + 8] = name
                    found = name
                if found == name:
                    return offset
        finally:
            self._unlock(0, 0)
        raise OverflowError(f"expected at most {PLACES} API keys, got more; start the server again to forget old ones")

    def _lock(self, offset: int, size: int) -> None:
        if self._fd is not None:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, size, offset)

    def _unlock(self, offset: int, size: int) -> None:
        if self._fd is not None:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, size, offset)

    def take(self, offset: int, which: int, amount: float, per_minute: int) -> float:
        """Takes from a budget, if there is enough.

        What is more than a minute's budget is taken from a full one, and the debt is paid before there is more.

        Args:
            offset: Of the key.
            which: 0 for requests, 1 for tokens.
            amount: How much; negative: gives it back.
            per_minute: The budget.

        Returns:
            0.0, or after how many seconds there will be enough; then nothing was taken.
        """
        at = offset + 8 + 8 * which
        self._lock(at, 8)
        try:
            full_s: float = struct.unpack_from("<d", self._memory, at)[0]
            now_s = time.monotonic()
            each_s = _MINUTE_S / per_minute
            wait_s = max(full_s - now_s, 0.0) - (per_minute - min(amount, per_minute)) * each_s
            if amount > 0 and wait_s > 0.0:
                return wait_s
            struct.pack_into("<d", self._memory, at, max(full_s, now_s) + amount * each_s)
            return 0.0
        finally:
            self._unlock(at, 8)
