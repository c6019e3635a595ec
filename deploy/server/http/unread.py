"""What a client's system has not taken of its answers yet; and connections that are closed before it has.

A close with bytes in the system's buffer sends them first, and the end behind them: a client that never reads would
keep them, some MB, for minutes, and not hear of the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
import time
from weakref import WeakKeyDictionary

__all__ = ["READ_BYTES", "Reading", "forget", "is_reset", "kept_by_system", "outlive", "will_reset"]

READ_BYTES = 32 << 10
"""How much of its answers a client has to read in `Settings.response_timeout_s`, or all that is left."""

TAKEN_BYTES = 64 << 10
"""A client's system takes this much, whether the client reads or not."""

CHECK_EVERY_S = 1.0

_TCP_CLOSE = 7  # Of enum in net/tcp_states.h of Linux.
_ACKED_AT = 120  # Of tcpi_bytes_acked in struct tcp_info of Linux.
_RESET = struct.pack("ii", 1, 0)
_LEFT: WeakKeyDictionary[asyncio.AbstractEventLoop, set[socket.socket]] = WeakKeyDictionary()


class Reading:
    """How far a client is in reading its answers.

    Attributes:
        unread: Whether there was anything to read at the last `check`.
        resumed: Set when the system has taken more, which tells of sockets of the file system: they keep little.
    """

    __slots__ = ("_since_s", "_taken_bytes", "resumed", "unread")

    def __init__(self) -> None:
        self.unread = False
        self.resumed = False
        self._since_s = 0.0
        self._taken_bytes = 0

    def check(self, connection: socket.socket, unsent_bytes: int, now_s: float) -> float:
        """How long the client has not read, in seconds, though it could.

        Args:
            connection: The socket.
            unsent_bytes: What the system has not got yet.
            now_s: By `time.monotonic`.
        """
        unread_bytes = unsent_bytes + kept_by_system(connection)
        if not unread_bytes:
            self.unread = False
            return 0.0
        acked_bytes = _acked_bytes(connection)
        taken_bytes = -unread_bytes if acked_bytes is None else acked_bytes  # Only differences have a meaning.
        more = taken_bytes >= self._taken_bytes + READ_BYTES or (acked_bytes is None and self.resumed)
        self.resumed = False
        if not self.unread or more:
            self.unread = True
            self._since_s = now_s
            self._taken_bytes = taken_bytes
        self._taken_bytes = min(self._taken_bytes, taken_bytes)
        return now_s - self._since_s


def outlive(connection: socket.socket, longest_s: float, loop: asyncio.AbstractEventLoop) -> None:
    """Sends what is left on a connection that is about to be closed, and resets it if the client does not read.

    Args:
        connection: The socket, still open.
        longest_s: How long a client may read nothing.
        loop: That of the caller.
    """
    if kept_by_system(connection) <= TAKEN_BYTES:
        return
    with contextlib.suppress(OSError):
        left = socket.socket(fileno=os.dup(connection.fileno()))
        left.setblocking(False)
        with contextlib.suppress(OSError):
            left.shutdown(socket.SHUT_WR)
        _LEFT.setdefault(loop, set()).add(left)
        _look(left, Reading(), longest_s, loop)


def forget(loop: asyncio.AbstractEventLoop) -> None:
    """Leaves what is left on connections of a loop to the system; the loop ends."""
    for left in _LEFT.pop(loop, ()):
        left.close()


def _look(left: socket.socket, reading: Reading, longest_s: float, loop: asyncio.AbstractEventLoop) -> None:
    if left not in _LEFT.get(loop, ()):
        return
    waited_s = reading.check(left, 0, time.monotonic())
    if reading.unread and waited_s <= longest_s:
        loop.call_later(CHECK_EVERY_S, _look, left, reading, longest_s, loop)
        return
    if reading.unread:
        will_reset(left)
    _LEFT[loop].discard(left)
    left.close()


def will_reset(connection: socket.socket) -> None:
    """Lets the close of a connection drop what is left, and tell the client at once."""
    with contextlib.suppress(OSError, AttributeError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def is_reset(transport: asyncio.Transport) -> bool:
    """Whether the other side has reset the connection."""
    try:
        state: bytes = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    except (OSError, AttributeError):  # Another kind of socket, or of system: writes tell.
        return False
    return state[0] == _TCP_CLOSE


def kept_by_system(connection: socket.socket) -> int:
    """Bytes that were handed to the system and that the client's system has not taken."""
    try:
        found: int = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]
    except (OSError, ValueError, TypeError):  # It is closed, or another kind of socket, or of system.
        return 0
    return found


def _acked_bytes(connection: socket.socket) -> int | None:
    """How many bytes the client's system has taken so far; None: this is not TCP."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AT + 8)
    except (OSError, AttributeError):
        return None
    if len(info) < _ACKED_AT + 8:
        return None
    found: int = struct.unpack_from("Q", info, _ACKED_AT)[0]
    return found
