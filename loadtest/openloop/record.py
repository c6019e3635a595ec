"""What happened to each request, counted by the second of its intended start."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loadtest.measure import Collector, Samples

__all__ = ["GROWTH", "Record", "Second", "bucket_of", "bucket_ms", "percentile_of"]

GROWTH = 1.01
"""Ratio of neighbouring buckets in the histogram of a second."""

_PER_E = 1 / math.log(GROWTH)
_REASONS = 20


def bucket_of(duration_ms: float) -> int:
    """The bucket of a duration: at most half a percent away."""
    return round(_PER_E * math.log(max(duration_ms, 1e-3)))


def bucket_ms(bucket: int) -> float:
    """The middle of a bucket, to four digits."""
    return float(f"{math.exp(bucket / _PER_E):.4g}")


def percentile_of(counts: Mapping[int, int], fraction: float) -> float | None:
    """The smallest duration in milliseconds that at least `fraction` of all do not exceed, or None without any.

    Args:
        counts: How many in each bucket.
        fraction: Between 0 (exclusive) and 1 (inclusive).
    """
    rank = math.ceil(fraction * sum(counts.values()))
    for bucket in sorted(counts):
        rank -= counts[bucket]
        if rank <= 0:
            return bucket_ms(bucket)
    return None


@dataclass
class Second:
    """The requests whose intended start is within one second.

    Attributes:
        arrivals: How many.
        good: Answered rightly.
        refused: Turned away with status 429.
        errors: Failed otherwise.
        texts: Texts in good requests.
        latency: Durations of good requests from their intended start, by bucket.
    """

    arrivals: int = 0
    good: int = 0
    refused: int = 0
    errors: int = 0
    texts: int = 0
    latency: Counter[int] = field(default_factory=Counter)

    COUNTS = ("arrivals", "good", "refused", "errors", "texts")

    def merge(self, other: Second) -> None:
        """Adds all counts of another."""
        for name in self.COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latency.update(other.latency)

    def to_wire(self) -> dict[str, Any]:
        """A form that JSON carries."""
        return {
            **{name: getattr(self, name) for name in self.COUNTS},
            "latency": [[bucket, self.latency[bucket]] for bucket in sorted(self.latency)],
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Second:
        """Reads what `to_wire` gave."""
        return cls(
            **{name: int(wire[name]) for name in cls.COUNTS},
            latency=Counter({int(bucket): int(count) for bucket, count in wire["latency"]}),
        )

    @classmethod
    def sum(cls, seconds: Iterable[Second]) -> Second:
        """All of them in one."""
        whole = cls()
        for second in seconds:
            whole.merge(second)
        return whole


@dataclass
class Record:
    """What one generator, or several together, saw.

    Attributes:
        warm_up_s: Requests whose intended start is before that are in `seconds`, but do not count otherwise.
        collector: The requests that count.
        lag: By how many milliseconds they were sent later than intended.
        seconds: Everything, by the second of the intended start.
        reasons: Why requests failed, and how often, those of the warm-up included.
        unanswered: Requests that count and have no answer yet.
        last_s: When the last request that counts was to start, and its answer was there, from the start of the run.
    """

    warm_up_s: float = 0.0
    collector: Collector = field(default_factory=Collector)
    lag: Samples = field(default_factory=Samples)
    seconds: dict[int, Second] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    last_s: tuple[float, float] = (0.0, 0.0)

    def _second(self, intended_s: float) -> Second:
        return self.seconds.setdefault(int(intended_s), Second())

    def sent(self, intended_s: float, lag_s: float) -> None:
        """Notes that a request was sent.

        Args:
            intended_s: When it was to start, from the start of the run.
            lag_s: How much later it did.
        """
        self._second(intended_s).arrivals += 1
        if intended_s >= self.warm_up_s:
            self.lag.add(1e3 * lag_s)
            self.unanswered += 1
            self.last_s = (intended_s, self.last_s[1])

    def _done(self, intended_s: float, received_s: float) -> bool:
        if intended_s < self.warm_up_s:
            return False
        self.unanswered -= 1
        self.last_s = (self.last_s[0], max(self.last_s[1], received_s))
        return True

    def good(
        self, intended_s: float, received_s: float, texts: int, tokens: int | None, stages: Mapping[str, float]
    ) -> None:
        """Notes a right answer.

        Args:
            intended_s: When its request was to start.
            received_s: When its last byte was there.
            texts: Texts in the request.
            tokens: Tokens as the server counts them, if it does.
            stages: Milliseconds inside the server by stage.
        """
        latency_ms = 1e3 * (received_s - intended_s)
        second = self._second(intended_s)
        second.good += 1
        second.texts += texts
        second.latency[bucket_of(latency_ms)] += 1
        if self._done(intended_s, received_s):
            self.collector.add_good(latency_ms, texts, tokens, stages)

    def refused(self, intended_s: float, received_s: float) -> None:
        """Notes an answer with status 429."""
        self._second(intended_s).refused += 1
        if self._done(intended_s, received_s):
            self.collector.refused += 1

    def failed(self, intended_s: float, received_s: float, reason: str) -> None:
        """Notes any other failure."""
        self._second(intended_s).errors += 1
        if reason in self.reasons or len(self.reasons) < _REASONS:
            self.reasons[reason] += 1
        if self._done(intended_s, received_s):
            self.collector.errors += 1

    def merge(self, other: Record) -> None:
        """Adds all counts of another."""
        self.collector.merge(other.collector)
        self.lag.merge(other.lag)
        self.reasons.update(other.reasons)
        self.unanswered += other.unanswered
        self.last_s = (max(self.last_s[0], other.last_s[0]), max(self.last_s[1], other.last_s[1]))
        for number, second in other.seconds.items():
            self.seconds.setdefault(number, Second()).merge(second)

    def to_wire(self) -> dict[str, Any]:
        """A form that JSON carries from a worker."""
        return {
            "warm_up_s": self.warm_up_s,
            "collector": self.collector.to_wire(),
            "lag": self.lag.to_wire(),
            "seconds": [[number, second.to_wire()] for number, second in self.seconds.items()],
            "reasons": dict(self.reasons),
            "unanswered": self.unanswered,
            "last_s": list(self.last_s),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Record:
        """Reads what `to_wire` gave."""
        return cls(
            warm_up_s=float(wire["warm_up_s"]),
            collector=Collector.from_wire(wire["collector"]),
            lag=Samples.from_wire(wire["lag"]),
            seconds={int(number): Second.from_wire(second) for number, second in wire["seconds"]},
            reasons=Counter({str(reason): int(count) for reason, count in wire["reasons"].items()}),
            unanswered=int(wire["unanswered"]),
            last_s=(float(wire["last_s"][0]), float(wire["last_s"][1])),
        )
