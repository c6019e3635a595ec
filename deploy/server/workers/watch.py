"""Finds workers that live and do nothing: their event loop shows every 0.1 s that it runs."""

from __future__ import annotations

from collections.abc import Iterable

from .board import Board
from .child import Child

__all__ = ["LOOK_S", "LOOKS", "Watch"]

LOOK_S = 1.0
"""How often the supervisor looks. A machine that was suspended counts as one look."""

LOOKS = 20
"""A worker that has not moved for so many looks hangs."""


class Watch:
    """What was seen of each worker."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._seen: dict[int, tuple[int, int]] = {}

    def look(self, children: Iterable[Child]) -> list[Child]:
        """Those that hang, of workers that are ready and not retired.

        Args:
            children: Such workers.
        """
        seen: dict[int, tuple[int, int]] = {}
        hanging = []
        for child in children:
            beats = self._board.beats(child.slot)
            before, looks = self._seen.get(child.pid, (-1, 0))
            seen[child.pid] = (beats, looks + 1 if beats == before else 0)
            if seen[child.pid][1] >= LOOKS:
                hanging.append(child)
        self._seen = seen
        return hanging
