"""The client of `serving.py`: a closed loop on raw sockets, and the CPU time that the server took meanwhile."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_UP_S = 1.5
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass
class Load:
    """What one server did in one round.

    Attributes:
        name: Which server.
        requests_per_s: Answers with status 200 in the measured interval, per second.
        p50_ms: Median latency.
        p95_ms: 95th percentile.
        cpu_us: CPU time of the server's processes per text.
        client_cpu_us: CPU time of the client per text.
    """

    name: str
    requests_per_s: float
    p50_ms: float
    p95_ms: float
    cpu_us: float
    client_cpu_us: float


def processes(pid: int) -> dict[int, int]:
    """CPU time of a process and of those that it has started, by their ids, in ticks, with what has ended in them."""
    parents: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # It has ended.
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
            ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    found: dict[int, int] = {}
    left = [pid]
    while left:
        process = left.pop()
        found[process] = ticks.get(process, 0)
        left += parents.get(process, [])
    return found


def cpu_s(pid: int) -> float:
    """User and system time of a process and of those that it has started."""
    return sum(processes(pid).values()) * TICK_S


class Connection(asyncio.Protocol):
    """Sends the next request as soon as the last is answered."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.buffer = b""
        self.sent_s = 0.0
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self.transport = transport
        self.send()

    def send(self) -> None:
        """Sends one request."""
        self.sent_s = time.perf_counter()
        self.transport.write(self.client.next())

    def data_received(self, data: bytes) -> None:
        """Part of an answer, or all of it."""
        self.buffer = self.buffer + data if self.buffer else data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        match = re.search(rb"content-length: *(\d+)", head)
        chunked = b"transfer-encoding: chunked" in head
        if (match is None and not chunked) or not self.buffer.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
            self.client.fail(f"unexpected answer: {self.buffer[:300]!r}")
            return
        if self.buffer.endswith(b"\r\n0\r\n\r\n") if match is None else len(self.buffer) >= end + 4 + int(match[1]):
            self.client.latencies_s.append(time.perf_counter() - self.sent_s)
            self.buffer = b""
            self.client.done(self, head.startswith(b"http/1.1") and b"connection: close" not in head)

    def connection_lost(self, error: Exception | None) -> None:
        """Closed, by either side."""
        self.client.lost(error)


class Client:
    """A closed loop of a number of connections."""

    def __init__(self, port: int, requests: Sequence[bytes], connections: int) -> None:
        self.port = port
        self.requests = requests
        self.connections = connections
        self.latencies_s: list[float] = []
        self.position = 0
        self.stopping = False
        self.failure: str | None = None

    def next(self) -> bytes:
        """The next request."""
        self.position += 1
        return self.requests[self.position % len(self.requests)]

    def fail(self, message: str) -> None:
        """Remembers what went wrong."""
        self.failure = self.failure or message

    def done(self, connection: Connection, keep_alive: bool) -> None:
        """An answer has come: the next request goes over the same connection, or over a new one."""
        if self.stopping or not keep_alive:
            connection.transport.close()
        else:
            connection.send()

    def lost(self, error: Exception | None) -> None:
        """A connection has ended."""
        if not self.stopping:
            asyncio.get_running_loop().create_task(self.connect())

    async def connect(self) -> None:
        """Opens one connection."""
        await asyncio.get_running_loop().create_connection(lambda: Connection(self), "127.0.0.1", self.port)

    async def run(self, name: str, pid: int, seconds: float) -> Load:
        """Warms up, then measures."""
        for _ in range(self.connections):
            await self.connect()
        await asyncio.sleep(WARM_UP_S)
        self.latencies_s.clear()
        server, client, begun_s = cpu_s(pid), time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        # A slow server gets up to five times as long to answer every connection once.
        while len(self.latencies_s) < self.connections and time.perf_counter() - begun_s < 5 * seconds:
            await asyncio.sleep(0.2)
        count = len(self.latencies_s)
        server, client, took_s = cpu_s(pid) - server, time.process_time() - client, time.perf_counter() - begun_s
        self.stopping = True
        if self.failure or not count:
            raise SystemExit(f"{name}: {self.failure or 'no answer at all'}")
        latencies = sorted(self.latencies_s[:count])
        return Load(
            name=name,
            requests_per_s=count / took_s,
            p50_ms=1e3 * latencies[count // 2],
            p95_ms=1e3 * latencies[int(0.95 * count)],
            cpu_us=1e6 * server / count,
            client_cpu_us=1e6 * client / count,
        )
