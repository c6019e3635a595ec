"""uvicorn's HTTP protocol with bounds on headers and time, and news of lost clients.

docs/http-layer.md says why it is uvicorn, and what each part of this class makes up for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from ..errors import ApiError, error_body
from ..limits.bounds import MAX_HEADER_BYTES, MAX_HEADERS, MAX_PIPELINED, MAX_PIPELINED_BYTES, Settings, exceeded
from ..limits.callers import Caller
from .dropped import drop
from .unread import Reading, is_reset, outlive, will_reset
from .writer import Writer

__all__ = ["MAX_HEADERS", "MAX_HEADER_BYTES", "HttpProtocol"]

PROBE_AFTER_S = 1.0
"""How long after the end of what a client sends it is asked whether it still reads."""

PROBE_EVERY_S = 5.0
"""How often, after that."""

LINGER_S = 2.0
"""How long what a refused client still sends is dropped before its connection is closed: a close with unread bytes
would reset the connection, and the client might never see the answer."""

_RESET_IS_HERE_S = 0.25


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    The application finds two things in a request's scope: `deploy.headers`, a dict of its headers, and
    `deploy.caller`, its `Caller`.

    Attributes:
        receiving_since_s: When the request began that is not complete yet, or the connection that has not sent any;
            None while nothing is expected. By `time.monotonic`.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state, _loop=_loop)
        self.receiving_since_s: float | None = None
        self._in_message = False
        self._in_head = False
        self._framing_bytes = 0
        self._refusal: ApiError | None = None
        self._offer: dict[bytes, bytes] | None = None
        self._replaying = False
        self._earlier: list[RequestResponseCycle] = []
        self._dropping = False
        self._dropped_bytes = 0
        self._idle_since_s: float | None = None
        self._lingering_since_s: float | None = None
        self._pipelined_bytes = 0
        self._paused = False
        self._refused = False
        self._reading = Reading()
        self._outlives = True

    _writer = Writer

    @property
    def idle(self) -> bool:
        """Whether no request is being received or answered."""
        return not self._in_message and (self.cycle is None or self.cycle.response_complete)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of answers that the client has not taken yet."""
        return 0 if self.transport.is_closing() else self.transport.get_write_buffer_size()

    def _unanswered(self) -> list[RequestResponseCycle]:
        """Requests whose answers are not complete, in their order."""
        return [cycle for cycle in (*self._earlier, self.cycle) if cycle is not None and not cycle.response_complete]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self.receiving_since_s = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone: so is whoever waits for answers to the requests on it."""
        for cycle in self._unanswered():
            _leave(cycle)
        if exc is None and self._outlives:
            settings = getattr(self.app, "settings", Settings)
            outlive(self.transport.get_extra_info("socket"), settings.response_timeout_s, self.loop)
        super().connection_lost(exc)
        self.cycle = None  # type: ignore[assignment]
        self.pipeline.clear()
        self._earlier = []

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends nothing more: it has left, or it only says so and reads on (a half-close).

        Returns:
            Whether the connection stays open, for answers.
        """
        if not self.stop_receiving() or self.scheme == "https":  # TLS ends for both at once.
            return False
        self.loop.call_later(PROBE_AFTER_S, self._probe)
        return True

    def _probe(self) -> None:
        """Asks a client that sends nothing more whether it still reads, by an interim answer.

        The end of what it sends looks the same whether it has left or reads on. Bytes for somebody who has left are
        answered with a reset; a client that reads skips interim answers (RFC 9110, 15.2).
        """
        waiting = self._unanswered()
        if self.transport.is_closing() or not waiting:
            return
        if waiting[0].scope["http_version"] == "1.0":  # It knows no interim answers.
            self.transport.abort()
            return
        if not waiting[0].response_started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.loop.call_later(_RESET_IS_HERE_S, self._hear)

    def _hear(self) -> None:
        """Closes the connection if the client has reset it; nothing is read any more, so nobody else hears of it."""
        if self.transport.is_closing():
            return
        if is_reset(self.transport):
            self.transport.abort()
        else:
            self.loop.call_later(PROBE_EVERY_S, self._probe)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        if self._dropping:
            self._dropped_bytes = drop(self._dropped_bytes + len(data), self.flow, self.transport, self.loop)
            return
        self._idle_since_s = None
        self._framing_bytes += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stop:
                self._ignore_offers(data, stop)
        except httptools.HttpParserError:
            if not self._dropping:
                self.send_400_response("expected HTTP/1.1, got something else")
            return
        if self._in_message:
            if self._framing_bytes > MAX_HEADER_BYTES:
                self._refuse(_headers_too_large("header_bytes", MAX_HEADER_BYTES))
        elif (
            self.receiving_since_s is None and self.cycle.response_complete
        ):  # Empty lines, or so: a request has to follow.
            self.receiving_since_s = time.monotonic()
        if self.pipeline:
            self._pipelined_bytes += len(data)
            if self._pipelined_bytes > MAX_PIPELINED_BYTES:
                self.flow.pause_reading()
        else:
            self._pipelined_bytes = 0

    def _ignore_offers(self, data: bytes, stop: httptools.HttpParserUpgrade | None) -> None:
        """Goes on where the parser stopped, at a request that offers another protocol.

        Java's client offers HTTP/2 in its first request. What follows the headers would be that protocol if a server
        took the offer; it may ignore it, and this one has HTTP/1.1 only. The parser starts again after a stop, so it is
        shown a head of a request with the same kind of body before that body.
        """
        while stop is not None:
            data = data[stop.args[0] :]
            headers, self._offer = self._offer or {}, None
            self._replaying = True
            self.parser.feed_data(_same_body(headers))
            self._replaying = False
            stop = None
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as another:
                stop = another

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        if self._replaying:
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self.stop_receiving()
            raise _EnoughError
        self.receiving_since_s = time.monotonic()
        self._in_message = True
        self._in_head = True
        super().on_message_begin()
        self.scope["deploy.caller"] = Caller()  # type: ignore[typeddict-unknown-key]

    def on_header(self, name: bytes, value: bytes) -> None:
        """One line of headers or trailers; as in the base class, but 40,000 in one read would take 0.1 s."""
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        if len(self.headers) > MAX_HEADERS and not self._replaying:
            self._refusal = _headers_too_large("headers", MAX_HEADERS)
            raise self._refusal

    def on_headers_complete(self) -> None:
        """The headers are there; the application starts."""
        if self._replaying:
            return
        headers = dict(self.headers)
        if self._framing_bytes > MAX_HEADER_BYTES or b"host" not in headers or b"transfer-encoding" in headers:
            self._check(headers)
        if self.url[:1] not in b"/*":  # A proxy's form, whose path may be empty (RFC 9112, 3.2.2).
            head, mark, query = self.url.partition(b"?")
            self.url = head + b"/" * (head.count(b"/") == 2) + mark + query
        self._in_head = False
        if self.parser.should_upgrade():
            self._offer = headers
        self._framing_bytes = self._dropped_bytes = 0
        self.scope["deploy.headers"] = headers  # type: ignore[typeddict-unknown-key]
        before = self.cycle
        super().on_headers_complete()
        self._writer(self.cycle)
        if before is not None and not before.response_complete:  # Pipelined.
            self._earlier = [cycle for cycle in self._earlier if not cycle.response_complete]
            self._earlier.append(before)
            self.flow.resume_reading()  # Who does not read does not hear of a client that leaves.
        self.headers = []  # Trailers are headers to the parser; nobody reads them.

    def _check(self, headers: dict[bytes, bytes]) -> None:
        """Refuses a request by its headers: the parser stops, and `send_400_response` tells."""
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        # What came so far may be the head and a part of the body.
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEADER_BYTES:
            self._refusal = _headers_too_large("header_bytes", MAX_HEADER_BYTES, size)
        elif b"host" not in headers and self.parser.get_http_version() == "1.1":
            self._refusal = ApiError("malformed_http", "expected the header Host, got none")
        elif codings not in ([], [b"chunked"]):
            self._refusal = ApiError("unknown_transfer_encoding", "transfer-encoding: expected chunked or none")
        if self._refusal is not None:
            raise self._refusal

    def on_body(self, body: bytes) -> None:
        """Part of a body."""
        self._framing_bytes = 0
        super().on_body(body)
        if self.cycle.response_complete:
            self._dropped_bytes = drop(self._dropped_bytes + len(body), self.flow, self.transport, self.loop)

    def on_message_complete(self) -> None:
        """The request is there."""
        if self._offer is not None:  # Its body is still to come.
            return
        self._framing_bytes = 0
        self.receiving_since_s = None
        self._in_message = False
        super().on_message_complete()
        if self.flow.read_paused and not self.pipeline:
            self.flow.resume_reading()  # A long body has paused it, and the end of the connection has to be seen.

    def on_response_complete(self) -> None:
        """An answer is complete: the next request's turn.

        uvicorn arms a timer for idle connections here, which costs 2 % of a small request, and holds a connection that
        was reset, and its requests, until it ends; `check` looks at the clock instead.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._idle_since_s = time.monotonic()
            self._refused = self.cycle.scope["deploy.caller"].refused  # type: ignore[typeddict-item]

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP, in the JSON of all errors, and closes the connection."""
        self._refuse(self._refusal or ApiError("malformed_http", msg))

    def check(self, now_s: float, settings: Settings) -> None:
        """Closes the connection if the client takes too long to send or to read; called about every second.

        Args:
            now_s: By `time.monotonic`.
            settings: How long is too long.
        """
        if self.receiving_since_s is not None and now_s - self.receiving_since_s > settings.request_timeout_s:
            self.expire()
        if self._lingering_since_s is not None and now_s - self._lingering_since_s > LINGER_S:
            self.transport.close()
        # A request that waits behind another one may fill its share; then the rest is dropped to hear of the end.
        waiting = bool(self.pipeline) and self.flow.read_paused
        if waiting and self._paused:
            self.stop_receiving()
            self.flow.resume_reading()
        self._paused = waiting
        connection = (transport := self.transport).get_extra_info("socket")
        if self._reading.check(connection, transport.get_write_buffer_size(), now_s) > settings.response_timeout_s:
            will_reset(connection)
            self._outlives = False
            transport.abort()
        elif self._reading.unread:  # Who still reads an answer is not idle.
            self._idle_since_s = self._idle_since_s and now_s
        elif self._idle_since_s is not None:
            refused_s = settings.response_timeout_s if self._refused else settings.keep_alive_s
            longest_s = min(refused_s, settings.keep_alive_s)
            if now_s - self._idle_since_s > longest_s:
                transport.close()

    def resume_writing(self) -> None:
        """The system has taken most of what there was; it keeps little of what goes to a socket of the file system."""
        self._reading.resumed = True
        super().resume_writing()

    def expire(self) -> None:
        """Gives a request up that did not arrive in time."""
        if self._in_head and not self._unanswered():
            self._refuse(ApiError("timeout", "the headers of the request did not arrive in time (--request-timeout)"))
        elif not self.stop_receiving():
            self.transport.close()

    def stop_receiving(self) -> bool:
        """Takes nothing more from this client: what has arrived is answered, and the connection is closed after that.

        Returns:
            Whether there is anything to answer; if not, it is the caller's to close the connection.
        """
        self._dropping = True
        self.receiving_since_s = None
        waiting = self._unanswered()
        if waiting and waiting[-1].more_body:  # Its body will never be complete.
            _leave(waiting.pop())
        self._in_message = False
        if waiting:
            waiting[-1].keep_alive = False
        return bool(waiting)

    def _refuse(self, error: ApiError) -> None:
        """Answers a request that is not all there, and closes the connection."""
        if self.transport.is_closing() or self._dropping:
            return
        waiting = self._unanswered()
        current = waiting.pop() if waiting and waiting[-1].more_body else None
        started = self.cycle is not None and self.cycle.response_started and self._in_message and not self._in_head
        self.stop_receiving()
        getattr(self.app, "refused", _nobody)(error.kind)
        if waiting or started or (current is not None and current.response_started):
            self.transport.close()
            return
        body = error_body(error)
        self.transport.write(
            STATUS_LINE[error.status]
            + b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            + body
        )
        self._lingering_since_s = time.monotonic()
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            self.transport.write_eof()


class _EnoughError(Exception):
    """Stops the parser: more requests wait than a connection may have."""


def _nobody(kind: str) -> None:
    """For applications that do not count refusals."""


def _headers_too_large(name: str, limit: int, found: int | None = None) -> ApiError:
    return ApiError("headers_too_large", exceeded(name, limit, found))


def _leave(cycle: RequestResponseCycle) -> None:
    """Nobody waits for this answer any more."""
    cycle.disconnected = True
    cycle.message_event.set()
    cycle.scope["deploy.caller"].leave()  # type: ignore[typeddict-item]


def _same_body(headers: dict[bytes, bytes]) -> bytes:
    """The head of a request whose body is sent in the same way, and that offers nothing."""
    if b"transfer-encoding" in headers:
        return b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % int(headers.get(b"content-length", b"0"))
