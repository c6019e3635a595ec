"""Real Locust runs in processes of their own, against a server that behaves as it is told."""

from __future__ import annotations

import contextlib
import csv
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from right_answers import DIMENSION
from stub_server import OWN_TEXTS, ROOT, Run, Stub, free_port, start_locust, together

from loadtest.tasks import TASKS
from tests.warm import Program

Locust = Callable[..., Run]


def aggregated(run: Run) -> dict[str, str]:
    """The last line of Locust's table of requests."""
    with (run.folder / "out_stats.csv").open(encoding="utf-8") as file:
        (row,) = (row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
    return row


def test_limits_kept_and_true_numbers(locust: Locust, stub: Stub) -> None:
    stub.delay_s = 0.05
    stub.headers = {"Server-Timing": "tokenize;dur=0.5, queue;dur=4, infer;dur=40"}
    run = locust(stub.host, "--slo-p95-ms", "1000", "--slo-error-rate", "0", texts=())
    assert run.code == 0, run.output
    summary = run.summary
    counted = summary["requests"]
    # Four users in a closed loop of at least 50 ms: no more than 80 requests/s can be true.
    assert 0 < summary["requests_per_s"] <= 80
    assert counted <= 80 * summary["measured_s"] + 4
    assert summary["latency_ms"]["p50"] >= 50
    assert summary["latency_ms"]["p50"] <= summary["latency_ms"]["p95"] <= summary["latency_ms"]["max"]
    assert summary["tokens_per_s"] == pytest.approx(7 * summary["requests_per_s"])
    assert summary["server_ms"]["infer"] == {"mean": pytest.approx(40), "p50": 40, "p95": 40}
    # The warm-up of 0.3 s was served but does not count; nothing else is missing, not even the last requests.
    warm_up = stub.served[200] - counted
    assert 4 <= warm_up <= 4 * (0.3 / 0.05 + 2)
    row = aggregated(run)
    assert int(row["Request Count"]) == counted
    assert int(row["Failure Count"]) == 0
    assert float(row["Requests/s"]) == pytest.approx(summary["requests_per_s"], rel=0.1)
    assert float(row["Average Response Time"]) == pytest.approx(summary["latency_ms"]["mean"])
    (html,) = (row for row in run.html_rows if row["name"] == "Aggregated")
    assert html["num_requests"] == counted
    assert html["response_time_percentile_0.95"] == pytest.approx(summary["latency_ms"]["p95"], rel=0.05)
    assert "kept       p95" in run.output
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert report.count(f"{counted} right, 0 refused (429), 0 errors") == 1
    assert report.count("<body><pre style=") == 1
    assert f"{counted} right, 0 refused (429), 0 errors" in run.output
    # Real text, of many lengths.
    assert len({len(text) for text in stub.texts}) > 10


def test_errors_and_refusals_are_counted_apart(locust: Locust, stubs: list[Stub]) -> None:
    for stub in stubs[:2]:
        stub.delay_s = 0.01
        stub.headers = {"Retry-After": "0"}
        stub.status = lambda number: 500 if number % 5 == 0 else 429 if number % 5 in (1, 2) else 200
    lenient, refused = together(
        lambda: locust(stubs[0].host, "--slo-error-rate", "0.5"),
        lambda: locust(stubs[1].host, "--slo-error-rate", "0.5", "--slo-refused-rate", "0.1"),
    )
    assert lenient.code == 0, lenient.output
    for run in (lenient, refused):
        summary = run.summary
        # Of each five requests one fails and two are refused; four users in flight at both ends blur it.
        blur = max(0.05, 9 / summary["requests"])
        assert summary["error_rate"] == pytest.approx(0.2, abs=blur)
        assert summary["refused_rate"] == pytest.approx(0.4, abs=blur)
        row = aggregated(run)
        assert int(row["Request Count"]) == summary["requests"]
        assert int(row["Failure Count"]) == summary["errors"] + summary["refused"]
        with (run.folder / "out_failures.csv").open(encoding="utf-8") as file:
            failures = {line["Error"]: int(line["Occurrences"]) for line in csv.DictReader(file)}
        assert sum(count for error, count in failures.items() if "429" in error) == summary["refused"]
        assert sum(count for error, count in failures.items() if "500" in error) == summary["errors"]
    # Refusals do not count against the limit on errors, but against their own.
    assert refused.code == 1, refused.output
    assert "kept       error rate" in refused.output
    assert "MISSED     refused (429) rate" in refused.output


def test_wrong_late_and_other_answers(locust: Locust, stubs: list[Stub]) -> None:
    wrong, late, slow, own = stubs
    wrong.answer = lambda path, body: {"embeddings": [[0.5] * (DIMENSION - 1)], "usage": {"tokens": 3}}
    wrong.delay_s = 0.01
    late.delay_of = lambda number: 3.0 if number % 4 == 0 else 0.01
    # One request in ten is slow: the median is fine, the 95th percentile is not.
    slow.delay_of = lambda number: 0.3 if number % 10 == 0 else 0.01
    file = ROOT / "LICENSE"
    wrong_run, late_run, slow_run, own_run = together(
        lambda: locust(wrong.host),
        lambda: locust(late.host, "--request-timeout-s", "0.5", "--slo-p95-ms", "499", "--slo-error-rate", "0"),
        lambda: locust(slow.host, "--slo-p95-ms", "200"),
        lambda: locust(own.host, "--think-time-s", "0.1", "--texts", str(file), "--max-chars", "20", texts=()),
    )
    assert wrong_run.code == 1, wrong_run.output
    assert wrong_run.summary["good"] == 0
    assert wrong_run.summary["errors"] > 0
    assert f"expected an embedding of {DIMENSION} numbers, got {DIMENSION - 1}" in wrong_run.output
    assert "none was answered rightly" in wrong_run.output

    assert late_run.code == 1, late_run.output
    assert late_run.summary["errors"] > 0
    assert late_run.summary["latency_ms"]["max"] < 500
    assert "MISSED     error rate" in late_run.output

    assert slow_run.code == 1, slow_run.output
    assert "MISSED     p95" in slow_run.output
    assert slow_run.summary["latency_ms"]["p50"] < 200 < slow_run.summary["latency_ms"]["p95"]
    assert slow_run.summary["kept"] is False

    assert own_run.code == 0, own_run.output
    # Four users that pause 0.1 s on average: about 40 requests/s, and never the thousands of a closed loop.
    assert 10 < own_run.summary["requests_per_s"] < 80
    lines = {line.strip()[:20] for line in file.read_text(encoding="utf-8").splitlines()}
    assert set(own.texts) <= lines


def test_other_endpoints(locust: Locust, stub: Stub) -> None:
    stub.delay_s = 0.02
    tasks = {
        "predict": (),
        "token-classify": (),
        "answer": (),
        "fill-mask": (),
        "openai": ("--encoding-format", "base64"),
        "oip-pairs": (),
    }
    common = ("--inputs-per-request", "3", "--slo-error-rate", "0")
    assert set(tasks) <= set(TASKS)
    runs = together(
        *(partial(locust, stub.host, "--task", task, *common, *arguments) for task, arguments in tasks.items())
    )
    for task, run in zip(tasks, runs, strict=True):
        assert run.code == 0, run.output
        assert run.summary["path"] == TASKS[task].path.replace("{model}", "stub")
        assert run.summary["texts_per_s"] == pytest.approx(3 * run.summary["requests_per_s"])


def test_server_not_running() -> None:
    host = f"http://127.0.0.1:{free_port()}"
    process = start_locust("--host", host, "--headless", "-u", "1", "-t", "5s", *OWN_TEXTS)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert f"loadtest: no answer from {host}/ready" in output
    assert "Is the server running, and is --host right?" in output
    assert "Traceback" not in output


# What is looked at in each place; `test_options` has the others.
IMPOSSIBLE = {
    "no server to test: pass --host": [],
    "--inputs-per-request: expected at least 1": ["--host", "HOST", "--inputs-per-request", "0"],
    "cannot read texts from missing.txt": ["--host", "HOST", "--texts", "missing.txt"],
}


def test_impossible_settings_are_refused(stub: Stub) -> None:
    def refused(arguments: list[str]) -> tuple[int, str]:
        arguments = [stub.host if argument == "HOST" else argument for argument in arguments]
        process = start_locust("--headless", "-u", "1", "-t", "3s", *OWN_TEXTS, *arguments)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    results = together(*(partial(refused, arguments) for arguments in IMPOSSIBLE.values()))
    for message, (code, output) in zip(IMPOSSIBLE, results, strict=True):
        assert code == 2, output
        assert message in output
        assert "Traceback" not in output
    assert not stub.texts


def test_server_is_looked_at_first(locust: Locust, stubs: list[Stub]) -> None:
    loading, other, fine, _ = stubs
    loading.ready = 503
    other.paths = frozenset({"/api/embed"})
    fine.paths = frozenset({"/api/classify"})
    fine.delay_s = 0.02
    runs = together(*(partial(locust, stub.host, "--task", "predict") for stub in (loading, other, fine)))
    assert [run.code for run in runs] == [2, 2, 0]
    assert "is not ready" in runs[0].output
    assert "has no /api/classify (status 404): choose another --task" in runs[1].output
    assert not any("Traceback" in run.output for run in runs)
    assert not loading.texts
    assert not other.texts


@pytest.mark.long
def test_a_load_test_that_was_the_limit_is_void(locust: Locust, stubs: list[Stub]) -> None:
    """No machine sends to a stub without using a thousandth of a core; and none uses a core while its users wait."""
    stubs[0].delay_s, stubs[1].delay_s = 0.02, 0.5

    busy, idle = together(
        lambda: locust(stubs[0].host, "--max-cpu", "0.001", "--slo-p95-ms", "9000"),
        lambda: locust(stubs[1].host, "--max-cpu", "0.9", "--slo-p95-ms", "9000"),
    )
    assert busy.code == 2, busy.output
    assert "VOID       the load test used " in busy.output
    assert "of a core, more than --max-cpu 0.001: it was the limit, not the server; use more --pro" in busy.output
    assert busy.summary["kept"] is False
    assert len(busy.summary["void"]) == 1
    assert 0.001 < busy.summary["generator_cpu"] < 1.1
    assert idle.code == 0, idle.output
    assert idle.summary["generator_cpu"] < 0.9
    assert idle.summary["void"] == []


def test_master_alone_judges(stubs: list[Stub], tmp_path: Path) -> None:
    for folder in ("kept", "missed", "void"):
        (tmp_path / folder).mkdir()
    together(
        lambda: judged_by_master(stubs[0], tmp_path / "kept", "1000", 0),
        lambda: judged_by_master(stubs[1], tmp_path / "missed", "20", 1),
        lambda: judged_by_master(stubs[2], tmp_path / "void", "1000", 2, "--max-cpu", "0.001"),
    )


def judged_by_master(stub: Stub, tmp_path: Path, limit_ms: str, code: int, *more: str) -> None:
    stub.delay_s = 0.05
    port = str(free_port())
    workers = [
        start_locust("--worker", "--master-host", "127.0.0.1", "--master-port", port, *OWN_TEXTS) for _ in range(2)
    ]
    master = start_locust(
        *("--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--expect-workers", "2"),
        *("--host", stub.host, "--headless", "-u", "4", "-r", "100", "-t", "5s", "--warm-up-s", "1", "--only-summary"),
        *("--csv", str(tmp_path / "out"), "--html", str(tmp_path / "report.html"), "--slo-p95-ms", limit_ms),
        *(*OWN_TEXTS, *more),
    )
    processes = [master, *workers]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert master.returncode == code, outputs[0]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    verdict = ("kept       p95", "MISSED     p95", "VOID       worker ")[code]
    assert [output.count(verdict) for output in outputs] == [1, 0, 0]
    run = Run(master.returncode, outputs[0], tmp_path)
    assert 0 < run.summary["requests_per_s"] <= 80
    assert run.summary["errors"] == 0
    # Both workers' requests, and those of the last moment: nothing but the warm-up is missing.
    assert int(aggregated(run)["Request Count"]) == run.summary["requests"]
    assert 0 < run.summary["requests"] <= stub.served[200]
    assert run.summary["requests"] == pytest.approx(run.summary["measured_s"] * run.summary["requests_per_s"], rel=1e-3)


Processes = tuple[Program, list[Program]]


@contextlib.contextmanager
def distributed(stub: Stub, *arguments: str, run_time: str = "90s", timeout_s: float = 60) -> Iterator[Processes]:
    """A master and two workers under load, in a run that no test waits for."""
    stub.delay_s = 0.02
    port = str(free_port())
    worker = ("--worker", "--master-host", "127.0.0.1", "--master-port", port, *OWN_TEXTS)
    workers = [start_locust(*worker, heartbeat_timeout_s=timeout_s) for _ in range(2)]
    master = start_locust(
        *("--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--expect-workers", "2"),
        *("--host", stub.host, "--headless", "-u", "4", "-r", "100", "-t", run_time, "--warm-up-s", "0"),
        *("--only-summary", "--slo-p95-ms", "60000", *arguments, *OWN_TEXTS),
    )
    try:
        deadline_s = time.monotonic() + 60
        while stub.served[200] < 50 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert stub.served[200] >= 50, "no load within a minute"
        yield master, workers
    finally:
        for process in (master, *workers):
            process.kill()
            process.communicate()


def losing(stub: Stub, number: signal.Signals, reason: str) -> None:
    """Sends a signal to one of two workers: the master ends the run, which is void, and so do the others."""
    with distributed(stub) as (master, (lost, other)):
        lost.send_signal(number)
        output, _ = master.communicate(timeout=60)
        assert master.returncode == 2, output
        (line,) = (line for line in output.splitlines() if line.startswith("VOID"))
        assert reason in line
        assert line.endswith("its part of the load is missing; run the test again")
        # Whatever was counted is still shown.
        assert "kept       p95" in output
        # The other one has done nothing wrong.
        others, _ = other.communicate(timeout=60)
        assert other.returncode == 0, others
        if number == signal.SIGTERM:
            printed, _ = lost.communicate(timeout=60)
            assert lost.returncode == 2, printed
            assert "this worker leaves before its master has ended the run" in printed


def losing_the_master(stub: Stub) -> None:
    with distributed(stub, timeout_s=3) as (master, workers):
        master.kill()
        for worker in workers:
            output, _ = worker.communicate(timeout=60)
            assert worker.returncode == 2, output
            assert "this worker leaves before its master has ended the run" in output


def losing_at_the_end(stub: Stub) -> None:
    """Halted so late that the master hears of it only by the last report that does not come."""
    with distributed(stub, run_time="8s") as (master, (lost, _)):
        lost.send_signal(signal.SIGSTOP)
        output, _ = master.communicate(timeout=60)
        assert master.returncode == 2, output
        assert output.count("VOID       worker ") == 1, output


@pytest.mark.long
def test_a_lost_worker_makes_the_run_void(stubs: list[Stub]) -> None:
    together(
        lambda: losing(stubs[0], signal.SIGKILL, "was not heard of for 10 s"),
        lambda: losing(stubs[1], signal.SIGTERM, "left during the run"),
        lambda: losing_at_the_end(stubs[2]),
    )


def test_a_lost_master_and_a_missing_worker(stubs: list[Stub]) -> None:
    def too_few() -> None:
        port = str(free_port())
        master = start_locust(
            *("--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--expect-workers", "2"),
            *("--expect-workers-max-wait", "2", "--host", stubs[0].host, "--headless", "-t", "5s", *OWN_TEXTS),
        )
        output, _ = master.communicate(timeout=120)
        assert master.returncode == 2, output
        assert "loadtest: expected 2 workers within 2 s, got 0: do the others run" in output
        assert "Traceback" not in output

    together(lambda: losing_the_master(stubs[1]), too_few)
    assert not stubs[0].texts


def test_interrupting_master_and_workers_still_gives_a_verdict(stub: Stub) -> None:
    """As Ctrl-C does in a terminal, with --processes or in one shell."""
    with distributed(stub) as (master, workers):
        for process in (*workers, master):
            process.send_signal(signal.SIGINT)
        output, _ = master.communicate(timeout=60)
        assert master.returncode == 0, output
        assert "kept       p95" in output
        assert "VOID" not in output


def test_interrupt_still_gives_a_verdict(stub: Stub) -> None:
    stub.delay_s = 0.02
    process = start_locust(
        *("--host", stub.host, "--headless", "-u", "2", "-r", "10", "--warm-up-s", "0", "--slo-p95-ms", "1"),
        *OWN_TEXTS,
    )
    deadline_s = time.monotonic() + 30
    while stub.served[200] < 20 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 1, output
    assert "MISSED     p95" in output
