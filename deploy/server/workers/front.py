"""Where connections come in: each goes to the worker that has the fewest."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Callable

from ..sockets import refuse_new
from .board import Board
from .child import Child

__all__ = ["Front"]

ACCEPTS = 64
"""Connections that are accepted before anything else gets its turn."""

RESERVED_DESCRIPTORS = 128
"""What a worker opens besides connections."""


class Front:
    """Accepts connections and hands them over.

    Attributes:
        workers: Who may get them.
    """

    def __init__(self, listener: socket.socket, board: Board) -> None:
        self.listener = listener
        self.workers: Callable[[], list[Child]] = list
        self._board = board
        self._waiting: list[socket.socket] = []
        self._given: dict[int, int] = {}
        self._turn = 0
        # A connection that a worker has no descriptor left for would be lost on its way; here it can wait.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(soft - RESERVED_DESCRIPTORS, 16) if soft != resource.RLIM_INFINITY else 1 << 30

    @property
    def closed(self) -> bool:
        """Whether it listens no more."""
        return self.listener.fileno() < 0

    def accept(self) -> bool:
        """Hands connections over; false if the workers cannot take any more now."""
        if not self.hand_over():
            return False
        for _ in range(ACCEPTS):
            try:
                connection, _ = self.listener.accept()
            except (BlockingIOError, ConnectionError):
                return True
            except OSError:  # No descriptors or memory.
                return False
            if not self.give(connection):
                return False
        return True

    def give(self, connection: socket.socket) -> bool:
        """Hands one connection over; keeps it, and answers false, if nobody can take it now."""
        loads = []
        for child in self.workers():
            load = self._board.open(child.slot) + max(child.sent - self._board.received(child.slot), 0)
            if load < self._most:
                loads.append((load, self._given.get(child.slot, 0), child))
        for _, _, child in sorted(loads, key=lambda found: found[:2]):
            if child.channel.send_connection(connection):
                child.sent += 1
                self._turn += 1
                self._given[child.slot] = self._turn
                connection.close()
                return True
        self._waiting.append(connection)
        return False

    def hand_over(self) -> bool:
        """Hands over what was kept; false if something is still kept."""
        waiting, self._waiting = self._waiting, []
        for index, connection in enumerate(waiting):
            if not self.give(connection):
                self._waiting += waiting[index + 1 :]
                return False
        return True

    def close(self) -> None:
        """Takes the connections that the kernel has accepted, hands them over, and listens no more."""
        refuse_new(self.listener)
        with contextlib.suppress(OSError):  # BlockingIOError: that was the last one.
            while True:
                connection, _ = self.listener.accept()
                self.give(connection)
        self.listener.close()
        self.hand_over()
        for connection in self._waiting:
            connection.close()
        self._waiting.clear()
