"""From what was counted to kept, missed or void."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loadtest.measure import Collector, Objectives

from .engine import Outcome
from .options import Settings
from .plan import planned_s
from .presets import departures, early_stopping
from .record import Second, bucket_ms

__all__ = [
    "EXIT_KEPT",
    "EXIT_MISSED",
    "EXIT_VOID",
    "Verdict",
    "judge",
    "notes_on",
    "point_of",
    "point_of_run",
    "void_reasons",
]

EXIT_KEPT, EXIT_MISSED, EXIT_VOID = 0, 1, 2


@dataclass
class Verdict:
    """What a run says.

    Attributes:
        limits: Of each limit whether it was kept, and a sentence that says so with numbers.
        void: Why its numbers mean nothing; empty if they do.
    """

    limits: list[tuple[bool, str]] = field(default_factory=list)
    void: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether every limit was kept."""
        return all(kept for kept, _ in self.limits)

    @property
    def exit_code(self) -> int:
        """0 kept, 1 missed, 2 void."""
        return EXIT_VOID if self.void else EXIT_KEPT if self.kept else EXIT_MISSED


def void_reasons(outcome: Outcome, settings: Settings) -> list[str]:
    """Why the numbers of a run are those of the generator, or of a part of it, rather than the server's."""
    reasons = list(outcome.lost)
    if not outcome.record.collector.total and not outcome.lost:
        reasons.append("no request ended that counts: make the run longer, the rate higher, or the warm-up shorter")
    # At once: the generator holds back on purpose what the server cannot take yet.
    scheduled = settings.shape != "at-once" or bool(settings.trace)
    lag_ms = outcome.record.lag.percentile(0.99)
    # A process that had time to spare was late since others had the cores: more processes would be no better.
    spare = outcome.cpu < settings.max_cpu / 2
    advice = "give it a core of its own, or another machine" + ("" if spare else ", or --processes 2")
    if scheduled and lag_ms is not None and lag_ms > settings.max_lag_ms:
        reasons.append(
            f"the generator was late: it sent 1 % of the requests more than {lag_ms:g} ms after their time (limit "
            f"{settings.max_lag_ms:g} ms); {advice}"
        )
    if outcome.cpu > settings.max_cpu:
        reasons.append(
            f"the generator used {outcome.cpu:.0%} of a core (limit {settings.max_cpu:.0%}): the numbers hold its own "
            f"delay; {advice}"
        )
    if scheduled and outcome.waited:
        reasons.append(
            f"{outcome.waited} requests waited in the generator for one of {settings.max_connections} connections at "
            "most: raise --max-connections (and the limit of open files), or lower the rate"
        )
    return reasons


def measured_s(outcome: Outcome, settings: Settings) -> float:
    """For how many seconds requests that count were started; where all come at once, until the last was answered."""
    last_sent_s, last_answer_s = outcome.record.last_s
    if settings.shape == "at-once" and not settings.trace:
        return last_answer_s
    planned = planned_s(settings)
    if not planned:  # A trace in which everything comes at once.
        return max(0.0, last_answer_s - settings.warm_up_s)
    return min(planned, last_sent_s - settings.warm_up_s) if outcome.interrupted or outcome.ended else planned


def notes_on(outcome: Outcome, settings: Settings) -> list[str]:
    """What a reader of the numbers must know, though they are right."""
    length_s = measured_s(outcome, settings)
    found = departures(
        settings, measured_s=length_s, samples=outcome.record.collector.texts, interrupted=outcome.interrupted
    )
    if outcome.interrupted:
        planned = planned_s(settings)
        part = f" of {planned:g} s" if planned else ""
        found.append(f"interrupted: the numbers are those of the first {length_s:.3g} s{part} after the warm-up")
    return found


def judge(outcome: Outcome, settings: Settings, objectives: Objectives) -> Verdict:
    """Compares a run with its limits.

    Args:
        outcome: What was counted.
        settings: Of the run.
        objectives: The limits.
    """
    limits = objectives.judge(outcome.record.collector, measured_s(outcome, settings))
    if settings.bound_ms:
        limits.append(early_stopping(outcome.record.collector, settings.bound_ms))
    return Verdict(limits, void_reasons(outcome, settings))


def point_of(seconds: list[Second], length_s: float, objectives: Objectives) -> dict[str, Any]:
    """A point of the curve of latency over throughput, from a step of a run.

    Args:
        seconds: What happened in the step.
        length_s: How long it took.
        objectives: The limits.

    Returns:
        Rates per second, percentiles in milliseconds, parts of the requests, and whether the limits were ``kept``.
    """
    whole = Second.sum(seconds)
    collector = Collector(whole.good, whole.refused, whole.errors, whole.texts)
    for bucket, count in whole.latency.items():
        collector.latency.counts[bucket_ms(bucket)] += count
    return point_of_run(collector, length_s, objectives)


def point_of_run(collector: Collector, length_s: float, objectives: Objectives) -> dict[str, Any]:
    """The same from a whole run at one rate."""
    total = max(1, collector.total)
    return {
        "arrivals_per_s": collector.total / length_s,
        "answered_per_s": collector.good / length_s,
        "goodput_per_s": collector.goodput(objectives.within_ms) / length_s,
        "texts_per_s": collector.texts / length_s,
        **{f"p{100 * part:g}_ms": collector.latency.percentile(part) for part in objectives.percentiles},
        "error_rate": collector.errors / total,
        "refused_rate": collector.refused / total,
        "kept": all(kept for kept, _ in objectives.judge(collector, length_s)),
    }
