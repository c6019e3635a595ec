"""Runs in the form of MLPerf's: their statistics, their rules, and that they end when they may."""

from __future__ import annotations

import html
import random
from pathlib import Path
from typing import Any

import pytest
from sim_server import simulated

from loadtest.measure import Collector, Objectives
from loadtest.openloop.commands import main
from loadtest.openloop.options import Settings
from loadtest.openloop.presets import PRESETS, allowed_over, departures, early_stopping, may_end, with_preset
from loadtest.openloop.schema import read_result
from loadtest.options import CannotStartError

LICENSE = str(Path(__file__).resolve().parents[2] / "LICENSE")


def test_how_many_may_exceed_a_bound() -> None:
    # 0.99 ** 459 is the first power below 0.01; for 90 %, two of 64 would be one too many.
    assert (allowed_over(458), allowed_over(459)) == (-1, 0)
    assert [allowed_over(queries, part=0.9) for queries in (43, 44, 63, 64)] == [-1, 0, 0, 1]
    found = [allowed_over(queries) for queries in (1_000, 10_000, 100_000, 270_336)]
    assert found == sorted(found)
    assert 0.009 < found[-1] / 270_336 < 0.01
    assert found[0] < 10


def test_the_confidence_is_what_it_says() -> None:
    """Where 1 % truly exceed the bound, hardly one run in a hundred passes."""
    rng = random.Random(0)
    queries, allowed = 2_000, allowed_over(2_000)
    passed = sum(sum(rng.random() < 0.01 for _ in range(queries)) <= allowed for _ in range(300))
    assert passed <= 10


def counts(quick: int, slow: int = 0, errors: int = 0) -> Collector:
    collector = Collector(errors=errors)
    for latency_ms, count in ((5.0, quick), (500.0, slow)):
        for _ in range(count):
            collector.add_good(latency_ms, 1, None, {})
    return collector


def test_early_stopping() -> None:
    assert early_stopping(counts(459), 100.0)[0]
    assert not early_stopping(counts(458), 100.0)[0]
    assert not may_end(counts(100), 100.0)
    # Failures exceed every bound.
    assert early_stopping(counts(459, errors=1), 100.0) == (
        False,
        "early stopping: 1 of 460 requests exceed 100 ms, more than the 0 that p99 with 99 % confidence allows",
    )
    # No number of further requests would help within reason.
    assert may_end(counts(900, slow=100), 100.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected a bound on latency, --slo-p99-ms"),
        ({"p99_ms": 1.0, "processes": 2}, "expected one process"),
        ({"p99_ms": 1.0, "process": "constant"}, "expected --process poisson, got constant"),
    ],
)
def test_rules(values: dict[str, Any], message: str) -> None:
    objectives = Objectives(p99_ms=values.pop("p99_ms", None))
    with pytest.raises(CannotStartError, match=message):
        with_preset({"preset": "mlperf-server", **values}, objectives)


def test_what_is_not_given_is_the_presets() -> None:
    filled = with_preset({"preset": "mlperf-server", "duration_s": None}, Objectives(p99_ms=10.0))
    assert (filled["least_s"], filled["bound_ms"], filled["process"]) == (600.0, 10.0, "poisson")
    assert with_preset({"preset": "mlperf-offline", "count": 5}, Objectives())["count"] == 5
    assert PRESETS["mlperf-offline"]["count"] == 24_576
    assert with_preset({"preset": ""}, Objectives()) == {"preset": ""}


@pytest.mark.parametrize(
    ("values", "measured_s", "samples", "said"),
    [
        ({"preset": "mlperf-server", "least_s": 600.0, "warm_up_s": 0.0}, 600.0, 500, []),
        ({"preset": "mlperf-server", "least_s": 599.0, "warm_up_s": 0.0}, 900.0, 10**6, ["planned for 599 s"]),
        (
            {"preset": "mlperf-server", "least_s": 600.0, "warm_up_s": 2.0, "inputs_per_request": "1-8"},
            600.0,
            500,
            ["had 1-8 texts", "the first 2 s"],
        ),
        ({"preset": "mlperf-offline"}, 600.0, 24_576, []),
        ({"preset": "mlperf-offline"}, 30.0, 24_575, ["24575 texts were answered", "the run took 30 s"]),
        ({}, 1.0, 1, []),
    ],
)
def test_a_run_says_which_rules_it_does_not_keep(
    values: dict[str, Any], measured_s: float, samples: int, said: list[str]
) -> None:
    found = departures(Settings(**values), measured_s=measured_s, samples=samples, interrupted=False)
    assert len(found) == len(said)
    for sentence, part in zip(found, said, strict=True):
        assert sentence.startswith("not by MLPerf's rules: ")
        assert part in sentence
    interrupted = departures(Settings(**values), measured_s=measured_s, samples=samples, interrupted=True)
    assert len(interrupted) == len(said) + bool(values)


def test_both_scenarios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run.json"
    with simulated() as server:
        common = [
            "--host",
            server.host,
            "--texts",
            LICENSE,
            "--max-lag-ms",
            "60000",
            "--max-cpu",
            "50",
            "-o",
            str(output),
        ]
        arguments = ["--preset", "mlperf-server", "--rate", "400", "--duration-s", "1", "--slo-p99-ms", "60000"]
        # 400 requests are too few for 99 % confidence: the run goes on until it has 459.
        assert main(["run", *arguments, *common]) == 0, capsys.readouterr()
        result = read_result(output)
        assert result["summary"]["requests"] >= 459
        assert 1 <= result["summary"]["measured_s"] <= 3
        printed = capsys.readouterr()
        assert "early stopping: 0 of" in printed.out
        note = "not by MLPerf's rules: the run was planned for 1 s, at least 600 s are asked for"
        assert result["notes"] == [note]
        assert f"NOTE       {note}" in printed.out
        assert f"loadtest: {note}" in printed.err
        page = tmp_path / "report.html"
        assert main(["report", str(output), "-o", str(page)]) == 0
        assert html.escape(note) in page.read_text(encoding="utf-8")
        assert main(["run", "--preset", "mlperf-offline", "--count", "300", *common]) == 0
        result = read_result(output)
        assert result["summary"]["requests"] == 300
        assert result["settings"]["max_connections"] == 64
        assert len(result["notes"]) == 2
        assert main(["knee", "--preset", "mlperf-offline", *common]) == 2
