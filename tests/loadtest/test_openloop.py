"""The open model in simulated time: what it counts, what it sees, and when a run is void."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import pytest
from virtual import REQUEST, VirtualClock, closed_loop, run_virtually

from loadtest.measure import Objectives
from loadtest.openloop.engine import Outcome
from loadtest.openloop.generator import Generator
from loadtest.openloop.options import Settings
from loadtest.openloop.record import Record, bucket_ms, bucket_of, percentile_of
from loadtest.openloop.result import describe_run, drift_of, redacted, run_result
from loadtest.openloop.schema import RUN, check, read_result, write_result
from loadtest.openloop.verdict import judge, void_reasons
from loadtest.options import CannotStartError
from loadtest.tasks import Traits


def settings(**values: Any) -> Settings:
    return Settings.from_values({"host": "http://h", "rate": 100.0, **values})


def test_latency_is_that_of_a_queue() -> None:
    # M/D/1 at half load: the mean wait is rho / (2 * (1 - rho)) service times, 5 ms here.
    outcome = run_virtually(settings(rate=50.0, duration_s=400.0), service_s=0.01)
    mean = outcome.record.collector.latency.mean()
    assert mean is not None
    assert mean == pytest.approx(15.0, rel=0.1)
    assert outcome.record.lag.percentile(1.0) == 0.0
    assert outcome.record.collector.errors == outcome.record.unanswered == 0


def test_a_pause_is_seen_by_the_open_model_and_hidden_by_the_closed_one() -> None:
    """A server that stands still for 500 ms every 5 s, and answers in 5 ms otherwise."""
    pauses = {"service_s": 0.005, "pause_s": 0.5, "every_s": 5.0}
    outcome = run_virtually(settings(duration_s=100.0, process="constant"), **pauses)
    p99_ms = outcome.record.collector.latency.percentile(0.99)
    assert p99_ms is not None
    # A tenth of the requests were to start in a pause, or in the queue after it; the first of them waited for 500 ms.
    assert 400 < p99_ms <= 510
    # Four users: each pause costs four of some 3,600 requests.
    latencies = sorted(closed_loop(4, 100.0, **pauses))
    assert latencies[math.ceil(0.99 * len(latencies)) - 1] < 25
    assert latencies[-1] > 400


def test_a_schedule_that_cannot_be_kept_lets_others_have_their_turn() -> None:
    """Answers, timeouts and an interrupt come between the requests, however late these are."""
    clock = VirtualClock()
    turns: list[int] = []
    sent: list[Any] = []

    class Nowhere:
        def send(self, request: Any, done: Any) -> None:
            sent.append(done)

    generator = Generator(
        clock=clock,
        client=Nowhere(),
        arrivals=itertools.repeat(0.0),
        pick=lambda: REQUEST,
        validate=lambda content, texts: None,
    )
    generator.start()

    def other() -> None:
        turns.append(len(sent))
        if len(turns) == 5:
            generator.stop()
        else:
            clock.call_at(clock.time(), other)

    clock.call_at(clock.time() + 0.02, other)
    clock.run()
    assert len(turns) == 5
    assert 0 < turns[1] < len(sent) < 20_000


def test_warm_up_is_sent_but_does_not_count() -> None:
    outcome = run_virtually(settings(duration_s=10.0, warm_up_s=4.0, process="constant"), service_s=0.001)
    assert outcome.record.collector.total == pytest.approx(600, abs=1)
    assert sum(second.arrivals for second in outcome.record.seconds.values()) == pytest.approx(1000, abs=1)


def test_the_histogram_is_of_the_requests_that_count() -> None:
    """Not of the whole second in which the warm-up ends."""
    result = a_result(rate=50.0, duration_s=5.0, warm_up_s=1.9)
    assert sum(count for _, count in result["histogram"]["counts"]) == result["summary"]["good"]


def test_refusals_and_overload() -> None:
    outcome = run_virtually(settings(rate=200.0, duration_s=20.0, warm_up_s=0.0), service_s=0.01, full=5)
    collector = outcome.record.collector
    assert collector.good + collector.refused == collector.total
    assert collector.good / 20 == pytest.approx(100, rel=0.05)
    assert percentile_of(outcome.record.seconds[10].latency, 1.0) == pytest.approx(50, rel=0.01)


def test_buckets_are_within_half_a_percent() -> None:
    for duration_ms in (0.01, 0.5, 1.0, 17.3, 999.0, 60_000.0):
        assert bucket_ms(bucket_of(duration_ms)) == pytest.approx(duration_ms, rel=0.0051)
    assert percentile_of({}, 0.5) is None


def test_workers_together_are_one() -> None:
    whole = run_virtually(settings(duration_s=5.0), service_s=0.002)
    again = Outcome.from_wire(json.loads(json.dumps(whole.to_wire())))
    assert again.record == whole.record
    merged = Outcome(Record(2.0), workers=0)
    merged.merge(again)
    assert (merged.record, merged.workers) == (whole.record, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cpu": 0.95}, "the generator used 95% of a core"),
        ({"waited": 3}, "3 requests waited in the generator"),
        ({"lost": ["worker a left"]}, "worker a left"),
        ({"record": Record()}, "no request ended that counts"),
    ],
)
def test_a_run_is_void_when_the_generator_was_the_limit(change: dict[str, Any], reason: str) -> None:
    outcome = run_virtually(settings(duration_s=5.0), service_s=0.002)
    assert judge(outcome, settings(), Objectives()).exit_code == 0
    verdict = judge(dataclasses.replace(outcome, **change), settings(), Objectives(p99_ms=1e6))
    assert verdict.exit_code == 2
    assert any(reason in text for text in verdict.void), verdict.void


def test_a_late_schedule_is_void_but_not_where_all_comes_at_once() -> None:
    outcome = run_virtually(settings(duration_s=5.0), service_s=0.002)
    for _ in range(20):
        outcome.record.lag.add(30.0)
    (reason,) = void_reasons(outcome, settings())
    assert "more than 30 ms after their time (limit 10 ms)" in reason
    assert not void_reasons(outcome, settings(max_lag_ms=50.0))
    assert not void_reasons(outcome, settings(shape="at-once"))


def test_limits_decide() -> None:
    outcome = run_virtually(settings(rate=50.0, duration_s=60.0), service_s=0.01)
    for objectives, code in (
        (Objectives(p50_ms=50.0, p95_ms=100.0, p99_ms=200.0), 0),
        (Objectives(p99_ms=12.0), 1),
        (Objectives(within_ms=1000.0, goodput_per_s=40.0, goodput_rate=0.99), 0),
        (Objectives(within_ms=10.5, goodput_rate=0.99), 1),
        (Objectives(goodput_per_s=60.0), 1),
    ):
        assert judge(outcome, settings(rate=50.0, duration_s=60.0), objectives).exit_code == code, objectives


def a_result(objectives: Objectives | None = None, server: dict[str, float] | None = None, **values: Any) -> Any:
    chosen, objectives = settings(**values), objectives or Objectives(p99_ms=100.0)
    outcome = run_virtually(chosen, **{"service_s": 0.009, **(server or {})})
    command = ["run", "--api-key", "secret", "--rate", "100"]
    return run_result(command, chosen, objectives, Traits("m"), outcome, judge(outcome, chosen, objectives))


def test_steps_show_the_knee(tmp_path: Any) -> None:
    result = a_result(Objectives(p99_ms=500.0), shape="steps", rate=20.0, rate_to=160.0, steps=8, duration_s=240.0)
    assert [point["rate"] for point in result["points"]] == [20.0 * number for number in range(1, 9)]
    # The server takes 111 requests/s.
    assert [point["kept"] for point in result["points"]] == [True] * 5 + [False] * 3
    assert result["knee_per_s"] == 100.0
    assert result["points"][2]["arrivals_per_s"] == pytest.approx(60, rel=0.1)
    write_result(tmp_path / "run.json", result)
    assert read_result(tmp_path / "run.json") == result
    assert "secret" not in (tmp_path / "run.json").read_text()
    text = "\n".join(describe_run(result))
    for expected in ("open model, poisson, steps", "step       20/s", "MISSED     p99", "infer 9 ms"):
        assert expected in text, text


def test_every_shape_has_a_result() -> None:
    for values in (
        {"shape": "soak", "duration_s": 60.0},
        {"shape": "spike", "rate": 20.0, "rate_to": 90.0, "spike_every_s": 20.0, "spike_s": 5.0, "duration_s": 60.0},
        {"shape": "diurnal", "rate": 10.0, "rate_to": 90.0, "day_s": 30.0, "duration_s": 60.0},
        {"shape": "at-once", "count": 500, "warm_up_s": 0.0},
    ):
        result = a_result(**values)
        assert check(result, RUN) == ""
        assert describe_run(result)
    # All at once: 500 requests in 9 ms each.
    assert result["summary"]["requests_per_s"] == pytest.approx(1 / 0.009, rel=0.01)
    assert result["points"][0]["answered_per_s"] == pytest.approx(1 / 0.009, rel=0.01)


def test_a_soak_tells_of_drift() -> None:
    result = a_result(shape="soak", rate=20.0, duration_s=100.0)
    assert abs(result["drift"]) < 0.2
    outcome = run_virtually(settings(rate=120.0, duration_s=100.0), service_s=0.009)
    drift = drift_of(outcome.record.seconds, 2.0)
    assert drift is not None
    assert drift > 1
    assert drift_of({}, 0.0) is None


def test_files_of_another_form_are_refused(tmp_path: Any) -> None:
    result = a_result(duration_s=5.0)
    for change, message in (
        ({"format": "x"}, "expected a result of this load test"),
        ({"exit_code": 3}, "result.exit_code must be one of"),
        ({"workers": -1}, "result.workers must be bigger than or equal to 0"),
        ({"void": "no"}, "result.void must be array"),
        ({"more": 1}, "must not contain {'more'}"),
    ):
        (tmp_path / "x.json").write_text(json.dumps({**result, **change}))
        with pytest.raises(CannotStartError, match=message):
            read_result(tmp_path / "x.json")
    del result["limits"]
    assert check(result, RUN) == "result lacks limits"
    with pytest.raises(ValueError, match="lacks limits"):
        write_result(tmp_path / "y.json", result)


def test_commands_are_shown_without_keys() -> None:
    assert redacted(["run", "--api-key", "a", "--api-key=b"]) == ["run", "--api-key", "...", "--api-key=..."]
    # argparse takes the beginning of an option; a key may begin as an option does.
    for short in ("--api-k", "--api", "--a"):
        assert redacted(["run", short, "secret", f"{short}=secret", "-o", "x"]) == [
            *("run", short, "...", f"{short}=...", "-o", "x")
        ]
    assert redacted(["--api-key", "--api-key", "x"]) == ["--api-key", "...", "x"]
