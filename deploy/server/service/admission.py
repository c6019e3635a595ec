"""Who may wait: how fast the engine is, how long a request would wait, and whether that is too long.

A queue that takes everything answers everybody too late once more comes than the engine can do. So a request that would
not be answered within `max_queue_s` is refused at once, and told when to come again. One that is larger than a batch
may take longer: `PATIENCE` times as long as it computes.

Requests stand in four lines, by their size: tiny ones, of which four fit in what runs at a time (`batch_cost`, at most
`max_batch_s`), or that are one text of usual length; small ones, of which four fit in the largest batch
(`max_batch_cost`), those that fit in it, and larger ones. The lines take turns: the first line may have half of what
runs, the next one half of the rest, and so on, as long as something waits there. So a tiny request waits for the batch
that runs and for other tiny ones, whatever else there is; and while tiny requests come, batches of larger ones are
short. In a line it is first come, first served, since requests that share the engine would all be late where more comes
than can be done; of larger ones, `max_batch_cost` runs before it is the next one's turn. How long a request waits
follows from what is before it in its line, and from how much of its line has run lately in a second.

All sizes are costs, in the unit of the token budget (`Engine.cost`). What waits is known on the event loop alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

from ..errors import ApiError
from ..limits.bounds import exceeded
from .work import Work

__all__ = ["PATIENCE", "LINES", "RESERVED_PART", "SHARED_PART", "SMALL_PART", "TEXT_COST", "Admission", "Speed"]

PATIENCE = (2, 5)
"""A request may take so many times as long as it computes, where that is more than `max_queue_s`: one that fits in a
batch (a machine is very slow then), and a larger one."""

SMALL_PART = 4
"""A request is tiny, or small, if that many like it fit in what runs at a time, or in the largest batch."""

SHARED_PART = 8
"""While tiny requests come too, a batch of larger ones takes that part of the longest time. It costs those a fifth of
their speed at most (int8 of MiniLM on 2 cores of Zen 5, 512 tokens in place of 2,048; bf16 6 %, BERT-base 10 %)."""

LINES = 4
"""Tiny requests, small ones, those that fit in a batch, larger ones."""

TEXT_COST = 512
"""One text of at most that is tiny, however slow the machine is: what most models take at a time. Clients of one text
each would otherwise be told apart by its length, and the longer ones refused beside a queue that is nearly empty."""

RESERVED_PART = 8
"""This part of the queue is for tiny and small requests, while anything waits."""

_ENGINE_MEMORY_S = 1.0
_LINE_MEMORY_S = 6.0
_MOST_SLOWER = 4
_LEAST_BATCH = 64


class _Rate:
    """What runs in a second; 0.0: nothing is known yet."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self.per_s = 0.0
        self._cost = 0.0
        self._seconds = 0.0

    def note(self, cost: int, seconds: float) -> None:
        kept = math.exp(-seconds / self._memory_s)
        self._cost = kept * self._cost + cost
        self._seconds = kept * self._seconds + seconds
        self.per_s = self._cost / self._seconds


def _rates() -> tuple[_Rate, list[_Rate]]:
    return _Rate(_ENGINE_MEMORY_S), [_Rate(_LINE_MEMORY_S) for _ in range(LINES)]


class Speed:
    """What the engine computes in a second, in all and of each line. Written on the engine thread, read on both.

    Attributes:
        known: Whether a full batch has run; before that, it may compute far more in a second.
    """

    def __init__(self) -> None:
        self.known = False
        self._all, self._lines = _rates()

    @property
    def cost_per_s(self) -> float:
        """Of the token budget; 0.0: nothing has run yet."""
        return self._all.per_s

    def line_cost_per_s(self, line: int) -> float:
        """What is computed of a line while something waits there; 0.0: nothing has run yet."""
        return self._lines[line].per_s or self._all.per_s

    def note(self, costs: Sequence[int], waiting: Sequence[bool], seconds: float, full: bool = True) -> None:
        """Takes a batch into account.

        A small batch computes less in a second than a full one does: by what short texts took one by one, a burst of
        them would be refused. So once a full one has run, a small one counts only if it was faster.

        Args:
            costs: What it took of the token budget, by lines.
            waiting: Whether something waited when it was put together, by lines.
            seconds: How long it ran. One batch that took far longer than others (the machine slept) counts as one that
                was somewhat slower.
            full: Whether it took at least half of the token budget that it had, or as many texts as it may.
        """
        cost = sum(costs)
        seconds = max(seconds, 1e-9)
        if not full and self.known and cost <= self._all.per_s * seconds:
            return
        if self._all.per_s:
            seconds = min(seconds, _MOST_SLOWER * cost / self._all.per_s)
        first = full and not self.known
        every, lines = _rates() if first else (self._all, self._lines)
        every.note(cost, seconds)
        for line, part in enumerate(costs):
            if waiting[line]:
                lines[line].note(part, seconds)
        # The event loop reads them meanwhile: never rates of which nothing is known after some that were.
        self._lines = lines
        self._all = every
        self.known = self.known or full

    def batch_cost(self, most: int, seconds: float) -> int:
        """The token budget of a batch that takes about so long.

        Args:
            most: The largest budget, and the one of the first batch.
            seconds: How long it may take.
        """
        if not self.cost_per_s or math.isinf(seconds):
            return most
        return min(most, max(_LEAST_BATCH, int(self.cost_per_s * seconds)))


