"""Runs over real sockets: the client, workers, exit codes. Nothing here depends on how fast this machine is."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sim_server import Simulated, simulated
from stub_server import free_port

from loadtest.openloop.client import HttpClient, Prepared
from loadtest.openloop.clock import LoopClock
from loadtest.openloop.commands import main, parser
from loadtest.openloop.engine import allow_connections
from loadtest.openloop.http import Answer, AnswerError, Reader
from loadtest.openloop.schema import read_result

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("--texts", str(ROOT / "LICENSE"))
LENIENT = ("--max-lag-ms", "60000", "--max-cpu", "50")
"""A machine under load is no fault of the run."""


@pytest.fixture
def server() -> Iterator[Simulated]:
    with simulated() as running:
        yield running


def run(host: str, *arguments: str, rate: float = 100, duration_s: float = 0.4) -> int:
    shaped = ("--rate", str(rate), "--duration-s", str(duration_s)) if "--trace" not in arguments else ()
    return main(["run", "--host", host, *shaped, "--warm-up-s", "0.1", *TEXTS, *LENIENT, *arguments])


def test_every_task_runs_and_is_right(server: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.headers = b"Server-Timing: tokenize;dur=0.5, infer;dur=40\r\n"
    for task, path in {
        "embed": "/api/embed",
        "tei-rerank": "/rerank",
        "cohere-rerank": "/v2/rerank",
        "oip-pairs": "/v2/models/stub/infer",
        "openai": "/v1/embeddings",
    }.items():
        output = tmp_path / "run.json"
        arguments = ("--task", task, "--inputs-per-request", "1-3", "--lengths", "lognormal:20:0.5", "-o", str(output))
        assert run(server.host, *arguments, duration_s=0.3) == 0, capsys.readouterr()
        result = read_result(output)
        assert result["server"] == {"path": path, "model": "stub"}
        assert result["summary"]["good"] == result["summary"]["requests"] > 0
        assert result["summary"]["server_ms"]["infer"]["p50"] == 40
        assert server.served[path] >= result["summary"]["requests"]
    assert "in server  tokenize 0.5 ms" in capsys.readouterr().out


def test_timing_headers_of_tei(server: Simulated, tmp_path: Path) -> None:
    server.headers = b"x-tokenization-time: 2\r\nX-Queue-Time: 3\r\nx-inference-time: 4\r\nx-compute-tokens: 11\r\n"
    assert run(server.host, "--task", "tei-embed", "-o", str(tmp_path / "run.json")) == 0
    summary = read_result(tmp_path / "run.json")["summary"]
    assert {name: stage["p50"] for name, stage in summary["server_ms"].items()} == {
        "tokenize": 2,
        "queue": 3,
        "infer": 4,
    }
    assert summary["tokens_per_s"] == pytest.approx(11 * summary["requests_per_s"])


def test_exit_codes(server: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server.host, "--slo-p99-ms", "60000", "--slo-goodput-rate", "1") == 0
    assert run(server.host, "--slo-p50-ms", "0.0001") == 1
    assert run(server.host, "--max-lag-ms", "0.000001") == 2
    printed = capsys.readouterr().out
    assert "VOID       the generator was late" in printed
    # It was hardly busy: more processes would be late as well.
    assert "or another machine" in printed
    assert "--processes" not in printed
    server.status = lambda number: 500 if number % 2 else 429
    assert run(server.host, "-o", str(tmp_path / "run.json")) == 1
    result = read_result(tmp_path / "run.json")
    assert set(result["failures"]) == {"status 500"}
    assert result["summary"]["refused"] > 0
    server.status = lambda number: 200
    server.service_s = 0.05
    assert run(server.host, "--connections", "1", "--max-connections", "1", duration_s=0.2) == 2
    assert "for one of 1 connections at most" in capsys.readouterr().out
    server.service_s = 0.8
    assert run(server.host, "--request-timeout-s", "0.4", duration_s=0.3, rate=20) == 1
    assert "x no answer within 0.4 s" in capsys.readouterr().out


def test_a_slow_server_does_not_hide_a_busy_generator(
    server: Simulated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was busy while it sent, and idle for the longer time in which it waited for the last answers."""
    called_s: list[float] = []

    def busy_s() -> float:
        called_s.append(time.monotonic())
        return min(called_s[-1] - called_s[0], 1.5)

    monkeypatch.setattr("loadtest.openloop.engine.time.process_time", busy_s)
    server.service_s = 3.0
    assert run(server.host, "--max-cpu", "0.9", rate=20, duration_s=1.0) == 2
    assert re.search(r"VOID       the generator used \d+% of a core \(limit 90%\)", capsys.readouterr().out)


