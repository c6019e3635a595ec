"""Percentiles, verdicts and headers: the arithmetic behind the load test's exit code."""

from __future__ import annotations

import json
import math
import random

import pytest

from loadtest.measure import Collector, Objectives, Samples, describe, parse_server_timing


def collector(*latencies_ms: float, errors: int = 0, refused: int = 0) -> Collector:
    result = Collector(errors=errors, refused=refused)
    for latency_ms in latencies_ms:
        result.add_good(latency_ms, texts=2, tokens=10, stages={"infer": latency_ms / 2})
    return result


def test_percentiles_are_nearest_rank() -> None:
    rng = random.Random(0)
    values = [rng.uniform(0.5, 900) for _ in range(997)]
    samples = Samples()
    for value in values:
        samples.add(value)
    for fraction in (0.001, 0.5, 0.95, 0.99, 1.0):
        exact = sorted(values)[math.ceil(fraction * len(values)) - 1]
        # Four significant digits are kept: half a unit of the fourth is at most 0.05 % of the value.
        assert samples.percentile(fraction) == pytest.approx(exact, rel=5.001e-4)
    assert samples.mean() == pytest.approx(sum(values) / len(values))
    assert Samples().percentile(0.5) is None


def test_memory_does_not_grow_with_time() -> None:
    samples = Samples()
    rng = random.Random(1)
    for _ in range(50_000):
        samples.add(rng.uniform(100, 200))
    assert len(samples) == 50_000
    assert len(samples.counts) <= 1001


def test_merging_workers_is_the_same_as_one_process() -> None:
    whole = collector(*range(1, 101), errors=3, refused=4)
    parts = Collector()
    for part in (collector(*range(1, 51), errors=3), collector(*range(51, 101), refused=4)):
        # As on the wire: through JSON, which knows neither dataclasses nor keys that are numbers.
        parts.merge(Collector.from_wire(json.loads(json.dumps(part.to_wire()))))
    assert parts == whole
    assert parts.summary(10)["requests_per_s"] == 10.0
    assert parts.summary(10)["texts_per_s"] == 20.0
    assert parts.summary(10)["tokens_per_s"] == 100.0


def test_tokens_are_unknown_if_one_answer_does_not_tell() -> None:
    counts = collector(1.0)
    counts.add_good(1.0, texts=1, tokens=None, stages={})
    assert counts.summary(1)["tokens_per_s"] is None


@pytest.mark.parametrize(
    ("objectives", "kept"),
    [
        (Objectives(p95_ms=95, error_rate=1.0, refused_rate=1.0), [True, True, True]),
        (Objectives(p95_ms=94.9, error_rate=1.0, refused_rate=1.0), [False, True, True]),
        (Objectives(error_rate=0.1), [True]),
        (Objectives(error_rate=0.09), [False]),
        # Refused requests are no errors, and have a limit of their own.
        (Objectives(error_rate=0.1, refused_rate=0.5), [True, True]),
        (Objectives(error_rate=0.1, refused_rate=0.49), [True, False]),
        (Objectives(p95_ms=95, error_rate=0.0, refused_rate=1.0), [True, False, True]),
        # Without a limit on errors, an error misses, whatever other limits there are.
        (Objectives(), [False]),
        (Objectives(p95_ms=95, refused_rate=1.0), [True, False, True]),
        # Without a limit on refused requests, they exceed every limit of latency: 95 % of 225 are more than 100.
        (Objectives(p95_ms=1e9, error_rate=0.1), [False, True]),
        (Objectives(p50_ms=1e9, error_rate=0.1), [False, True]),
        # The share of goodput counts both.
        (Objectives(p95_ms=95, goodput_rate=0.4), [True, True]),
    ],
)
def test_verdicts(objectives: Objectives, kept: list[bool]) -> None:
    counts = collector(*range(1, 101), errors=25, refused=125)
    verdicts = objectives.judge(counts)
    assert [passed for passed, _ in verdicts] == kept
    assert all(("<=" in message or ">=" in message) == passed for passed, message in verdicts)


def test_a_limit_is_not_met_by_rounding() -> None:
    # Locust's own percentile of this is 200.
    assert Objectives(p95_ms=200).judge(collector(*[204.0] * 100)) == [
        (False, "p95 204 ms > 200 ms"),
        (True, "error rate 0 % (0 requests) <= 0 %"),
    ]


def test_refused_requests_are_the_slowest() -> None:
    # Of 100 requests, the 95th is the slowest of the 95 that were answered.
    counts = collector(*range(1, 96), refused=5)
    ((kept, message),) = (Objectives(p95_ms=95, error_rate=1)).judge(counts)[:1]
    assert (kept, message) == (True, "p95 95 ms (5 refused requests count as longer) <= 95 ms")
    ((kept, message),) = (Objectives(p99_ms=1e9, error_rate=1)).judge(counts)[:1]
    assert not kept
    assert message.startswith("p99 beyond every answer, since 5 of 100 requests were refused (429)")


@pytest.mark.parametrize("counts", [Collector(), Collector(refused=10), Collector(errors=10)])
def test_nothing_answered_misses_every_limit(counts: Collector) -> None:
    for objectives in (Objectives(), Objectives(error_rate=1.0), Objectives(p95_ms=1e9)):
        assert [passed for passed, _ in objectives.judge(counts)] == [False]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("tokenize;dur=0.25, queue;dur=3,infer;dur=41.5", {"tokenize": 0.25, "queue": 3.0, "infer": 41.5}),
        ('db;desc="a b";DUR="1.5"', {"db": 1.5}),
        ("cache;desc=hit", {}),
        ("x;dur=fast", {}),
        ("", {}),
        (None, {}),
    ],
)
def test_server_timing(header: str | None, expected: dict[str, float]) -> None:
    assert parse_server_timing(header) == expected


def test_description_names_every_number() -> None:
    counts = collector(*range(1, 101), errors=1, refused=2)
    summary = {
        "path": "/api/embed",
        "host": "http://h",
        "users": 4,
        "think_time_s": 0.0,
        "inputs_per_request": 2,
        **counts.summary(10),
        "generator_cpu": 0.614,
        "void": ["worker box_1 quit during the run"],
        "limits": [
            {"kept": passed, "message": message}
            for passed, message in Objectives(p95_ms=50, error_rate=1, refused_rate=1).judge(counts)
        ],
    }
    text = "\n".join(describe(summary))
    for expected in (
        *("100 right", "2 refused (429)", "1 errors", "10.0 requests/s", "20.0 texts/s", "100 tokens/s"),
        *("p50 50 ms", "p95 95 ms", "p99 99 ms", "max 100 ms", "infer 25.25 ms (p95 47.5 ms)", "closed loop"),
        *("MISSED     p95 95 ms > 50 ms", "kept       error rate", "used 0.61 of a core"),
        "VOID       worker box_1 quit during the run",
    ):
        assert expected in text, (expected, text)
