"""A small HTTP server that behaves as it is told, and Locust in a process of its own."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from right_answers import MASK_TOKEN, right_answer, texts_of

from loadtest.tasks import TASKS, Traits
from tests import warm
from tests.warm import Program

ROOT = Path(__file__).resolve().parents[2]

OWN_TEXTS = ("--texts", str(ROOT / "LICENSE"))
"""Arguments that spare a run the seconds in which it reads the standard library."""


@dataclass
class Stub:
    """A server on a free port of this machine, whose behaviour can be changed while it runs.

    Attributes:
        delay_s: How long each answer takes.
        delay_of: Like `delay_s`, but for the nth request (from 0) of the load; None if all are alike.
        status: Status of the nth request of the load.
        answer: Body of an answer with status 200.
        ready: Status of GET /ready.
        paths: Endpoints that there are.
        headers: Sent with each answer to POST.
        served: How many requests of the load were answered, by status.
        texts: Every text that was received.
    """

    delay_s: float = 0.0
    delay_of: Callable[[int], float] | None = None
    status: Callable[[int], int] = lambda n: 200
    answer: Callable[[str, dict[str, Any]], Any] = right_answer
    ready: int = 200
    paths: frozenset[str] = frozenset(task.path_at(Traits("stub")) for task in TASKS.values())
    headers: dict[str, str] = field(default_factory=dict)
    served: Counter[int] = field(default_factory=Counter)
    texts: list[str] = field(default_factory=list)
    port: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _count: int = 0

    @property
    def host(self) -> str:
        """Address for ``--host``."""
        return f"http://127.0.0.1:{self.port}"

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """A handler class that asks this object what to do."""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_request(self, *args: Any) -> None:
                """Prints nothing."""

            def reply(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                for name, value in stub.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                if self.path == "/ready":
                    self.reply(stub.ready, b"{}")
                elif self.path == "/v1/models":
                    models = {"data": [{"id": "stub", "object": "model"}]}
                    self.reply(200, json.dumps(models).encode())
                else:
                    self.reply(404, b"{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path not in stub.paths:
                    self.reply(404, b"{}")
                    return
                texts = texts_of(body)
                assert self.path != "/v1/embeddings" or body["model"] == "stub"
                if self.path == "/api/fill-mask" and any(text.count(MASK_TOKEN) != 1 for text in texts):
                    self.reply(422, b"{}")
                    return
                # The load test tries the endpoint before the load.
                if texts in (["a text"], [f"a {MASK_TOKEN} text"]):
                    self.reply(200, json.dumps(right_answer(self.path, body)).encode())
                    return
                with stub._lock:
                    number = stub._count
                    stub._count += 1
                    stub.texts.extend(texts)
                time.sleep(stub.delay_of(number) if stub.delay_of else stub.delay_s)
                status = stub.status(number)
                with stub._lock:
                    stub.served[status] += 1
                answer = stub.answer(self.path, body) if status == 200 else {"error": {"type": "x", "message": "x"}}
                self.reply(status, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        return Handler


class StubServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves early is no error of the stub's; anything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def free_port() -> int:
    """A port of this machine that nobody listens on right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Run:
    """A Locust process that has ended.

    Attributes:
        code: Its exit code.
        output: What it printed, standard error included.
        folder: Where its CSV and HTML lie, under the prefix ``out``.
    """

    code: int
    output: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """The load test's own numbers."""
        loaded: dict[str, Any] = json.loads((self.folder / "out_summary.json").read_text(encoding="utf-8"))
        return loaded

    @property
    def html_rows(self) -> list[dict[str, Any]]:
        """The table of requests inside the HTML report."""
        page = (self.folder / "report.html").read_text(encoding="utf-8")
        found = re.search(r"window\.templateArgs\s*=\s*(\{.*?\})\s*;?\s*(?:window|</script>)", page, re.DOTALL)
        assert found, "the HTML report has no data"
        rows: list[dict[str, Any]] = json.loads(found.group(1))["requests_statistics"]
        return rows


def start_locust(*arguments: str, heartbeat_timeout_s: float = 60) -> Program:
    """Starts Locust with this repository's load test; the caller ends it.

    Args:
        arguments: Locust's. Without --max-cpu, no run is void on a machine that is slower than the stub.
        heartbeat_timeout_s: After how long a worker gives its master up; Locust has no option for it.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    program = (
        "import gevent; gevent.reinit(); "  # its loop is from before the fork
        "from locust import main, runners; "
        f"runners.MASTER_HEARTBEAT_TIMEOUT = {heartbeat_timeout_s}; main.main()"
    )
    locustfile = str(ROOT / "loadtest" / "locustfile.py")
    if "--max-cpu" not in arguments:
        arguments = (*arguments, "--max-cpu", "inf")
    return warm.python("locust.main").start(
        *("-c", program, "-f", locustfile, *arguments), env=environment, cwd=ROOT.parent, merged=True
    )


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Calls functions at the same time, and gives their results in order; a run mostly waits."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