def test_what_cannot_start(server: Simulated, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--slo", "missing.json"), "cannot read missing.json"),
        (("--ca", "missing.pem"), "--ca: expected a file of certificates"),
        (("--trace", "missing.txt"), "--trace: cannot read missing.txt"),
        (("--processes", "0"), "--processes: expected"),
        (("--texts", "missing.txt"), "cannot read texts from missing.txt"),
    ):
        assert run(server.host, *arguments) == 2
        assert message in capsys.readouterr().err
    assert run(f"http://127.0.0.1:{free_port()}") == 2
    assert "Is the server running" in capsys.readouterr().err
    arguments = ("--expect-workers", "1", "--expect-workers-max-wait-s", "0.1")
    assert run(server.host, *arguments) == 2
    assert "expected 1 workers within 0.1 s, got 0: do the others run" in capsys.readouterr().err
    assert not server.served


def test_all_at_once_and_traces(server: Simulated, tmp_path: Path) -> None:
    server.service_s = 0.01
    output = tmp_path / "run.json"
    at_once = ("run", "--host", server.host, *TEXTS, "--shape", "at-once", "--count", "40", "--max-connections", "4")
    assert main([*at_once, *LENIENT, "-o", str(output)]) == 0
    result = read_result(output)
    assert (result["summary"]["requests"], result["generator"]["most_in_flight"]) == (40, 40)
    assert main([*at_once, "--max-cpu", "0.000001"]) == 2
    (tmp_path / "trace.txt").write_text("".join(f"{0.01 * number}\n" for number in range(30)))
    assert run(server.host, "--trace", str(tmp_path / "trace.txt"), "-o", str(output)) == 0
    assert read_result(output)["summary"]["requests"] == 20
    (tmp_path / "trace.txt").write_text("0\n" * 8)
    assert main(["run", "--host", server.host, *TEXTS, *LENIENT, "--trace", str(tmp_path / "trace.txt")]) == 2
    now = ("--warm-up-s", "0", "-o", str(output))
    assert main(["run", "--host", server.host, *TEXTS, *LENIENT, "--trace", str(tmp_path / "trace.txt"), *now]) == 0
    summary = read_result(output)["summary"]
    assert summary["requests_per_s"] == pytest.approx(8 / summary["measured_s"], rel=0.05)


def test_https_with_a_custom_ca_and_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with simulated(context) as server:
        assert run(server.host) == 2
        printed = capsys.readouterr().err
        assert "CERTIFICATE_VERIFY_FAILED" in printed
        assert "--ca (for Locust: SSL_CERT_FILE) its authority?" in printed
        assert run(server.host, "--ca", str(certificate), "--api-key", "secret") == 0
        assert server.authorized == {"Bearer secret"}


def test_processes_share_the_load(server: Simulated, tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    assert run(server.host, "--processes", "2", "-o", str(output), rate=50, duration_s=1) == 0
    result = read_result(output)
    assert result["workers"] == 2
    # As many as one process would send: the same seed gives the same arrivals.
    assert run(server.host, "-o", str(output), rate=50, duration_s=1) == 0
    assert read_result(output)["summary"]["requests"] == result["summary"]["requests"]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loadtest", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_lost_worker_makes_the_run_void(server: Simulated) -> None:
    port = str(free_port())
    leader = start(
        *("run", "--host", server.host, "--rate", "50", "--duration-s", "60", *TEXTS, *LENIENT),
        *("--expect-workers", "2", "--bind", f"127.0.0.1:{port}"),
    )
    assert leader.stdout is not None
    assert "waiting for 2 workers" in leader.stdout.readline()
    workers = [start("worker", "--join", f"127.0.0.1:{port}") for _ in range(2)]
    try:
        deadline_s = time.monotonic() + 60
        while server.served.total() < 30 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        workers[0].kill()
        # A minute was planned: the others end at once.
        output, _ = leader.communicate(timeout=60)
        assert leader.returncode == 2, output
        assert "left during the run (its own output says why): its part of the load is missing" in output
        assert "loadtest: the run is void: worker " in output
        assert workers[1].wait(60) == 0
    finally:
        for process in (leader, *workers):
            process.kill()
            process.communicate()


def test_an_interrupt_still_gives_a_verdict(server: Simulated) -> None:
    process = start(
        "run", "--host", server.host, "--rate", "50", "--duration-s", "60", "--warm-up-s", "0", *TEXTS, *LENIENT
    )
    try:
        deadline_s = time.monotonic() + 60
        while server.served.total() < 30 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "VOID" not in output
        assert re.search(r"NOTE       interrupted: the numbers are those of the first [\d.]+ s of 60 s", output)
    finally:
        process.kill()
        process.communicate()


def test_a_worker_without_a_leader(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "--join", f"127.0.0.1:{free_port()}"]) == 2
    assert main(["worker", "--join", "nowhere"]) == 2
    assert "expected HOST:PORT of a leader" in capsys.readouterr().err


