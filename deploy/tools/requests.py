"""Requests to a server of a variant, which is started for them on a free port of this machine."""

from __future__ import annotations

import http.client
import json
import re
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
from deploy.server.api import ROUTES
from deploy.tools.command import ToolError

__all__ = ["Answered", "serve_and_ask", "usual_request"]

_START_S = 120.0
_DURATION = re.compile(r";\s*dur=([0-9.]+)")
"""A stage's milliseconds in a `Server-Timing` header."""


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
        path, body = usual_request(manifest, text)
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


def usual_request(manifest: Manifest, text: str) -> tuple[str, bytes]:
    """Path and body of an ordinary request: the example of the first route of the task, with the text in it.

    Args:
        manifest: The bundle.
        text: What is asked for.
    """
    route = next(route for route in ROUTES if route.method == "POST" and route.task == manifest.task)
    mask = manifest.special_tokens.get("mask")
    if mask is not None and "{mask}" in json.dumps(route.example):
        text = f"{mask.token} {text}"
    given = route.example["inputs"]
    inputs: Any = {**given, "context": text} if isinstance(given, Mapping) else text
    return route.path, json.dumps({**route.example, "inputs": inputs}).encode()


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
            stages = _DURATION.findall(response.getheader("server-timing") or "")
            found.append((total, max(0.0, total - sum(map(float, stages)))))
    finally:
        connection.close()
    return found
