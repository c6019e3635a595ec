"""What the engine thread runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ...tasks import Ids

__all__ = ["Engine"]


class Engine(Protocol):
    """Runs batches, on the engine thread."""

    def cost(self, ids: Ids) -> int:
        """What a text takes of a token budget: its tokens, or more. Called on the event loop.

        Args:
            ids: Its token ids.
        """
        ...

    def run(self, ids: Sequence[Ids], options: Sequence[Any]) -> Sequence[Any]:
        """Runs a batch.

        Args:
            ids: Per text its token ids.
            options: Per text the options of its request.

        Returns:
            Per text its result, or an exception: then the request of that text fails, and no other.
        """
        ...

    def rest(self) -> None:
        """Frees what it keeps for the next batch. Called once after some seconds without one."""
        ...
