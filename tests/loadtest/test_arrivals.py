"""Arrival times, rates over time, lengths of texts: pure functions of settings and seed."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loadtest.openloop.arrivals import diurnal, gaps, read_trace, spikes, steady, steps, times
from loadtest.openloop.lengths import parse_counts, parse_lengths, with_lengths
from loadtest.openloop.options import Settings, read_objectives
from loadtest.openloop.plan import arrivals_of, planned_s, prepare_requests
from loadtest.options import CannotStartError
from loadtest.tasks import Traits

TEXTS = str(Path(__file__).resolve().parents[2] / "LICENSE")


def test_poisson_arrivals_are_random_at_the_rate() -> None:
    found = list(times(steady(200, 500), gaps("poisson", 1)))
    assert len(found) == pytest.approx(100_000, rel=0.02)
    assert found == sorted(found)
    distances = [second - first for first, second in itertools.pairwise(found)]
    # Exponential: mean and standard deviation are alike; so are mean and variance of counts per second.
    assert statistics.stdev(distances) == pytest.approx(statistics.mean(distances), rel=0.02)
    counts = Counter(int(moment) for moment in found)
    assert statistics.variance(counts.values()) == pytest.approx(200, rel=0.2)
    assert found == list(times(steady(200, 500), gaps("poisson", 1)))
    assert found != list(times(steady(200, 500), gaps("poisson", 2)))


def test_constant_arrivals_are_even() -> None:
    found = list(times(steady(10, 2.05), gaps("constant", 0)))
    assert found == pytest.approx([0.1 * number for number in range(1, 21)])


@pytest.mark.parametrize("process", ["poisson", "constant"])
@pytest.mark.parametrize(
    "profile",
    [
        steps(100, 800, 8, 10),
        spikes(50, 2000, every_s=20, length_s=4, duration_s=70),
        diurnal(0, 1000, day_s=60, duration_s=90),
    ],
    ids=["steps", "spikes", "diurnal"],
)
def test_rates_change_over_time(profile: Any, process: str) -> None:
    found = list(times(profile, gaps(process, 3)))
    assert found == sorted(found)
    assert found[-1] < profile.duration_s
    assert len(found) == pytest.approx(profile.arrivals, rel=0.03)
    counts = Counter(int(moment) for moment in found)
    peak = max(counts.values())
    assert peak == pytest.approx(profile.highest, rel=0.15)


def test_spikes_and_steps_are_where_they_should_be() -> None:
    profile = spikes(10, 100, every_s=10, length_s=2, duration_s=20)
    counts = Counter(int(moment) for moment in times(profile, gaps("constant", 0)))
    assert [counts[second] for second in range(20)] == pytest.approx(([10] * 4 + [100] * 2 + [10] * 4) * 2, abs=1)
    counts = Counter(int(moment) for moment in times(steps(10, 30, 3, 2), gaps("constant", 0)))
    assert [counts[second] for second in range(6)] == pytest.approx([10, 10, 20, 20, 30, 30], abs=1)


def test_several_generators_share_the_same_arrivals() -> None:
    settings = Settings(rate=50, duration_s=10)
    parts = [list(arrivals_of(settings, index, 3)) for index in range(3)]
    assert sorted(itertools.chain(*parts)) == list(arrivals_of(settings))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_traces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("10\n10.5\n\n12\n")
    assert read_trace(tmp_path / "a.txt", 2) == [0, 0.25, 1]
    (tmp_path / "b.jsonl").write_text('{"time_s": 1}\n{"time_s": 4, "x": 1}\n')
    assert read_trace(tmp_path / "b.jsonl") == [0, 3]
    settings = Settings.from_values({"trace": str(tmp_path / "b.jsonl"), "warm_up_s": 1.0})
    assert list(arrivals_of(settings)) == [0, 3]
    assert planned_s(settings) == 2
    for content, message in (
        ("2\n1\n", "line 2: expected times that ascend"),
        ("x", "a number of seconds"),
        ("", "no arrival"),
    ):
        (tmp_path / "c.txt").write_text(content)
        with pytest.raises(CannotStartError, match=message):
            read_trace(tmp_path / "c.txt")
    with pytest.raises(CannotStartError, match="cannot read"):
        read_trace(tmp_path / "missing")


def test_lengths_follow_the_distribution() -> None:
    rng = random.Random(0)
    texts = ["one two three", "four five"] * 1000
    for spec, low, high, mean in (("fixed:7", 7, 7, 7), ("uniform:3:9", 3, 9, 6), ("lognormal:40:0.5", 1, 999, 45.3)):
        draw = parse_lengths(spec)
        assert draw is not None
        lengths = [len(text.split()) for text in with_lengths(texts, draw, rng)]
        assert low <= min(lengths)
        assert max(lengths) <= high
        assert statistics.mean(lengths) == pytest.approx(mean, rel=0.05)
    assert parse_lengths("texts") is None
    too_long = ("fixed:1e9", "fixed:inf", "uniform:1:1e9", "lognormal:1e300:1", "lognormal:40:50")
    for spec in ("fixed", "fixed:0", "fixed:2.5", "uniform:9:3", "lognormal:a:1", "other:1", "texts:1", *too_long):
        with pytest.raises(CannotStartError, match="--lengths: expected texts, fixed"):
            parse_lengths(spec)


def test_drawn_lengths_are_not_cut() -> None:
    """Unless somebody asks for it: `fixed:1000` in words is more than the 2,000 characters of texts as they are."""

    def words(**values: Any) -> set[int]:
        settings = Settings.from_values({"host": "http://h", "rate": 1.0, "texts": TEXTS, **values})
        bodies = [request.data.partition(b"\r\n\r\n")[2] for request in prepare_requests(settings, Traits())]
        return {len(json.loads(body)["inputs"][0].split()) for body in bodies}

    assert words(lengths="fixed:1000") == {1000}
    assert max(words(lengths="fixed:1000", max_chars=2000)) < 1000
    draw = parse_lengths("lognormal:40:5")
    assert draw is not None
    assert max(draw(random.Random(seed)) for seed in range(3000)) == 100_000


def test_requests_are_prepared() -> None:
    settings = Settings(host="https://h:1/gateway/", task="oip-pairs", inputs_per_request="2-4", texts=TEXTS, rate=1)
    requests = prepare_requests(settings, Traits("a model"))
    assert {request.texts for request in requests} == {2, 3, 4}
    head, _, body = requests[0].data.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /gateway/v2/models/a%20model/infer HTTP/1.1\r\nHost: h:1\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert [tensor["shape"] for tensor in json.loads(body)["inputs"]] == [[requests[0].texts]] * 2
    assert prepare_requests(settings, Traits("a model")) == requests
    assert prepare_requests(settings, Traits("a model"), 1) != requests
    assert parse_counts("3") == (3, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--rate: expected arrivals per second"),
        ({"rate": 10.0, "shape": "steps", "rate_to": 5.0}, "--rate-to: expected more than --rate"),
        ({"rate": 1e308}, "--rate: expected arrivals per second, more than 0, at most 1e\\+06, got 1e\\+308"),
        ({"rate": 1.0, "shape": "steps", "rate_to": 1e7}, "--rate-to: expected more than --rate .* at most"),
        ({"rate": 1.0, "warm_up_s": 30.0}, "ends within its warm-up"),
        ({"rate": 1.0, "shape": "spike", "rate_to": 2.0, "spike_s": 60.0}, "--spike-s: expected less than"),
        ({"rate": 1.0, "inputs_per_request": "8-1"}, "--inputs-per-request"),
        ({"rate": 1.0, "max_lag_ms": 0.0}, "--max-lag-ms: expected a finite number above 0, got 0"),
        ({"rate": 1.0, "max_lag_ms": math.inf}, "--max-lag-ms: expected a finite number above 0, got inf"),
        ({"rate": 1.0, "max_cpu": math.inf}, "--max-cpu: expected a finite number above 0, got inf"),
        ({"trace": "t", "warm_up_s": math.inf}, "--warm-up-s: expected at least 0, got inf"),
        ({"rate": 1.0, "steps": 1}, "--steps: expected at least 2"),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CannotStartError, match=message):
        Settings.from_values(values)


def test_limits_of_a_file_and_of_options(tmp_path: Path) -> None:
    path = tmp_path / "slo.json"
    path.write_text('{"p99_ms": 200, "error_rate": 0.01}')
    objectives = read_objectives({"slo": str(path), "slo_p99_ms": 100.0, "slo_p50_ms": None})
    assert (objectives.p99_ms, objectives.error_rate, objectives.p50_ms) == (100.0, 0.01, None)
    for content, message in (
        ('{"p98_ms": 1}', "expected some of p50_ms.*got 'p98_ms'"),
        ('{"error_rate": 2}', "expected a number between 0 and 1, got 2"),
        ('{"p99_ms": "x"}', "expected a number more than 0"),
        ('{"p99_ms": 1e400}', "expected a number more than 0, got inf"),
        ("[]", "expected a JSON object"),
        ("{", "cannot read"),
    ):
        path.write_text(content)
        with pytest.raises(CannotStartError, match=message):
            read_objectives({"slo": str(path)})
