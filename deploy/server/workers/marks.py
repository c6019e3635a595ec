"""How far the requests of each connection are, in memory that workers share, for what remains of one that dies.

The supervisor keeps a duplicate of each connection that it hands over, so that the system does not reset it when its
worker is killed. What it may do with it then, the worker has marked:

| mark | its requests | what the supervisor does |
|---|---|---|
| n + 1 | all that came in the first n bytes are answered | hands it to another worker, if no more was read |
| `PENDING` | some are not, and no byte of an answer has left | answers 503, and closes it |
| `ANSWERING` | an answer may have left in part | closes it |

A worker writes eight bytes two or three times for each request. Standard library only.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import termios

__all__ = ["ANSWERING", "PENDING", "Marks", "is_idle"]

ANSWERING = 0
PENDING = (1 << 64) - 1

_RECEIVED_AT = 128  # Of tcpi_bytes_received in struct tcp_info of Linux.


class Marks:
    """The marks by the number of a connection.

    Attributes:
        fd: The memory.
        values: A number for each connection.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.values = memoryview(mmap.mmap(fd, os.fstat(fd).st_size)).cast("Q")

    @classmethod
    def make(cls, count: int) -> Marks:
        """New memory."""
        fd = os.memfd_create("deploy-marks", os.MFD_CLOEXEC)
        os.ftruncate(fd, 8 * max(count, 1))
        return cls(fd)


def is_idle(connection: socket.socket, mark: int) -> bool:
    """Whether all that was read of a connection is answered.

    A worker may have died between reading bytes and marking that; so the system is asked how many were read.
    """
    if mark in (ANSWERING, PENDING):
        return False
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        unread = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))[0]
    except OSError:  # Not TCP.
        return False
    if len(info) < _RECEIVED_AT + 8:
        return False
    received: int = struct.unpack_from("Q", info, _RECEIVED_AT)[0]
    return bool(received - unread == mark - 1)
