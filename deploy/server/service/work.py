"""The texts of one request on their way through the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ...tasks import Ids

__all__ = ["Item", "Work"]


class Work:
    """The texts of one request on their way through the engine.

    Attributes:
        ids: Per text its token ids.
        options: What the engine's head needs to know; the same for all texts of the request.
        results: Per text what the engine made of it.
        line: Which line it stands in; see `admission`.
        turn_cost: How much of it runs before the next one of its line.
        tokens: Tokens of all texts.
        places: Per text its index in the request, if others of it are not computed here.
        future: Done when every text has its result.
        deadline_s: When nobody wants the answer any more, by `time.perf_counter`; None: always.
        costs: Per text what it takes of a token budget; set when the work is queued.
        waiting: What the texts without a result take of a token budget.
        abandoned: Nobody waits any more; what did not run yet is dropped.
        submitted_s: When it was queued, by `time.perf_counter`.
        started_s: When its first batch started.
        infer_s: How long the batches took that held a text of it.
    """

    __slots__ = (
        "abandoned",
        "costs",
        "deadline_s",
        "future",
        "ids",
        "infer_s",
        "left",
        "line",
        "next",
        "options",
        "places",
        "results",
        "started_s",
        "submitted_s",
        "tokens",
        "turn_cost",
        "waiting",
    )

    def __init__(
        self,
        ids: Sequence[Ids],
        options: Any,
        future: asyncio.Future[list[Any]],
        deadline_s: float | None = None,
    ) -> None:
        self.ids = ids
        self.options = options
        self.places: Sequence[int] = range(len(ids))
        self.future = future
        self.deadline_s = deadline_s
        self.costs: list[int] = []
        self.results: list[Any] = [None] * len(ids)
        self.tokens = sum(map(len, ids))
        self.waiting = 0
        self.left = len(ids)
        self.next = 0
        self.abandoned = False
        self.line = 0
        self.turn_cost = 0
        self.submitted_s = 0.0
        self.started_s = 0.0
        self.infer_s = 0.0


Item = tuple[Work, int]
"""One text of a batch: its request and its index there."""
