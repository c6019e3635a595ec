"""Duplicates of the connections that workers have, and what becomes of them when a worker dies; see `marks`.

A duplicate costs a descriptor, and each connection three system calls; a request costs nothing here. A worker that
closes a connection shuts it down first, which wakes the supervisor up to let go of its duplicate, too.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
from collections.abc import Iterator

from .events import Events
from .marks import ANSWERING, Marks, is_idle

__all__ = ["Keeper"]

MOST = 1 << 16
"""Most duplicates."""

SPARED_DESCRIPTORS = 64
"""Half of the descriptors, and so many, are for other things."""

LINGER_S = 2.0
"""How long what a client still sends is dropped before its connection is closed: otherwise it would be reset, and the
client might never see the answer."""

_BODY = (
    b'{"error":{"type":"draining","message":"the process that had this request has ended, and nothing was answered; '
    b'send it again"}}'
)
_UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)


class Keeper:
    """The duplicates, by number."""

    def __init__(self, events: Events, keep: bool = True) -> None:
        """Keeps nothing yet.

        Args:
            events: Calls when workers close connections.
            keep: Keep duplicates; of TLS they would be of no use.
        """
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        count = MOST if soft == resource.RLIM_INFINITY else min(max(soft // 2 - SPARED_DESCRIPTORS, 0), MOST)
        self.marks = Marks.make(count if keep else 0)
        self._events = events
        self._free = list(range(count if keep else 0))
        self._kept: dict[int, tuple[int, socket.socket]] = {}
        self._numbers: dict[int, int] = {}
        self._closed = select.epoll()
        events.watch(self._closed, self._let_go)

    def number(self, read_bytes: int) -> int:
        """A number for a connection that is handed over; -1: it will not be kept.

        Args:
            read_bytes: How much was read of it before, and answered.
        """
        if not self._free:
            return -1
        number = self._free.pop()
        self.marks.values[number] = read_bytes + 1
        return number

    def unused(self, number: int) -> None:
        """Takes a number back."""
        if number >= 0:
            self._free.append(number)

    def keep(self, number: int, owner: int, connection: socket.socket) -> None:
        """Keeps a connection that was handed over, as this duplicate; without a number it is closed.

        Args:
            number: See `number`.
            owner: Slot of the worker that has it.
            connection: The duplicate.
        """
        if number < 0:
            connection.close()
            return
        self._kept[number] = (owner, connection)
        self._numbers[connection.fileno()] = number
        self._closed.register(connection.fileno(), 0)  # Ends are told always, and nothing else.

    def forget(self, number: int) -> socket.socket | None:
        """Keeps a connection no more; the duplicate, which is the caller's, or None."""
        found = self._kept.pop(number, None)
        if found is None:
            return None
        connection = found[1]
        self._closed.unregister(connection.fileno())
        del self._numbers[connection.fileno()]
        self._free.append(number)
        return connection

    def _let_go(self) -> None:
        for fd, _ in self._closed.poll(0):
            connection = self.forget(self._numbers[fd])
            if connection is not None:
                connection.close()

    def died(self, owner: int) -> Iterator[tuple[socket.socket, int]]:
        """Ends the requests of a worker that has died.

        Yields:
            Connections that another worker can have, and how much was read of each, and answered.

        Args:
            owner: Its slot.
        """
        for number in [number for number, (slot, _) in self._kept.items() if slot == owner]:
            mark = self.marks.values[number]
            connection = self.forget(number)
            if connection is None:
                continue
            if is_idle(connection, mark):
                yield connection, mark - 1
            elif mark == ANSWERING or not _say(connection):
                connection.close()
            else:
                self._linger(connection)

    def _linger(self, connection: socket.socket) -> None:
        """Closes a connection once its client does, or has had time to read."""

        def end() -> None:
            if connection.fileno() >= 0:
                self._events.forget(connection)
                connection.close()

        def drop() -> None:
            try:
                ended = not connection.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                ended = True
            if ended:
                end()

        self._events.watch(connection, drop)
        self._events.after(LINGER_S, end)


def _say(connection: socket.socket) -> bool:
    """Answers that nothing was done; whether the client can hear it."""
    with contextlib.suppress(OSError):
        connection.setblocking(False)
        if connection.send(_UNAVAILABLE) == len(_UNAVAILABLE):
            connection.shutdown(socket.SHUT_WR)
            return True
    return False
