"""Messages between the supervisor and one of its processes, with descriptors: JSON in packets of a Unix socket."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["CONNECTION", "SHORT_BYTES", "Channel", "Message"]

MOST_BYTES = 128 << 10
"""Longest message; the system's buffers take more."""

SHORT_BYTES = 256
"""Longest message that a worker gets after its job."""

MOST_DESCRIPTORS = 64
"""Most that come with one message: the board's, and those of weights."""

CONNECTION = "connection"
"""Kind of the message that a client's connection comes with."""

_CONNECTION = CONNECTION.encode()
"""What such a message begins with; two numbers follow, without JSON, since there are many."""


class Message(NamedTuple):
    """A message.

    Attributes:
        kind: What it is about.
        values: What it says.
        fds: Descriptors that came with it; the receiver closes them.
    """

    kind: str
    values: dict[str, Any]
    fds: tuple[int, ...]

    def close(self) -> None:
        """Closes the descriptors of a message that nobody wants."""
        for fd in self.fds:
            os.close(fd)


class Channel:
    """One end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Both ends."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    @classmethod
    def inherited(cls, fd: int) -> Channel:
        """The end that a process was started with."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """The descriptor."""
        return self.sock.fileno()

    def send(self, kind: str, values: Mapping[str, Any] | None = None, fds: Sequence[int] = ()) -> None:
        """Sends a message.

        Raises:
            OSError: The other end is closed, or (`BlockingIOError`) does not read.
        """
        self._send(json.dumps({"kind": kind, **(values or {})}).encode(), fds)

    def send_connection(self, connection: socket.socket, number: int = -1, read_bytes: int = 0) -> bool:
        """Hands a client over, without waiting; False: the other end is closed, or does not read.

        Args:
            connection: The client's.
            number: Of its mark; -1: it has none.
            read_bytes: How much another worker has read of it, and answered.
        """
        try:
            self._send(b"%b %d %d" % (_CONNECTION, number, read_bytes), [connection.fileno()], socket.MSG_DONTWAIT)
        except OSError:  # Also ETOOMANYREFS: too many connections are under way.
            return False
        return True

    def _send(self, data: bytes, fds: Sequence[int], flags: int = 0) -> None:
        # Python 3.11's send_fds and recv_fds ignore their flags.
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self.sock.sendmsg([data], rights, flags)

    def receive(self, wait: bool = True, most_bytes: int = MOST_BYTES) -> Message | None:
        """The next message; None: the other end is closed.

        Args:
            wait: Wait until there is one.
            most_bytes: Longest message; a buffer of this size is made for each.

        Raises:
            BlockingIOError: There is none, and `wait` is false.
        """
        fds = array("i")
        room = socket.CMSG_LEN(MOST_DESCRIPTORS * fds.itemsize)
        try:
            data, extra, _, _ = self.sock.recvmsg(most_bytes, room, 0 if wait else socket.MSG_DONTWAIT)
        except ConnectionError:
            return None
        for level, kind, content in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
        if not data:
            return None
        if data.startswith(_CONNECTION):
            _, number, read_bytes = data.split()
            return Message(CONNECTION, {"number": int(number), "read_bytes": int(read_bytes)}, tuple(fds))
        values = json.loads(data)
        return Message(values.pop("kind"), values, tuple(fds))

    def end(self) -> None:
        """Tells the other end that nothing more will come."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Closes this end."""
        self.sock.close()
