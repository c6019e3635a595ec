"""A connection of a worker, which shows its supervisor how far its requests are."""

from __future__ import annotations

import contextlib
import socket

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from ..errors import ApiError
from ..http.protocol import HttpProtocol
from ..http.writer import Writer
from .marks import ANSWERING, PENDING

__all__ = ["MarkedProtocol"]


class _Writer(Writer):
    """Marks that bytes of an answer leave before they do."""

    __slots__ = ("_number", "_values")

    def __init__(self, cycle: RequestResponseCycle, values: memoryview, number: int) -> None:
        super().__init__(cycle)
        self._values = values
        self._number = number

    def write(self, data: bytes) -> None:
        self._values[self._number] = ANSWERING
        super().write(data)


class MarkedProtocol(HttpProtocol):
    """One connection, of which the supervisor keeps a duplicate; see `marks`."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        connection: socket.socket,
        values: memoryview,
        number: int,
        read_bytes: int,
    ) -> None:
        """Nothing is connected yet.

        Args:
            config: Of the server.
            server_state: Of the server.
            app_state: Of the server.
            connection: The socket.
            values: Marks of all connections.
            number: Which of them is that of this one.
            read_bytes: How much another worker has read of it, and answered.
        """
        super().__init__(config=config, server_state=server_state, app_state=app_state)
        self._connection = connection
        self._values = values
        self._number = number
        self._read_bytes = read_bytes

    def _writer(self, cycle: RequestResponseCycle) -> Writer:  # type: ignore[override]
        return _Writer(cycle, self._values, self._number)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, also for the supervisor, whose duplicate would keep it open."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        self._read_bytes += len(data)
        if self._values[self._number] != ANSWERING:
            self._values[self._number] = PENDING
        super().data_received(data)

    def on_response_complete(self) -> None:
        """An answer is complete; it leaves at the end of this turn of the event loop."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self.loop.call_soon(self._settle)

    def _settle(self) -> None:
        """Marks what is left, once no bytes of answers are."""
        if self.transport.is_closing() or self.cycle is None or self.transport.get_write_buffer_size():
            return
        busy = self._in_message or not self.cycle.response_complete
        self._values[self._number] = PENDING if busy else self._read_bytes + 1

    def _refuse(self, error: ApiError) -> None:
        self._values[self._number] = ANSWERING
        super()._refuse(error)
