"""uvicorn's HTTP protocol with bounds on headers and time, and news of lost clients."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from .callers import Caller
from .errors import ApiError, error_body

__all__ = ["MAX_HEADERS", "MAX_HEADER_BYTES", "HttpProtocol"]

MAX_HEADERS = 100
"""Most header lines of a request; clients send 5 to 10, behind proxies 30."""

MAX_HEADER_BYTES = 64 << 10
"""Longest request line and header section, and longest framing of a chunked body between two pieces of it, trailers
included; httptools itself has no bound."""


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
        self._earlier: list[Any] = []

    @property
    def idle(self) -> bool:
        """Whether no request is being received or answered."""
        return not self._in_message and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self.receiving_since_s = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone: so is whoever waits for answers to the requests on it."""
        for cycle in (*self._earlier, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
                cycle.scope["deploy.caller"].leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        self._unset_keepalive_if_required()
        self._framing_bytes += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stop:
                self._ignore_offers(data, stop)
        except httptools.HttpParserError:
            self.send_400_response("expected HTTP/1.1, got something else")
            return
        if self._framing_bytes > MAX_HEADER_BYTES and self._in_message:
            self._refuse(_headers_too_large(f"{MAX_HEADER_BYTES} bytes"))

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
        self.receiving_since_s = time.monotonic()
        self._in_message = True
        self._in_head = True
        super().on_message_begin()
        self.scope["deploy.caller"] = Caller()  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        """The headers are there; the application starts."""
        if self._replaying:
            return
        headers = dict(self.headers)
        if (
            len(self.headers) > MAX_HEADERS
            or self._framing_bytes > MAX_HEADER_BYTES
            or b"host" not in headers
            or b"transfer-encoding" in headers
        ):
            self._check(headers)
        self._in_head = False
        if self.parser.should_upgrade():
            self._offer = headers
        self._framing_bytes = 0
        self.scope["deploy.headers"] = headers  # type: ignore[typeddict-unknown-key]
        before = self.cycle
        super().on_headers_complete()
        if before is not None and not before.response_complete:  # Pipelined.
            self._earlier = [cycle for cycle in self._earlier if not cycle.response_complete]
            self._earlier.append(before)
        self.headers = []  # Trailers are headers to the parser; nobody reads them.

    def _check(self, headers: dict[bytes, bytes]) -> None:
        """Refuses a request by its headers: the parser stops, and `send_400_response` tells."""
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        # What came so far may be the head and a part of the body.
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if len(self.headers) > MAX_HEADERS:
            self._refusal = _headers_too_large(f"{MAX_HEADERS} header lines")
        elif size > MAX_HEADER_BYTES:
            self._refusal = _headers_too_large(f"{MAX_HEADER_BYTES} bytes")
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

    def on_message_complete(self) -> None:
        """The request is there."""
        if self._offer is not None:  # Its body is still to come.
            return
        self._framing_bytes = 0
        self.receiving_since_s = None
        self._in_message = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP, in the JSON of all errors, and closes the connection."""
        self._refuse(self._refusal or ApiError("malformed_http", msg))

    def expire(self) -> None:
        """Gives a request up that did not arrive in time."""
        if self._in_head:
            self._refuse(ApiError("timeout", "the headers of the request did not arrive in time"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answers a request that is not all there, and closes the connection."""
        if self.transport.is_closing():
            return
        before = [cycle for cycle in (*self._earlier, self.cycle) if cycle is not None]
        current = before.pop() if self._in_message and not self._in_head else None
        answered = current is not None and current.response_started
        if not answered and all(cycle.response_complete for cycle in before):
            body = error_body(error)
            self.transport.write(
                STATUS_LINE[error.status]
                + b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
                + body
            )
        self.transport.close()


def _headers_too_large(limit: str) -> ApiError:
    return ApiError("headers_too_large", f"headers and trailers: expected at most {limit}, got more")


def _same_body(headers: dict[bytes, bytes]) -> bytes:
    """The head of a request whose body is sent in the same way, and that offers nothing."""
    if b"transfer-encoding" in headers:
        return b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % int(headers.get(b"content-length", b"0"))
