"""Requests to a server of a variant, which is started for them on a free port of this machine."""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from deploy.bundle import Manifest
from deploy.tools.command import ToolError
from loadtest.measure import parse_server_timing
from loadtest.tasks import TASKS, Traits, insert_mask

__all__ = ["Answered", "serve_and_ask"]

_START_S = 120.0
_TASKS: Mapping[str, str] = {
    "feature-extraction": "embed",
    "text-classification": "predict",
    "token-classification": "token-classify",
    "question-answering": "answer",
    "fill-mask": "fill-mask",
}
"""What the load test calls the task of a bundle; sparse vectors have a route that it does not know."""


@dataclass(frozen=True)
class Answered:
    """What clients saw.

    Attributes:
        latency_ms: Median of one client that waits for each answer.
        outside_ms: What of that is neither tokenizer, nor queue, nor model.
        per_s: Answers per second to several clients at once.
        clients: How many they were.
    """

    latency_ms: float
    outside_ms: float
    per_s: float
    clients: int


def serve_and_ask(manifest: Manifest, variant: str, text: str, workers: int, threads: int, seconds: float) -> Answered:
    """Serves a variant, asks it for `seconds` by one client and by several, and stops it.

    Args:
        manifest: The bundle, or a model's folder.
        variant: Name of the variant.
        text: What is asked for.
        workers: Processes that serve.
        threads: Threads of each.
        seconds: How long, each.

    Raises:
        ToolError: The server does not start, or answers with an error.
    """
    with _server(manifest, variant, workers, threads) as port:
        path, body = _request(manifest, text)
        alone = _ask(port, path, body, seconds, least=5)
        clients = 4 * workers
        together: list[list[tuple[float, float]]] = []
        start = time.perf_counter()
        tasks = [
            threading.Thread(target=lambda: together.append(_ask(port, path, body, seconds)), daemon=True)
            for _ in range(clients)
        ]
        for task in tasks:
            task.start()
        for task in tasks:
            task.join()
        elapsed = time.perf_counter() - start
    if not together:
        raise ToolError(f"{variant}: the server gave no answer to {clients} clients at once")
    latency = median(total for total, _ in alone)
    return Answered(latency, median(outside for _, outside in alone), sum(map(len, together)) / elapsed, clients)


@contextmanager
def _server(manifest: Manifest, variant: str, workers: int, threads: int) -> Iterator[int]:
    command = [sys.executable, "-m", "deploy", "serve", str(manifest.root), "--variant", variant, "--port", "0"]
    command += ["--host", "127.0.0.1", "--threads", str(threads)]
    if workers > 1:
        command += ["--workers", str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    timer = threading.Timer(_START_S, process.kill)
    timer.start()
    try:
        port = None
        for line in process.stdout:
            place = line.find("http://127.0.0.1:")
            if place >= 0:
                port = int("".join(_digits(line[place + len("http://127.0.0.1:") :])))
                break
        timer.cancel()
        if port is None:
            said = process.stderr.read().strip().splitlines()
            raise ToolError(f"{variant}: the server does not start: {said[-1] if said else 'it says nothing'}")
        yield port
    finally:
        timer.cancel()
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _digits(text: str) -> Iterator[str]:
    for character in text:
        if not character.isdigit():
            return
        yield character


def _request(manifest: Manifest, text: str) -> tuple[str, bytes]:
    """Path and body of an ordinary request."""
    if manifest.task not in _TASKS:
        return "/embed_sparse", json.dumps({"inputs": text}).encode()
    task = TASKS[_TASKS[manifest.task]]
    mask = manifest.special_tokens.get("mask")
    traits = Traits(mask_token=None if mask is None else mask.token)
    if task.needs_mask:
        text = insert_mask(text, traits.mask_token or "", random.Random(0))
    return task.path, task.body([text], traits)


def _ask(port: int, path: str, body: bytes, seconds: float, least: int = 1) -> list[tuple[float, float]]:
    """Asks on one connection; of each answer its time, and the part of it outside of the server's stages, in ms."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    found: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    try:
        while len(found) < least or time.perf_counter() < end:
            start = time.perf_counter()
            connection.request("POST", path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            total = 1e3 * (time.perf_counter() - start)
            if response.status != 200:
                raise ToolError(
                    f"the server answered {response.status} to {path}: {answer[:200].decode(errors='replace')}"
                )
            stages: Any = parse_server_timing(response.getheader("server-timing"))
            found.append((total, max(0.0, total - sum(stages.values()))))
    finally:
        connection.close()
    return found