def test_packages_that_are_missing_are_named() -> None:
    # -S: without site-packages.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "loadtest"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2  # 1 would be a missed limit.
    assert re.match(r"error: \w+ is not installed; in the checkout: make wheel, then pip install ", done.stderr)
    # Without site-packages, Python may not know of its environment: the end names that of make, if there is one.
    command = [sys.executable, "-S", "-c", "from deploy.extras import other_python; print(other_python())"]
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.rstrip("\n")
    assert done.stderr.endswith(f'"$(echo dist/torch_ext-*.whl)[loadtest]"{end}\n')


def test_the_open_model_is_light() -> None:
    program = "import sys; from loadtest.openloop.commands import parser; parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"locust", "gevent", "torch", "numpy"} & set(loaded.stdout.split())


def fed(*parts: bytes) -> list[Answer]:
    reader = Reader()
    return [answer for part in parts if (answer := reader.feed(part)) is not None]


def test_answers_in_any_parts() -> None:
    whole = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\nSERVER-TIMING: a;dur=1\r\n\r\nhello"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: 1\r\n\r\n"
        b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 404 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    reader = Reader()
    found = [answer for byte in whole if (answer := reader.feed(bytes([byte]))) is not None]
    assert [(answer.status, answer.content) for answer in found] == [
        (200, b"hello"),
        (200, b"abcde"),
        (204, b""),
        (404, b""),
    ]
    assert found[0].stages == {"a": 1.0}
    assert not reader.keep_alive
    for wrong in (b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", b"x" * 70000):
        with pytest.raises(AnswerError):
            fed(wrong)
    reader = Reader()
    assert reader.feed(b"HTTP/1.0 200 OK\r\n\r\nto the ") is None
    assert reader.feed(b"end") is None
    assert reader.finish() == Answer(status=200, content=b"to the end")


def ask(host: str, count: int, data: bytes, pause_s: float = 0.0) -> list[Answer]:
    async def run_all() -> list[Answer]:
        loop = asyncio.get_running_loop()
        client = HttpClient(host, clock=LoopClock(loop), max_connections=8, timeout_s=10)
        await client.start(1)
        found = []
        for _ in range(count):
            future: asyncio.Future[Answer] = loop.create_future()
            client.send(Prepared(data, 1), future.set_result)
            found.append(await future)
            await asyncio.sleep(pause_s)
        await client.close()
        return found

    return asyncio.run(run_all())


def test_connections_that_the_server_closes(server: Simulated) -> None:
    body = b'{"inputs": ["x"]}'
    data = b"POST /api/embed HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    server.chunked = True
    assert [answer.status for answer in ask(server.host, 3, data)] == [200] * 3
    # Closed after each answer, without a word: the request on the closed connection is sent again on another one.
    server.close_each = True
    assert [answer.status for answer in ask(server.host, 5, data)] == [200] * 5


def test_the_alarm_of_the_loop_is_not_early() -> None:
    async def ring(count: int) -> list[float]:
        clock = LoopClock(asyncio.get_running_loop())
        late_s: list[float] = []
        rung = asyncio.Event()
        alarm = clock.alarm(rung.set)
        for _ in range(count):
            rung.clear()
            when_s = clock.time() + 0.0007
            alarm.set(when_s)
            await rung.wait()
            late_s.append(clock.time() - when_s)
        alarm.close()
        return late_s

    assert min(asyncio.run(ring(30))) >= -1e-6


def test_the_generator_checks_itself(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["self-check", "--rate", "100", "--duration-s", "0.5", "--max-lag-ms"]
    assert main([*arguments, "60000"]) == 0
    assert "kept       100 arrivals/s from one core: sent" in capsys.readouterr().out
    assert main([*arguments, "0.000001"]) == 2
    assert main(["self-check", "--rate", "0"]) == 2
    assert main([*arguments, "nan"]) == 2
    assert "--max-lag-ms: expected a finite number above 0, got nan" in capsys.readouterr().err


def test_open_files_are_allowed_as_far_as_they_may() -> None:
    assert allow_connections(10) == 10
    assert 1 <= allow_connections(10**9) < 10**9


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    printed: Any = capsys.readouterr().out
    assert "--expect-workers" in printed


def test_the_page_lists_every_option() -> None:
    page = (ROOT / "docs" / "load-test.md").read_text(encoding="utf-8")
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        assert f"python -m loadtest {name}" in page
        for action in command._actions:
            for flag in action.option_strings[-1:]:
                assert f"`{flag}" in page or f" {flag}" in page or flag == "--help", f"docs/load-test.md lacks {flag}"