class Admission:
    """The requests that wait or run, and the rule by which more are taken.

    Attributes:
        line_costs: What the texts that wait or run take of the token budget, by lines.
        speed: Of the engine.
    """

    def __init__(self, max_batch_cost: int, max_queue_cost: int, max_queue_s: float, max_batch_s: float) -> None:
        """Nothing waits yet.

        Args:
            max_batch_cost: Token budget of a batch.
            max_queue_cost: Most that may wait or run.
            max_queue_s: How long a request may take from queue to answer, if it computes for a part of that only.
            max_batch_s: How long a batch may take.
        """
        self.max_batch_cost = max_batch_cost
        self.max_queue_cost = max_queue_cost
        self.max_queue_s = max_queue_s
        self.max_batch_s = max_batch_s
        self.line_costs = [0] * LINES
        self.speed = Speed()
        self._waiting: set[Work] = set()
        self._reserved: list[tuple[int, int]] = []

    @property
    def queued_cost(self) -> int:
        """What the texts that wait or run take of the token budget."""
        return sum(self.line_costs)

    @property
    def predicted_wait_s(self) -> float:
        """How long what waits or runs will take, by the measured speed; 0.0 while none is known."""
        return self._predicted_s(self.queued_cost)

    def _predicted_s(self, cost: int) -> float:
        per_s = self.speed.cost_per_s
        return cost / per_s if per_s else 0.0

    @property
    def batch_cost(self) -> int:
        """The token budget of the next batch."""
        return self.speed.batch_cost(self.max_batch_cost, self.max_batch_s)

    @property
    def shared_batch_cost(self) -> int:
        """The token budget of the next batch of larger requests, while tiny ones come that would wait for it."""
        return self.speed.batch_cost(self.max_batch_cost, self.max_batch_s / SHARED_PART)

    def line_of(self, cost: int, texts: int) -> int:
        """In which line a request stands that takes so much of the token budget, for so many texts."""
        if texts == 1 and cost <= min(TEXT_COST, self.max_batch_cost):
            return 0
        most = (self.batch_cost // SMALL_PART, self.max_batch_cost // SMALL_PART, self.max_batch_cost)
        return sum(cost > bound for bound in most)

    def admit(self, work: Work) -> None:
        """Takes a request whose `waiting` is known, or refuses it.

        Raises:
            ApiError: It would wait too long, or there is no room for it now (429), or there never is (413), or the
                client does not want to wait as long (504).
        """
        work.turn_cost = self.max_batch_cost
        work.line = self.line_of(work.waiting, len(work.ids))
        if self.queued_cost + work.waiting > self._most(work.line, self.queued_cost):
            if work.waiting > self.max_queue_cost:
                added = work.waiting - work.tokens
                more = f"; masks add {added} to {work.tokens} tokens" if added else ""
                raise ApiError(
                    "too_large",
                    f"{exceeded('tokens', self.max_queue_cost, work.waiting)}{more}; send fewer texts at a time",
                )
            raise self.try_later(f"{self.queued_cost} tokens are waiting and the queue holds {self.max_queue_cost}")
        if self.line_costs[work.line] and self.speed.known:
            left_s = math.inf if work.deadline_s is None else work.deadline_s - time.perf_counter()
            if (error := self._late(work.waiting, work.line, left_s)) is not None:
                raise error
        self.line_costs[work.line] += work.waiting
        self._waiting.add(work)

    def _most(self, line: int, before: int) -> int:
        """How much may wait or run for a request of a line to be taken, behind so much."""
        return self.max_queue_cost - (self.max_queue_cost // RESERVED_PART if line > 1 and before else 0)

    @property
    def _reserved_cost(self) -> int:
        return sum(cost for _, cost in self._reserved)

    def reserve(self, costs: tuple[int, int], texts: int) -> tuple[int, int]:
        """Keeps room for a request while it is tokenised.

        Args:
            costs: What it takes of the token budget, at least and at most.
            texts: How many texts it has.

        Returns:
            For `release`.

        Raises:
            ApiError: There is no room now, or it would wait too long (429).
        """
        least, _ = costs
        kept = self.line_of(least, texts), least
        before = self.queued_cost + self._reserved_cost
        if before and before + least > self._most(kept[0], before):
            raise self.try_later(
                f"{before} tokens are waiting or being tokenised, and the queue holds {self.max_queue_cost}"
            )
        if before and self.speed.known:
            late = [self._late(cost, self.line_of(cost, texts), with_reserved=True) for cost in costs]
            if late[0] is not None and late[1] is not None:
                raise late[0]
        self._reserved.append(kept)
        return kept

    def release(self, kept: tuple[int, int]) -> None:
        """Gives back what `reserve` has kept."""
        self._reserved.remove(kept)

    def _late(self, cost: int, line: int, left_s: float = math.inf, with_reserved: bool = False) -> ApiError | None:
        """The error of a request of a line that would wait too long; None: it would not.

        Args:
            cost: What it takes of the token budget.
            line: Where it stands.
            left_s: How long its client waits.
            with_reserved: Those that are being tokenised come before it, too.
        """
        reserved = [other for place, other in self._reserved if place == line] if with_reserved else []
        own_s = cost / self.speed.cost_per_s
        per_s = self.speed.line_cost_per_s(line)
        allowed_s = max(self.max_queue_s, PATIENCE[line == LINES - 1] * own_s)
        if not reserved and self.line_costs[line] <= per_s * (min(allowed_s, left_s) - own_s):
            return None  # Even behind all others.
        needed_s = own_s + (self._before(cost, line, reserved) / per_s if per_s else math.inf)
        if needed_s > allowed_s:
            return ApiError(
                "queue_full",
                f"expected an answer within {allowed_s:.1f} s, but with what is queued it takes {needed_s:.1f} s; "
                "--max-queue-ms sets this limit; try again later",
                {"Retry-After": _whole_seconds(needed_s - allowed_s)},
            )
        return too_late(f"it takes {needed_s:.1f} s with what is queued") if needed_s > left_s else None

    def _before(self, cost: int, line: int, reserved: Sequence[int]) -> int:
        """What runs of a line before the last text of a request there does."""
        if line < LINES - 1:
            return self.line_costs[line] + sum(reserved)
        # Of each other one, as many turns as it has itself.
        most = -(-cost // self.max_batch_cost) * self.max_batch_cost
        others = (work.waiting for work in self._waiting if work.line == line)
        return sum(min(other, most) for other in (*others, *reserved))

    def ran(self, work: Work, cost: int) -> None:
        """Some texts of a request have their results."""
        work.waiting -= cost
        self.line_costs[work.line] -= cost
        if not work.waiting:
            self._waiting.discard(work)

    def drop(self, work: Work) -> None:
        """What is left of a request will not run."""
        self.line_costs[work.line] -= work.waiting
        work.waiting = 0
        self._waiting.discard(work)

    def all(self) -> Iterable[Work]:
        """The requests that wait or run."""
        return tuple(self._waiting)

    def try_later(self, reason: str) -> ApiError:
        """The error of a request that there is no room for now, with a Retry-After from the measured speed."""
        return ApiError("queue_full", f"{reason}; try again later", {"Retry-After": self.retry_after()})

    def retry_after(self) -> str:
        """How many seconds what is queued or tokenised now will take, for the header Retry-After: 1 to 60."""
        return _whole_seconds(self._predicted_s(self.queued_cost + self._reserved_cost))


def too_late(what: str) -> ApiError:
    """The error of a request that cannot be answered before its client stops waiting."""
    return ApiError("deadline", f"{what}, longer than X-Request-Timeout-Ms allows; send it again with more time")


def _whole_seconds(seconds: float) -> str:
    return str(min(max(math.ceil(seconds), 1), 60))
