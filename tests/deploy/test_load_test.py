"""The load test against the real server: every endpoint, and a server that is too small for its load."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "loadtest"))

from stub_server import OWN_TEXTS, ROOT, Run, start_locust


@contextlib.contextmanager
def server(bundle: Path, variant: str, *arguments: str) -> Iterator[str]:
    """A running server; gives its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy", "serve", str(bundle), "--variant", variant, "--port", "0", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        lines = []
        found = None
        # Ends by itself: the pipe closes if the server dies, and the test has a time limit.
        for line in process.stdout:
            lines.append(line)
            if found := re.match(r"serving .* on (http://\S+)", line):
                break
        assert found, "".join(lines)
        yield found.group(1)
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def load(host: str, folder: Path, *arguments: str) -> Run:
    process = start_locust(
        *("--host", host, "--headless", "-u", "8", "-r", "100", "-t", "3s", "--warm-up-s", "0.5", "--only-summary"),
        *("--csv", str(folder / "out"), "--html", str(folder / "report.html"), *OWN_TEXTS, *arguments),
    )
    try:
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    return Run(process.returncode, output, folder)


def served(host: str, path: str) -> float:
    """How many requests with status 200 the server's own metrics count."""
    with urllib.request.urlopen(f"{host}/metrics", timeout=10) as response:
        text = response.read().decode()
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if "requests_total{" in line and f'"{path}"' in line and '"200"' in line
    )


def test_embeddings(minilm_bundle: Path, tmp_path: Path) -> None:
    tasks = {"embed": ("--inputs-per-request", "2"), "openai": ("--encoding-format", "base64")}
    runs = []
    with server(minilm_bundle, "torch_ext-bf16") as host:
        for task, arguments in tasks.items():
            folder = tmp_path / task
            folder.mkdir()
            runs.append(load(host, folder, "--task", task, "--slo-error-rate", "0", *arguments))
        counted = served(host, "/api/embed")
    for run in runs:
        assert run.code == 0, run.output
        assert run.summary["requests_per_s"] > 0
        assert run.summary["tokens_per_s"] > run.summary["texts_per_s"]
        assert set(run.summary["server_ms"]) == {"tokenize", "queue", "infer"}
        # What happens inside the server is part of what the client waits for.
        inside_ms = sum(stage["mean"] for stage in run.summary["server_ms"].values())
        assert 0 < inside_ms < run.summary["latency_ms"]["mean"]
    embed = runs[0].summary
    assert embed["texts_per_s"] == pytest.approx(2 * embed["requests_per_s"])
    # Two requests try the endpoint first, and those of the warm-up do not count: the server has seen all the others.
    assert embed["requests"] <= counted - 2


# The mask tokens of the two families differ.
@pytest.mark.parametrize(
    ("task", "model_task", "model_type"),
    [
        pytest.param("predict", "text-classification", "bert", marks=pytest.mark.long),
        ("fill-mask", "fill-mask", "roberta"),
    ],
)
def test_other_tasks(
    tiny_bundle: Callable[[str, str], Path], tmp_path: Path, task: str, model_task: str, model_type: str
) -> None:
    with server(tiny_bundle(model_type, model_task), "torch_ext-bf16") as host:
        run = load(host, tmp_path, "--task", task, "--slo-error-rate", "0", "--slo-p95-ms", "10000")
        wrong = load(host, tmp_path, "--task", "embed")
    assert run.code == 0, run.output
    assert run.summary["tokens_per_s"] > 0
    assert wrong.code == 2, wrong.output
    assert "/api/embed" in wrong.output


def test_full_queue_is_refused_not_failed(minilm_bundle: Path, tmp_path: Path) -> None:
    limits = ("--max-batch-tokens", "256", "--max-queue-tokens", "256", "--threads", "1")
    with server(minilm_bundle, "torch_ext-fp32", *limits) as host:
        run = load(host, tmp_path, "--inputs-per-request", "8", "--slo-error-rate", "0")
    assert run.code == 0, run.output
    assert run.summary["refused"] > 0
    assert run.summary["errors"] == 0
