"""Memory that all workers share: how many connections each has, that it lives, and its metrics of its last second.

A slot has one writer. Texts are written alternately to two places, each with a checksum and a number, so that a reader,
or whoever looks after the writer was killed, finds the last one that is complete. What the workers that have ended had
counted is in the slot of the supervisor; while it moves numbers there, readers wait, so that no sum falls.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator

__all__ = ["SUPERVISOR", "Board"]

SLOT_BYTES = 1 << 20
"""Of address space: pages that nobody writes to take no memory."""

SUPERVISOR = 0
"""The supervisor's slot; its first number is odd while it moves what an ended worker had counted."""

_HEAD_BYTES = 64
_RECEIVED, _OPEN, _BEATS = 0, 1, 2
_PLACE_BYTES = (SLOT_BYTES - _HEAD_BYTES) // 2
_PLACE = struct.Struct("<QII")  # The text's number, length and checksum.
_WAIT_S = 0.1


class Board:
    """The memory; each process has its own mapping."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, os.fstat(fd).st_size)
        self._numbers = memoryview(self._memory).cast("Q")
        self.slots = len(self._memory) // SLOT_BYTES

    @classmethod
    def make(cls, workers: int) -> Board:
        """New memory, with a slot for the supervisor and one for each worker."""
        fd = os.memfd_create("deploy-workers", os.MFD_CLOEXEC)
        os.ftruncate(fd, (1 + workers) * SLOT_BYTES)
        return cls(fd)

    def _number(self, slot: int, index: int) -> int:
        return self._numbers[slot * SLOT_BYTES // 8 + index]

    def _set(self, slot: int, index: int, value: int) -> None:
        self._numbers[slot * SLOT_BYTES // 8 + index] = value

    def received(self, slot: int) -> int:
        """How many connections a worker has received."""
        return self._number(slot, _RECEIVED)

    def open(self, slot: int) -> int:
        """How many connections a worker has."""
        return self._number(slot, _OPEN)

    def count(self, slot: int, received: int, open_: int) -> None:
        """Writes both numbers."""
        self._set(slot, _OPEN, open_)
        self._set(slot, _RECEIVED, received)

    def beat(self, slot: int) -> None:
        """Shows that a worker's event loop runs."""
        self._set(slot, _BEATS, self._number(slot, _BEATS) + 1)

    def beats(self, slot: int) -> int:
        """How often it has shown that."""
        return self._number(slot, _BEATS)

    def publish(self, slot: int, text: bytes) -> None:
        """Writes metrics; a text that does not fit is dropped."""
        if len(text) > _PLACE_BYTES - _PLACE.size:
            return
        number = 1 + max((found for found, _ in self._texts(slot)), default=0)
        start = slot * SLOT_BYTES + _HEAD_BYTES + number % 2 * _PLACE_BYTES
        body = start + _PLACE.size
        self._memory[body : body + len(text)] = text
        self._memory[start:body] = _PLACE.pack(number, len(text), zlib.crc32(text))

    def _texts(self, slot: int) -> Iterator[tuple[int, bytes]]:
        """The complete texts of a slot with their numbers."""
        for place in range(2):
            start = slot * SLOT_BYTES + _HEAD_BYTES + place * _PLACE_BYTES
            body = start + _PLACE.size
            number, size, checksum = _PLACE.unpack(self._memory[start:body])
            text = self._memory[body : body + min(size, _PLACE_BYTES)]
            if number and zlib.crc32(text) == checksum:
                yield number, text

    def text(self, slot: int) -> bytes:
        """The last metrics of a slot; empty if there are none."""
        return max(self._texts(slot), default=(0, b""))[1]

    def texts(self, without: int = -1) -> list[bytes]:
        """The metrics of all slots but one, the supervisor's first.

        Args:
            without: A slot that is left out.
        """
        deadline_s = time.monotonic() + _WAIT_S
        while True:
            before = self._number(SUPERVISOR, 0)
            found = [self.text(slot) for slot in range(self.slots) if slot != without]
            if (before % 2 == 0 and self._number(SUPERVISOR, 0) == before) or time.monotonic() > deadline_s:
                return found
            time.sleep(0.0002)

    def retire(self, slot: int, text: bytes) -> None:
        """Clears the slot of a worker that has ended; by the supervisor, whose text then has what the worker counted.

        Args:
            slot: The slot.
            text: The new text of the supervisor.
        """
        turn = self._number(SUPERVISOR, 0)
        self._set(SUPERVISOR, 0, turn + 1)
        self.publish(SUPERVISOR, text)
        self.clear(slot)
        self._set(SUPERVISOR, 0, turn + 2)

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self.count(slot, 0, 0)
        for place in range(2):
            start = slot * SLOT_BYTES + _HEAD_BYTES + place * _PLACE_BYTES
            self._memory[start : start + _PLACE.size] = bytes(_PLACE.size)
