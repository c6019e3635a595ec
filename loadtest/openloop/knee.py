"""Searches the highest rate of arrivals that keeps the limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from loadtest.measure import Objectives
from loadtest.options import CannotStartError
from loadtest.tasks import Traits

from .engine import Outcome
from .options import MOST_PER_S, Settings
from .result import steps_of
from .verdict import EXIT_KEPT, EXIT_MISSED, EXIT_VOID, judge

__all__ = ["Knee", "Search", "find_knee"]

_CONFIRMED_TIMES = 2.0
"""How much longer the last trial is, at the rate that was found."""

_MOST_STEPS_BACK = 4
_GROWTH = 2.0


class Runs(Protocol):
    """What makes a load: a team of generators, or a simulation."""

    async def run(self, settings: Settings, traits: Traits) -> Outcome:
        """Makes one load."""


@dataclass(frozen=True)
class Search:
    """How the search goes.

    Attributes:
        lowest: Rate of the first trial.
        highest: No trial is above that.
        precision: The search ends when the missed rate is at most that part above the kept one.
    """

    lowest: float = 1.0
    highest: float = 100_000.0
    precision: float = 0.05

    def check(self, objectives: Objectives) -> None:
        """Looks at the values.

        Raises:
            CannotStartError: One is out of range, or there is no limit that a higher rate misses.
        """
        if not 0 < self.lowest <= self.highest <= MOST_PER_S:
            raise CannotStartError(
                f"expected 0 < --rate <= --rate-to <= {MOST_PER_S:g}, got {self.lowest:g} and {self.highest:g} "
                "arrivals per second"
            )
        if not 0.001 <= self.precision <= 1:
            raise CannotStartError(f"--precision: expected between 0.001 and 1, got {self.precision:g}")
        if not any(limit is not None for limit in objectives.percentiles.values()) and objectives.goodput_rate is None:
            raise CannotStartError(
                "no limit that a higher rate misses: pass one of latency, such as --slo-p99-ms 200, or "
                "--slo-goodput-rate"
            )


@dataclass
class Knee:
    """What a search found.

    Attributes:
        points: Every trial, in order.
        kept: The highest rate that kept the limits; None if none did.
        missed: The lowest rate above it that missed them; None if none did.
        void: Why the search means nothing.
        messages: What happened, for people.
        workers: How many generators made the load.
    """

    points: list[dict[str, Any]] = field(default_factory=list)
    kept: float | None = None
    missed: float | None = None
    void: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    workers: int = 1

    @property
    def exit_code(self) -> int:
        """0 if there is a knee, 1 if not even the lowest rate keeps the limits, 2 if the search is void."""
        return EXIT_VOID if self.void else EXIT_MISSED if self.kept is None else EXIT_KEPT

    def as_fields(self) -> dict[str, Any]:
        """The fields of `schema.KNEE` that are the search's own."""
        return {
            "points": self.points,
            "knee_per_s": self.kept,
            "missed_per_s": self.missed,
            "void": self.void,
            "messages": self.messages,
            "workers": self.workers,
            "exit_code": self.exit_code,
        }


class _Trials:
    def __init__(
        self,
        team: Runs,
        settings: Settings,
        traits: Traits,
        objectives: Objectives,
        say: Callable[[str], None],
    ) -> None:
        self.team, self.settings, self.traits, self.objectives, self._say = team, settings, traits, objectives, say
        self.knee = Knee()

    def say(self, message: str) -> None:
        self.knee.messages.append(message)
        self._say(message)

    async def keeps(self, rate: float, times: float = 1.0) -> bool | None:
        """Whether the limits are kept at a rate; None if the trial is void."""
        knee = self.knee
        # Another seed each time: the same arrivals would be lucky, or not, again and again.
        settings = dataclasses.replace(
            self.settings,
            rate=rate,
            seed=self.settings.seed + len(knee.points),
            duration_s=self.settings.warm_up_s + times * (self.settings.duration_s - self.settings.warm_up_s),
        )
        outcome = await self.team.run(settings, self.traits)
        knee.workers = outcome.workers
        verdict = judge(outcome, settings, self.objectives)
        point = steps_of(outcome, settings, self.objectives)
        if point:
            knee.points.append({**point[0], "rate": rate, "kept": verdict.kept, "void": verdict.void})
        reasons = [message for kept, message in verdict.limits if not kept]
        if verdict.void or outcome.interrupted:
            knee.void = [*verdict.void, *["the search was interrupted"] * outcome.interrupted]
            self.say(f"{rate:.4g}/s: void: {knee.void[0]}")
            return None
        self.say(f"{rate:.4g}/s: {'kept' if verdict.kept else 'missed: ' + '; '.join(reasons)}")
        return verdict.kept


async def find_knee(
    team: Runs,
    settings: Settings,
    traits: Traits,
    objectives: Objectives,
    search: Search,
    say: Callable[[str], None] = lambda _: None,
) -> Knee:
    """Doubles the rate until the limits are missed, halves the distance on a scale of ratios, and confirms.

    The last trial, at the rate that was found, is twice as long; if it misses, the search goes back in steps of the
    precision.

    Args:
        team: Makes the load.
        settings: Of each trial, but for the rate; ``duration_s`` is that of a trial, with its warm-up.
        traits: What was learnt of the server.
        objectives: The limits.
        search: How to search.
        say: Takes a line on each trial.
    """
    trials = _Trials(team, settings, traits, objectives, say)
    knee = trials.knee
    kept, missed, rate = None, None, search.lowest
    while missed is None:
        verdict = await trials.keeps(rate)
        if verdict is None:
            knee.kept = kept
            return knee
        if not verdict:
            missed = rate
        else:
            kept = rate
            if rate >= search.highest:
                break
            rate = min(search.highest, _GROWTH * rate)
    if kept is None:
        trials.say(f"not even {search.lowest:.4g}/s keeps the limits: start lower with --rate")
        knee.missed = missed
        return knee
    while missed is not None and missed / kept > 1 + search.precision:
        middle = math.sqrt(kept * missed)
        verdict = await trials.keeps(middle)
        if verdict is None:
            knee.kept, knee.missed = kept, missed
            return knee
        kept, missed = (middle, missed) if verdict else (kept, middle)
    if missed is None:
        trials.say(f"the limits are kept up to the highest rate, {search.highest:.4g}/s: raise --rate-to")
    for _ in range(_MOST_STEPS_BACK):
        verdict = await trials.keeps(kept, _CONFIRMED_TIMES)
        if verdict is not False:
            break
        missed, kept = kept, kept / (1 + search.precision)
    knee.kept, knee.missed = kept, missed
    if verdict is False:
        # The next lower rate was never tried.
        knee.kept = None
        knee.void.append("the rate that was found was missed again and again: make trials longer with --duration-s")
    return knee
