"""The search for the knee, against simulated servers whose capacity is known."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sim_server import simulated
from virtual import VirtualTeam

from loadtest.measure import Objectives
from loadtest.openloop.commands import main
from loadtest.openloop.knee import Knee, Search, find_knee
from loadtest.openloop.options import Settings
from loadtest.openloop.schema import KNEE, check, read_result
from loadtest.options import CannotStartError
from loadtest.tasks import Traits

TEXTS = ("--texts", str(Path(__file__).resolve().parents[2] / "LICENSE"))


def knee_of(team: Any, objectives: Objectives, search: Search, **values: Any) -> Knee:
    settings = Settings.from_values({"host": "http://h", "rate": 1.0, "duration_s": 32.0, **values})
    return asyncio.run(find_knee(team, settings, Traits("m"), objectives, search))


@pytest.mark.parametrize(
    ("server", "capacity", "seed"),
    [
        ({"service_s": 0.01}, 100, 0),
        ({"service_s": 0.02}, 50, 1000),
        ({"service_s": 0.05, "workers": 4}, 80, 0),
        ({"service_s": 0.02, "full": 20}, 50, 0),
    ],
)
def test_the_knee_is_within_a_tenth_of_the_capacity(server: dict[str, Any], capacity: float, seed: int) -> None:
    objectives = Objectives(p99_ms=500.0, refused_rate=0.02)
    knee = knee_of(VirtualTeam(**server), objectives, Search(lowest=10.0), seed=seed)
    assert knee.exit_code == 0
    assert knee.kept == pytest.approx(capacity, rel=0.1)
    assert knee.missed is not None
    assert 1 < knee.missed / knee.kept <= 1.06
    assert len(knee.points) < 15


def test_a_server_that_refuses_what_is_too_much_has_its_knee_at_its_capacity() -> None:
    """What it answers is quick at any rate; without a limit on refused requests, they exceed that of latency."""
    knee = knee_of(VirtualTeam(service_s=0.02, full=20), Objectives(p95_ms=1000.0), Search(lowest=10.0))
    assert knee.exit_code == 0
    assert knee.kept == pytest.approx(50, rel=0.1)


def test_a_limit_below_the_service_time_has_no_knee() -> None:
    knee = knee_of(VirtualTeam(service_s=0.01), Objectives(p99_ms=5.0), Search(lowest=10.0))
    assert (knee.exit_code, knee.kept, knee.missed) == (1, None, 10.0)
    assert "start lower with --rate" in knee.messages[-1]


def test_the_highest_rate_is_not_exceeded() -> None:
    team = VirtualTeam(service_s=0.001)
    knee = knee_of(team, Objectives(p99_ms=100.0), Search(lowest=10.0, highest=50.0))
    assert (knee.exit_code, knee.kept, knee.missed) == (0, 50.0, None)
    assert max(team.rates) == 50.0
    assert any("raise --rate-to" in message for message in knee.messages)


def test_a_generator_at_its_limit_makes_the_search_void() -> None:
    class Slow(VirtualTeam):
        async def run(self, settings: Settings, traits: Traits) -> Any:
            outcome = await super().run(settings, traits)
            outcome.cpu = settings.rate / 100
            return outcome

    knee = knee_of(Slow(service_s=0.001), Objectives(p99_ms=100.0), Search(lowest=10.0))
    assert (knee.exit_code, knee.kept) == (2, 80.0)
    assert "the generator used 160% of a core" in knee.void[0]


def test_a_rate_that_no_long_trial_confirms_is_no_knee() -> None:
    """Short trials keep the limits, longer ones never do: nothing was found, rather than a rate that nobody tried."""

    class Tiring(VirtualTeam):
        async def run(self, settings: Settings, traits: Traits) -> Any:
            self.server["service_s"] = 1.0 if settings.duration_s > 32 else 0.001
            return await super().run(settings, traits)

    knee = knee_of(Tiring(service_s=0.001), Objectives(p99_ms=100.0), Search(lowest=10.0, highest=40.0))
    assert (knee.exit_code, knee.kept) == (2, None)
    assert "missed again and again" in knee.void[0]


def test_what_is_no_search() -> None:
    for search, objectives, message in (
        (Search(), Objectives(error_rate=0.1), "no limit that a higher rate misses"),
        (Search(lowest=5, highest=1), Objectives(p99_ms=1), "--rate <= --rate-to"),
        (Search(highest=1e300), Objectives(p99_ms=1), "--rate-to <= 1e"),
        (Search(precision=0), Objectives(p99_ms=1), "--precision: expected"),
    ):
        with pytest.raises(CannotStartError, match=message):
            search.check(objectives)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "knee.json"
    with simulated() as server:
        arguments = [
            *("knee", "--host", server.host, "--duration-s", "0.4", "--warm-up-s", "0.1", *TEXTS, "-o", str(output)),
            *("--rate", "20", "--rate-to", "40", "--max-lag-ms", "60000", "--max-cpu", "50"),
        ]
        assert main([*arguments, "--slo-p99-ms", "60000"]) == 0
        result = read_result(output)
        assert check(result, KNEE) == ""
        assert result["knee_per_s"] == 40
        assert [point["rate"] for point in result["points"]] == [20, 40, 40]
        assert "knee       40 requests/s keep the limits" in capsys.readouterr().out
        assert main([*arguments, "--slo-p99-ms", "0.001"]) == 1
        assert main([*arguments, "--shape", "soak", "--slo-p99-ms", "1"]) == 2
        assert main(arguments) == 2
        assert "no limit that a higher rate misses" in capsys.readouterr().err


def test_the_help_has_the_defaults_of_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["knee", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for flag, default in (("--duration-s S", "12.0"), ("--rate PER_S", "1.0"), ("--rate-to PER_S", "100000.0")):
        assert f"(default: {default})" in told.rpartition(f"{flag} ")[2].partition(" --")[0], flag
