"""uvicorn's HTTP protocol with bounds on headers and time, and news of lost clients."""

from __future__ import annotations

import asyncio
import re
import time

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from .errors import ApiError, error_body

__all__ = ["MAX_HEADER_BYTES", "HttpProtocol"]

MAX_HEADER_BYTES = 64 << 10
"""Longest request line and header section; httptools itself has no bound."""

_UPGRADE = re.compile(rb"(?i)\r\nupgrade:")


class HttpProtocol(HttpToolsProtocol):
    """One connection.

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
        self._header_bytes: int | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is being received or answered."""
        return not self._in_message and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self.receiving_since_s = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone: tells the application about the request that is being answered, if any."""
        if self.cycle is not None and not self.cycle.response_complete:
            scope = self.cycle.scope
            scope["deploy.disconnected"] = True  # type: ignore[typeddict-unknown-key]
            if (callback := scope.get("deploy.on_disconnect")) is not None:
                callback()  # type: ignore[operator]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests.

        The parser stops at a request that offers another protocol, and its body is lost. Java's client offers HTTP/2 in
        its first request; this server has HTTP/1.1 only, and a server may ignore such offers, so the parser never sees
        them.
        """
        if b"pgrade:" in data and not self._in_message:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest
        if self._header_bytes is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self.send_400_response(f"expected at most {MAX_HEADER_BYTES} bytes of headers, got more")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self.receiving_since_s = time.monotonic()
        self._in_message = True
        self._header_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The headers are there; the application starts."""
        self._header_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is there."""
        self.receiving_since_s = None
        self._in_message = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP, in the JSON of all errors, and closes the connection."""
        self._refuse(ApiError("malformed_http", msg))

    def expire(self) -> None:
        """Gives a request up that did not arrive in time."""
        if self._header_bytes is not None:
            self._refuse(ApiError("timeout", "the headers of the request did not arrive in time"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        body = error_body(error)
        self.transport.write(
            STATUS_LINE[error.status]
            + b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            + body
        )
        self.transport.close()
