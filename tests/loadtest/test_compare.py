"""Better, worse or noise: of runs in simulated time, whose difference is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_openloop import a_result

from loadtest.openloop.commands import main
from loadtest.openloop.compare import FEWEST_BLOCKS, Change, blocks_of, compare_runs, describe_changes, overall
from loadtest.openloop.schema import KNEE_FORMAT, write_result
from loadtest.options import CannotStartError

RUN = {"rate": 60.0, "duration_s": 22.0}


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    """By name, two of each: the same server, a slower one, one that refuses."""
    servers: dict[str, dict[str, Any]] = {
        "same": {"service_s": 0.005},
        "slow": {"service_s": 0.006},
        "full": {"service_s": 0.012, "full": 1},
    }
    return {
        f"{name}{seed}": a_result(server=server, seed=seed, **RUN)
        for name, server in servers.items()
        for seed in range(2)
    }


def verdicts(first: Any, second: Any, **values: Any) -> dict[str, str]:
    changes = compare_runs(first, second, **{"resamples": 200, **values})
    return {change.name: change.verdict for change in changes}


def test_the_same_server_is_noise(runs: dict[str, Any]) -> None:
    assert set(verdicts(runs["same0"], runs["same1"]).values()) == {"noise"}
    assert set(verdicts(runs["same0"], runs["same0"]).values()) == {"noise"}


def test_a_slower_server_is_worse_and_a_faster_one_better(runs: dict[str, Any]) -> None:
    found = verdicts(runs["same0"], runs["slow1"])
    assert found["p50_ms"] == "worse"
    assert found["error_rate"] == "noise"
    assert overall(compare_runs(runs["same0"], runs["slow1"], resamples=200)) == "worse"
    back = verdicts(runs["slow1"], runs["same0"])
    assert back["p50_ms"] == "better"
    assert "worse" not in back.values()
    # A fifth is within a tolerance of a quarter.
    assert verdicts(runs["same0"], runs["slow1"], tolerance=0.25)["p50_ms"] == "noise"


def test_refusals_are_worse_even_if_what_is_answered_is_quick(runs: dict[str, Any]) -> None:
    found = verdicts(runs["same0"], runs["full0"])
    assert found["answered_rate"] == found["error_rate"] == "worse"


def test_what_noise_may_hide_is_said() -> None:
    """Nothing was seen, which is no news if nothing could be seen."""

    def lines(high: float, verdict: str = "noise") -> str:
        return "\n".join(describe_changes([Change("p99_ms", 5.0, 5.0, -high, high, verdict)], 0.99))

    assert "noise may hide p99 up to +50%: longer runs show less" in lines(math.log(1.5))
    assert "may hide" not in lines(math.log(1.05))
    assert "may hide" not in lines(math.log(1.5), "worse")


def test_what_cannot_be_compared(runs: dict[str, Any]) -> None:
    first = runs["same0"]
    for second, message in (
        ({**first, "void": ["late"]}, "the second run is void: late"),
        ({**first, "settings": {**first["settings"], "rate": 61.0}}, "differ in --rate"),
        ({**first, "settings": {**first["settings"], "texts": "other.txt"}}, "differ in --texts"),
        ({**first, "settings": {**first["settings"], "trace_speed": 2.0}}, "differ in --trace-speed"),
        ({"format": KNEE_FORMAT}, "is a search"),
        (
            a_result(server={"service_s": 0.005}, rate=60.0, duration_s=8.0),
            f"expected at least {FEWEST_BLOCKS} seconds",
        ),
    ):
        with pytest.raises(CannotStartError, match=message):
            compare_runs(first, second)
    # A steady load is the same for any time; steps are not.
    longer = {**first, "settings": {**first["settings"], "duration_s": 99.0}}
    assert compare_runs(first, longer, resamples=20)
    steps = [{**run, "settings": {**run["settings"], "shape": "steps"}} for run in (first, longer)]
    with pytest.raises(CannotStartError, match="differ in --duration-s"):
        compare_runs(*steps)
    with pytest.raises(CannotStartError, match="--confidence"):
        compare_runs(first, first, confidence=1.0)


def test_long_runs_have_longer_blocks() -> None:
    # At that rate nothing arrives in some seconds; they are seconds nevertheless.
    result = a_result(server={"service_s": 0.001}, rate=2.0, duration_s=302.0)
    assert any(second["arrivals"] == 0 for second in result["series"])
    assert [second["second"] for second in result["series"]] == list(range(len(result["series"])))
    blocks = blocks_of(result)
    assert len(blocks) == 60
    assert sum(block.arrivals for block in blocks) == result["summary"]["requests"]


def test_the_command(runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("same0", "slow1"):
        write_result(tmp_path / f"{name}.json", runs[name])
    same, slow, data = (str(tmp_path / f"{name}.json") for name in ("same0", "slow1", "data"))
    assert main(["compare", same, slow, "--json", data]) == 1
    assert "worse    p50_ms" in capsys.readouterr().out
    assert json.loads(Path(data).read_text())["verdict"] == "worse"
    assert main(["compare", slow, same]) == 0
    assert "all      better" in capsys.readouterr().out
    assert main(["compare", same, "missing"]) == 2


def test_the_file_is_written_whoever_reads_the_lines(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = tmp_path / "same.json"
    write_result(same, runs["same0"])

    class Left:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Left())
        with pytest.raises(BrokenPipeError):
            main(["compare", str(same), str(same), "--json", str(tmp_path / "changes.json")])
    assert json.loads((tmp_path / "changes.json").read_text(encoding="utf-8"))
    # And a file that cannot be written costs no line.
    assert main(["compare", str(same), str(same), "--json", "/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert out.endswith("noise\n")
    assert "cannot write /dev/full: No space left on device" in err
