"""Sends requests over connections that are kept, as many as there are requests under way."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from .clock import Clock
from .http import Answer, AnswerError, Reader

__all__ = ["Client", "HttpClient", "Prepared"]

_SWEEP_S = 0.1
"""How often requests are looked for that have waited for too long."""


@dataclass(frozen=True)
class Prepared:
    """A request as it is sent; made before the load begins, since making it takes longer than sending it.

    Attributes:
        data: Head and body.
        texts: How many texts it has.
    """

    data: bytes
    texts: int


class Client(Protocol):
    """What sends requests: over sockets, or into a simulated server."""

    def send(self, request: Prepared, done: Callable[[Answer], None]) -> None:
        """Sends a request, and calls `done` with what came back, later."""


class _Pending:
    """A request that is under way."""

    __slots__ = ("connection", "deadline_s", "done", "request", "retried")

    def __init__(self, request: Prepared, done: Callable[[Answer], None], deadline_s: float) -> None:
        self.request = request
        self.done = done
        self.deadline_s = deadline_s
        self.retried = False
        self.connection: _Connection | None = None


class _Connection(asyncio.Protocol):
    """One connection; it carries one request at a time."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._reader = Reader()
        self._transport: asyncio.Transport | None = None
        self.pending: _Pending | None = None
        self.used = False
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._client.remember(self)

    def send(self, pending: _Pending) -> None:
        assert self._transport is not None
        self.pending, pending.connection = pending, self
        self._transport.write(pending.request.data)

    def data_received(self, data: bytes) -> None:
        try:
            answer = self._reader.feed(data)
        except AnswerError as error:
            answer = Answer(failure=str(error))
        if answer is not None:
            self._finish(answer, reuse=self._reader.keep_alive and not answer.failure)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self.pending is not None:
            # The server closed a connection that had been idle just as the request was sent: not an error of either.
            idle = self.used and not self._reader.started
            reason = str(error or "") or "the server closed it"
            self._finish(self._reader.finish(), reuse=False, idle=idle, reason=reason)
        self._client.forget(self)

    def _finish(self, answer: Answer | None, *, reuse: bool, idle: bool = False, reason: str = "") -> None:
        pending, self.pending = self.pending, None
        self.used = True
        if not reuse:
            self.abort()
        if pending is None:
            self.abort()  # An answer that nobody asked for.
            return
        pending.connection = None
        if answer is None and idle and not pending.retried:
            pending.retried = True
            self._client.again(pending)
            return
        if reuse:
            self._client.release(self)
        self._client.finish(pending, answer or Answer(failure=f"connection lost: {reason}"))

    def abort(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


class HttpClient:
    """Sends requests to one server.

    Attributes:
        waited: How many requests found no free connection and could not open one: the generator's limit.
        peak: Most requests under way at a time.
    """

    def __init__(
        self,
        host: str,
        *,
        clock: Clock,
        max_connections: int,
        timeout_s: float,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(host)
        self._secure = parts.scheme == "https"
        self._address = parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._trust = (trust or ssl.create_default_context()) if self._secure else None
        self._clock = clock
        self._max_connections = max_connections
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._connections: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[_Pending] = deque()
        # In the order of their deadlines, since all have the same time.
        self._pending: dict[_Pending, None] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self.waited = 0
        self.peak = 0

    @property
    def in_flight(self) -> int:
        """Requests without an answer."""
        return len(self._pending)

    async def start(self, connections: int) -> None:
        """Opens connections ahead of the load.

        Args:
            connections: How many.

        Raises:
            OSError: The server cannot be reached.
        """
        self._sweeper = asyncio.create_task(self._sweep())
        opened = await asyncio.gather(*(self._open() for _ in range(min(connections, self._max_connections))))
        self._idle += opened

    async def close(self) -> None:
        """Closes everything."""
        tasks = [task for task in (self._sweeper, *self._opening) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._connections):
            connection.abort()
        # Transports close in the next turn of the loop, those of TLS in the one after.
        for _ in range(3):
            await asyncio.sleep(0)

    def send(self, request: Prepared, done: Callable[[Answer], None]) -> None:
        """Sends a request; the time that its answer may take begins now."""
        pending = _Pending(request, done, self._clock.time() + self._timeout_s)
        self._pending[pending] = None
        self.peak = max(self.peak, len(self._pending))
        self._dispatch(pending)

    def _dispatch(self, pending: _Pending) -> None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                connection.send(pending)
                return
        if len(self._connections) + len(self._opening) < self._max_connections:
            task = asyncio.get_running_loop().create_task(self._connect_for(pending))
            self._opening.add(task)
        else:
            self.waited += 1
            self._waiting.append(pending)

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(self),
            self._address,
            self._port,
            ssl=self._trust,
            server_hostname=self._address if self._secure else None,
        )
        return connection

    async def _connect_for(self, pending: _Pending) -> None:
        try:
            connection = await self._open()
        except OSError as error:
            self.finish(pending, Answer(failure=f"no connection: {error.strerror or error}"))
            return
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._opening.discard(task)
            self._fill()
        if pending in self._pending:
            connection.send(pending)
        else:
            self.release(connection)

    def release(self, connection: _Connection) -> None:
        """Takes a connection back that has done its request."""
        while self._waiting:
            pending = self._waiting.popleft()
            if pending in self._pending:
                connection.send(pending)
                return
        self._idle.append(connection)

    def remember(self, connection: _Connection) -> None:
        """Notes that a connection is open."""
        self._connections.add(connection)

    def forget(self, connection: _Connection) -> None:
        """Notes that a connection is gone."""
        self._connections.discard(connection)
        self._fill()

    def _fill(self) -> None:
        """Opens connections for requests that wait for one."""
        while self._waiting and len(self._connections) + len(self._opening) < self._max_connections:
            pending = self._waiting.popleft()
            if pending in self._pending:
                self._dispatch(pending)

    def again(self, pending: _Pending) -> None:
        """Sends a request over another connection."""
        if pending in self._pending:
            self._dispatch(pending)

    def finish(self, pending: _Pending, answer: Answer) -> None:
        """Gives an answer to who waits for it, unless that was given up."""
        if pending in self._pending:
            del self._pending[pending]
            answer.received_s = self._clock.time()
            pending.done(answer)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now_s = self._clock.time()
            while self._pending and (pending := next(iter(self._pending))).deadline_s <= now_s:
                connection, pending.connection = pending.connection, None
                self.finish(pending, Answer(failure=f"no answer within {self._timeout_s:g} s"))
                if connection is not None:
                    connection.pending = None
                    connection.abort()
