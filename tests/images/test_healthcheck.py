"""The health check against servers that answer, refuse, hang up, or are not there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "dockerfiles" / "healthcheck.py"


@contextmanager
def server(answer: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A server for one connection: reads a request, sends the answer, closes. Yields its port and what it read."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                requests.append(connection.recv(65536))
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], requests
        thread.join()


def run(port: int) -> subprocess.CompletedProcess[str]:
    """The check as the image runs it."""
    return subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT)],
        env={**os.environ, "PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_ready() -> None:
    with server(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") as (port, requests):
        result = run(port)
    assert (result.returncode, result.stderr) == (0, "")
    assert requests[0].startswith(b"GET /ready HTTP/1.1\r\nHost: ")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        b"SSH-2.0-200 200\r\n",
        b"200\r\n",
        b"",
    ],
    ids=["loading", "other", "ssh", "bare", "empty"],
)
def test_not_ready(answer: bytes) -> None:
    with server(answer) as (port, _):
        result = run(port)
    assert result.returncode == 1
    assert result.stderr.startswith(f"port {port} answers ")
    assert result.stderr.endswith("expected 200\n")


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = run(port)
    assert result.returncode == 1
    assert f"no answer on port {port}" in result.stderr
