"""The same server, which stands still now and then, under both models, over real sockets."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sim_server import simulated
from stub_server import ROOT, Run

from loadtest.openloop.commands import main
from loadtest.openloop.schema import read_result

PAUSE_S, EVERY_S = 0.5, 2.0


def test_locust_hides_a_pause_that_the_open_model_sees(locust: Callable[..., Run], tmp_path: Path) -> None:
    """A quarter of the time the server stands still; the other requests are answered within some 10 ms."""
    output = tmp_path / "run.json"
    lenient = ("--texts", str(ROOT / "LICENSE"), "--max-lag-ms", "60000", "--max-cpu", "50")
    arguments = ("--rate", "40", "--duration-s", "4", "--warm-up-s", "0", "-o", str(output))
    with (
        simulated(service_s=0.01, paused=lambda now_s: now_s % EVERY_S < PAUSE_S) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(locust, server.host, "-t", "4s")
        assert main(["run", "--host", server.host, *lenient, *arguments]) == 0
        closed = running.result()
    assert closed.code == 0, closed.output
    latency_ms, open_ms = closed.summary["latency_ms"], read_result(output)["summary"]["latency_ms"]
    # Four users wait through each pause: eight requests of a thousand.
    assert latency_ms["max"] > 400
    assert latency_ms["p95"] < open_ms["p95"]
    # A quarter of the requests were to start in a pause, a fifth of them in its first tenth of a second.
    assert open_ms["p99"] > 400
