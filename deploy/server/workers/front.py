"""Where connections come in: each goes to the worker that has the fewest."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable

from ..sockets import PAUSE_S, last_connections
from .board import Board
from .child import Child
from .events import Events
from .keeper import Keeper

__all__ = ["Front"]

ACCEPTS = 64
"""Connections that are accepted before anything else gets its turn."""

FULL_S = 0.02
"""How long nothing is accepted when no worker can take a connection."""

RESERVED_DESCRIPTORS = 128
"""What a worker opens besides connections."""

LAST_S = 5.0
"""After the last accept, how long workers may take to have room for the connections that are kept."""


class Front:
    """Accepts connections and hands them over."""

    def __init__(
        self,
        listener: socket.socket,
        board: Board,
        events: Events,
        keeper: Keeper,
        workers: Callable[[], list[Child]],
    ) -> None:
        """Accepts nothing yet; see `open`.

        Args:
            listener: Where connections come in.
            board: What workers have counted.
            events: Calls when connections come in.
            keeper: Has a duplicate of each connection that was handed over.
            workers: Who may get them.
        """
        self._keeper = keeper
        self._listener = listener
        self._workers = workers
        self._board = board
        self._events = events
        self._accepting = False
        self._paused = False
        self._ended = False
        self._waiting: list[tuple[socket.socket, int]] = []
        self._given: dict[int, int] = {}
        self._turn = 0
        # A connection that a worker has no descriptor left for would be lost on its way; here it can wait.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(soft - RESERVED_DESCRIPTORS, 16) if soft != resource.RLIM_INFINITY else 1 << 30

    @property
    def closed(self) -> bool:
        """Whether it listens no more."""
        return self._listener.fileno() < 0

    def open(self) -> None:
        """Hands over what is kept, and accepts; again, if it has paused."""
        if not self.closed:
            self._listen(True)
            self._accept()

    def take_back(self, child: Child) -> None:
        """Gives connections to another worker that one did not take."""
        for connection, number, read_bytes in child.undelivered():
            duplicate = self._keeper.forget(number)
            if duplicate is not None:
                duplicate.close()
            self._give_or_wait(connection, read_bytes)

    def recover(self, child: Child) -> None:
        """Gives the connections of a worker that has died to another one; their requests that are not answered end."""
        for connection, read_bytes in self._keeper.died(child.slot):
            self._give_or_wait(connection, read_bytes)

    def _give_or_wait(self, connection: socket.socket, read_bytes: int) -> None:
        if self._ended:
            connection.close()
        elif not self._give(connection, read_bytes) and not self.closed:
            self._pause()

    def _listen(self, value: bool) -> None:
        if value != self._accepting:
            if value:
                self._events.watch(self._listener, self._accept)
            else:
                self._events.forget(self._listener)
            self._accepting = value

    def _pause(self) -> None:
        """Accepts nothing for a while; connections that nobody could take are kept as long."""
        self._listen(False)
        if not self._paused:
            self._paused = True
            self._events.after(FULL_S, self._end_pause)

    def _end_pause(self) -> None:
        self._paused = False
        self.open()

    def _accept(self) -> None:
        if not self._accept_some():
            self._pause()

    def _accept_some(self) -> bool:
        """Hands connections over; false if the workers cannot take any more now."""
        if not self._hand_over():
            return False
        for _ in range(ACCEPTS):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                return True
            except OSError:  # No descriptors or memory.
                return False
            if not self._give(connection):
                return False
        return True

    def _give(self, connection: socket.socket, read_bytes: int = 0) -> bool:
        """Hands one connection over; it waits, and this answers false, if nobody can take it now."""
        number = self._keeper.number(read_bytes)
        loads = []
        for child in self._workers():
            load = self._board.open(child.slot) + max(child.sent - self._board.received(child.slot), 0)
            if load < self._most:
                loads.append((load, self._given.get(child.slot, 0), child))
        for _, _, child in sorted(loads, key=lambda found: found[:2]):
            if child.channel.send_connection(connection, number, read_bytes):
                child.sent += 1
                self._turn += 1
                self._given[child.slot] = self._turn
                self._keeper.keep(number, child.slot, connection)
                return True
        self._keeper.unused(number)
        self._waiting.append((connection, read_bytes))
        return False

    def _hand_over(self) -> bool:
        """Hands over what was kept; false if something is still kept."""
        waiting, self._waiting = self._waiting, []
        for index, (connection, read_bytes) in enumerate(waiting):
            if not self._give(connection, read_bytes):
                self._waiting += waiting[index + 1 :]
                return False
        return True

    def close(self, done: Callable[[], None]) -> None:
        """Takes the connections that the kernel has accepted, and listens no more.

        Args:
            done: Called when workers have all of them, or had no room for `LAST_S`.
        """
        self._listen(False)
        for connection in last_connections([self._listener]):
            if connection is None:
                time.sleep(PAUSE_S)
            else:
                self._give(connection)
        self._end(time.monotonic() + LAST_S, done)

    def _end(self, until_s: float, done: Callable[[], None]) -> None:
        """Hands over what is kept, as workers get room for it."""
        if not self._hand_over() and self._workers() and time.monotonic() < until_s:
            self._events.after(PAUSE_S, lambda: self._end(until_s, done))
            return
        self._ended = True
        for connection, _ in self._waiting:
            connection.close()
        self._waiting.clear()
        done()
