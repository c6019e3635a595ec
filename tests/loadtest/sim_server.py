"""A small asyncio server in a thread, with a known service time, pauses, TLS and dialects as wanted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from right_answers import right_answer


@dataclass
class Simulated:
    """What the server does; may be changed while it runs.

    Attributes:
        service_s: How long an answer takes.
        paused: Whether the server stands still, given the seconds since it began.
        status: Status of an answer, given how many requests came before.
        headers: Further headers of an answer.
        served: Answers by path.
        authorized: The ``Authorization`` headers that came.
    """

    service_s: float = 0.0
    paused: Callable[[float], bool] = lambda now_s: False
    status: Callable[[int], int] = lambda number: 200
    headers: bytes = b""
    served: Counter[str] = field(default_factory=Counter)
    authorized: set[str] = field(default_factory=set)
    chunked: bool = False
    close_each: bool = False
    host: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path, _ = head.split(" ", 2)
                headers = {
                    name.strip().lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
                }
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                status, answer = await self.answer(method, path, headers, content)
                writer.write(self.encode(status, answer))
                if self.close_each and method == "POST":
                    break

    def encode(self, status: int, answer: Any) -> bytes:
        body = json.dumps(answer).encode()
        head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n%b" % (status, self.headers)
        if self.chunked:
            half = len(body) // 2
            parts = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]) if part)
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n"
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)

    async def answer(self, method: str, path: str, headers: dict[str, str], content: bytes) -> tuple[int, Any]:
        if method == "GET":
            return (200, {"data": [{"id": "stub"}]}) if path == "/v1/models" else (200, {})
        if b'["a text"]' in content:  # The load test tries the endpoint before the load.
            return 200, right_answer(path, json.loads(content))
        number = self.served.total()
        self.served[path] += 1
        self.authorized.add(headers.get("authorization", ""))
        if self.service_s:
            await asyncio.sleep(self.service_s)
        while self.paused(time.monotonic()):
            await asyncio.sleep(0.002)
        status = self.status(number)
        return status, right_answer(path, json.loads(content)) if status == 200 else {}


@contextlib.contextmanager
def simulated(certificate: ssl.SSLContext | None = None, **behaviour: Any) -> Iterator[Simulated]:
    """A running server on a free port of this machine."""
    server = Simulated(**behaviour)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=certificate, backlog=1000)
        scheme = "https" if certificate else "http"
        server.host = f"{scheme}://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        listener.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # Transports close in the turns that follow.

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
