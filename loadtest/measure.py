"""Counts of one load test, percentiles that are not rounded, and the verdict on them. Nothing here knows Locust.

Locust rounds response times to two digits: 204 ms becomes 200 ms, which would meet a limit of 200. Here they keep four.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Collector",
    "Objectives",
    "Samples",
    "describe",
    "describe_answers",
    "milliseconds",
    "parse_server_timing",
]


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass
class Samples:
    """Durations in milliseconds, to four significant digits, so that an hour takes no more memory than a minute."""

    counts: Counter[float] = field(default_factory=Counter)
    sum_ms: float = 0.0

    def __len__(self) -> int:
        """How many durations were added."""
        return self.counts.total()

    def add(self, duration_ms: float) -> None:
        """Adds one duration."""
        self.counts[_four_digits(duration_ms)] += 1
        self.sum_ms += duration_ms

    def merge(self, other: Samples) -> None:
        """Adds all durations of another."""
        self.counts.update(other.counts)
        self.sum_ms += other.sum_ms

    def mean(self) -> float | None:
        """Mean in milliseconds, or None without any."""
        return self.sum_ms / len(self) if self.counts else None

    def percentile(self, fraction: float) -> float | None:
        """The smallest duration that at least `fraction` of all do not exceed (nearest rank), or None without any.

        Args:
            fraction: Between 0 (exclusive) and 1 (inclusive).
        """
        return self.at_rank(math.ceil(fraction * len(self)))

    def at_rank(self, rank: int) -> float | None:
        """The duration at a place in ascending order, or None if there are fewer.

        Args:
            rank: From 1.
        """
        for duration_ms in sorted(self.counts):
            rank -= self.counts[duration_ms]
            if rank <= 0:
                return duration_ms
        return None

    def within(self, limit_ms: float) -> int:
        """How many durations do not exceed a limit."""
        return sum(count for duration_ms, count in self.counts.items() if duration_ms <= limit_ms)

    def to_wire(self) -> list[Any]:
        """A form that msgpack carries from a worker to the master."""
        return [self.sum_ms, list(self.counts.items())]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Samples:
        """Reads what `to_wire` gave."""
        sum_ms, counts = wire
        return cls(Counter({float(duration_ms): int(count) for duration_ms, count in counts}), float(sum_ms))


def parse_server_timing(header: str | None) -> dict[str, float]:
    """Reads a ``Server-Timing`` header such as ``tokenize;dur=0.2, queue;dur=3.1``; what is not a duration is left out.

    Args:
        header: The header's value, or None if the server sent none.

    Returns:
        Milliseconds by name, in the header's order.
    """
    durations: dict[str, float] = {}
    for entry in (header or "").split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if name and key.strip().lower() == "dur":
                try:
                    durations[name] = float(value.strip().strip('"'))
                except ValueError:
                    continue
    return durations


@dataclass
class Collector:
    """What happened to the requests that count: those that started after the warm-up.

    Attributes:
        good: Requests answered rightly.
        refused: Requests that the server turned away because it was full (status 429).
        errors: Every other failure: no connection, no answer in time, another status, a wrong answer.
        texts: Texts in good requests.
        tokens: Tokens in good requests, as the server counts them.
        token_reports: Good requests whose answer says its tokens.
        latency: Durations of good requests as the client sees them.
        stages: Durations inside the server by stage, from its Server-Timing header.
    """

    good: int = 0
    refused: int = 0
    errors: int = 0
    texts: int = 0
    tokens: int = 0
    token_reports: int = 0
    latency: Samples = field(default_factory=Samples)
    stages: dict[str, Samples] = field(default_factory=dict)

    _COUNTS = ("good", "refused", "errors", "texts", "tokens", "token_reports")

    @property
    def total(self) -> int:
        """All requests that count."""
        return self.good + self.refused + self.errors

    def add_good(self, latency_ms: float, texts: int, tokens: int | None, stages: Mapping[str, float]) -> None:
        """Notes a request that was answered rightly.

        Args:
            latency_ms: From sending the request to having read the whole answer.
            texts: Texts in the request.
            tokens: Tokens in the request as the server counts them, if it does.
            stages: Milliseconds inside the server by stage.
        """
        self.good += 1
        self.texts += texts
        if tokens is not None:
            self.tokens += tokens
            self.token_reports += 1
        self.latency.add(latency_ms)
        for name, duration_ms in stages.items():
            self.stages.setdefault(name, Samples()).add(duration_ms)

    def goodput(self, within_ms: float | None) -> int:
        """Requests that were answered rightly within a time, or at all without one."""
        return self.good if within_ms is None else self.latency.within(within_ms)

    def merge(self, other: Collector) -> None:
        """Adds all counts of another."""
        for name in self._COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latency.merge(other.latency)
        for name, samples in other.stages.items():
            self.stages.setdefault(name, Samples()).merge(samples)

    def to_wire(self) -> dict[str, Any]:
        """A form that msgpack carries from a worker to the master."""
        return {
            **{name: getattr(self, name) for name in self._COUNTS},
            "latency": self.latency.to_wire(),
            "stages": [[name, samples.to_wire()] for name, samples in self.stages.items()],
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Collector:
        """Reads what `to_wire` gave."""
        return cls(
            **{name: int(wire[name]) for name in cls._COUNTS},
            latency=Samples.from_wire(wire["latency"]),
            stages={name: Samples.from_wire(samples) for name, samples in wire["stages"]},
        )

    def summary(self, seconds: float) -> dict[str, Any]:
        """Everything that was counted, as numbers with their units in their names.

        Args:
            seconds: How long requests that count were started.
        """
        rate = 1 / seconds if seconds > 0 else 0.0
        says_tokens = self.good > 0 and self.token_reports == self.good
        return {
            "measured_s": round(seconds, 3),
            "requests": self.total,
            "good": self.good,
            "refused": self.refused,
            "errors": self.errors,
            "error_rate": self.errors / self.total if self.total else None,
            "refused_rate": self.refused / self.total if self.total else None,
            "requests_per_s": self.good * rate,
            "texts_per_s": self.texts * rate,
            "tokens_per_s": self.tokens * rate if says_tokens else None,
            "latency_ms": {"mean": self.latency.mean(), **_percentiles(self.latency, (0.5, 0.95, 0.99, 1.0))},
            "server_ms": {
                name: {"mean": samples.mean(), **_percentiles(samples, (0.5, 0.95))}
                for name, samples in self.stages.items()
            },
        }


def _percentiles(samples: Samples, fractions: Iterable[float]) -> dict[str, float | None]:
    return {"max" if part == 1 else f"p{part * 100:g}": samples.percentile(part) for part in fractions}


@dataclass(frozen=True)
class Objectives:
    """Limits that a load test must keep; None means no limit.

    Goodput is what was answered rightly within `within_ms`; without `within_ms`, whatever was answered rightly.

    A server that fails or refuses what it cannot do is quick with the rest. So without `error_rate` (or `goodput_rate`)
    one error misses, and without `refused_rate` (or `goodput_rate`) a refused request exceeds every limit of latency.

    Attributes:
        p95_ms: 95 % of the requests that count for latency take at most that long.
        error_rate: At most that part of all requests fails, between 0 and 1.
        refused_rate: At most that part of all requests is turned away with status 429, between 0 and 1.
        p50_ms: Half of the requests that count for latency take at most that long.
        p99_ms: 99 % of the requests that count for latency take at most that long.
        within_ms: How long a request may take to be part of the goodput.
        goodput_per_s: At least so many requests per second are goodput.
        goodput_rate: At least that part of all requests is goodput, between 0 and 1.
    """

    p95_ms: float | None = None
    error_rate: float | None = None
    refused_rate: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    within_ms: float | None = None
    goodput_per_s: float | None = None
    goodput_rate: float | None = None

    @property
    def percentiles(self) -> dict[float, float | None]:
        """Limits of percentiles in milliseconds, by the part of the requests that keeps them."""
        return {0.5: self.p50_ms, 0.95: self.p95_ms, 0.99: self.p99_ms}

    def judge(self, collector: Collector, seconds: float = 0.0) -> list[tuple[bool, str]]:
        """Compares a load test with the limits.

        A test in which nothing was answered rightly misses whatever the limits are.

        Args:
            collector: What was counted.
            seconds: How long requests that count were started; for `goodput_per_s` only.

        Returns:
            For each limit whether it was kept, and a sentence that says so with numbers.
        """
        if not collector.good:
            reason = (
                f"of {collector.total} requests, none was answered rightly" if collector.total else "no request ended"
            )
            return [(False, reason)]
        whole = self.goodput_rate is not None
        slow = 0 if whole or self.refused_rate is not None else collector.refused
        verdicts = [
            _compare(*_percentile(collector, part, limit, slow), f"{limit:g} ms")
            for part, limit in self.percentiles.items()
            if limit is not None
        ]
        error_limit = 0.0 if self.error_rate is None and not whole else self.error_rate
        for what, count, limit in (
            ("error rate", collector.errors, error_limit),
            ("refused (429) rate", collector.refused, self.refused_rate),
        ):
            if limit is not None:
                rate = count / collector.total
                verdicts.append(
                    _compare(rate <= limit, f"{what} {100 * rate:.3g} % ({count} requests)", f"{100 * limit:g} %")
                )
        goodput = collector.goodput(self.within_ms)
        if self.goodput_rate is not None:
            rate = goodput / collector.total
            verdicts.append(_reach(rate >= self.goodput_rate, f"{100 * rate:.3g} %", f"{100 * self.goodput_rate:g} %"))
        if self.goodput_per_s is not None:
            rate = goodput / seconds if seconds > 0 else 0.0
            verdicts.append(_reach(rate >= self.goodput_per_s, f"{rate:.4g}/s", f"{self.goodput_per_s:g}/s"))
        return verdicts


def _percentile(collector: Collector, part: float, limit_ms: float, slow: int) -> tuple[bool, str]:
    """Whether a percentile keeps its limit, and how it reads, where so many refused requests exceed every limit."""
    name = f"p{100 * part:g}"
    rank = math.ceil(part * (collector.good + slow))
    if rank > collector.good:
        refused = f"{collector.refused} of {collector.total} requests were refused (429) and count as longer"
        return False, f"{name} beyond every answer, since {refused} (--slo-refused-rate allows some),"
    measured_ms = collector.latency.at_rank(rank)
    assert measured_ms is not None  # There are good requests, and each has a latency.
    with_refused = f" ({slow} refused requests count as longer)" if slow else ""
    return measured_ms <= limit_ms, f"{name} {measured_ms:g} ms{with_refused}"


def _reach(kept: bool, measured: str, limit: str) -> tuple[bool, str]:
    return kept, f"goodput {measured} {'>=' if kept else '<'} {limit}"


def _compare(kept: bool, measured: str, limit: str) -> tuple[bool, str]:
    return kept, f"{measured} {'<=' if kept else '>'} {limit}"


def describe(summary: Mapping[str, Any]) -> list[str]:
    """Writes the result of a load test as lines of text.

    Args:
        summary: What `Collector.summary` gives, with the settings of the test, the verdicts, and why it is void.
    """
    loop = f"{summary['think_time_s']:g} s mean think time" if summary["think_time_s"] else "closed loop"
    lines = {
        "load test": f"{summary['path']} at {summary['host']}, {summary['users']} users, {loop}, "
        f"{summary['inputs_per_request']} text(s) a request, {summary['measured_s']:.1f} s after the warm-up",
        **describe_answers(summary, f"{summary['requests_per_s']:.1f} requests/s"),
    }
    if summary["generator_cpu"] is not None:
        lines["generator"] = f"its busiest process used {summary['generator_cpu']:.2f} of a core"
    verdicts = ((("kept" if limit["kept"] else "MISSED"), limit["message"]) for limit in summary["limits"])
    void = (("VOID", reason) for reason in summary["void"])
    return [f"{name:10} {text}" for name, text in (*lines.items(), *verdicts, *void)]


def describe_answers(summary: Mapping[str, Any], rates: str) -> dict[str, str]:
    """Lines of text that both load tests have, by their titles.

    Args:
        summary: What `Collector.summary` gives.
        rates: What is told of the rate of requests.
    """
    tokens = summary["tokens_per_s"]
    stages = (
        f"{name} {milliseconds(stage['mean'])} (p95 {milliseconds(stage['p95'])})"
        for name, stage in summary["server_ms"].items()
    )
    return {
        "requests": f"{summary['good']} right, {summary['refused']} refused (429), {summary['errors']} errors",
        "rates": f"{rates}, {summary['texts_per_s']:.1f} texts/s, "
        + (f"{tokens:.0f} tokens/s" if tokens is not None else "tokens/s unknown (the server does not tell)"),
        "latency": ", ".join(f"{name} {milliseconds(value)}" for name, value in summary["latency_ms"].items()),
        "in server": ", ".join(stages) + " (mean of each stage)" if summary["server_ms"] else "no timing headers",
    }


def milliseconds(value: float | None) -> str:
    """A duration as lines of text have it."""
    return "none" if value is None else f"{value:.4g} ms"
