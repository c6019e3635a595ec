"""Listening sockets. Standard library only: the supervisor of several workers imports no server."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["FEW_DESCRIPTORS", "PAUSE_S", "last_connections", "listen", "listen_unix", "raise_descriptors", "url_of"]

MOST_DESCRIPTORS = 1 << 16
"""A server has one for each connection; where the system allows it, so many are taken."""

FEW_DESCRIPTORS = 1024
"""With fewer, clients may meet the limit."""

UNDER_WAY_S = 0.05
"""How long the last packet of a new connection may be under way: within a region and its neighbours, it is less."""

PAUSE_S = 0.005
"""Between two looks for such connections."""


def raise_descriptors() -> int:
    """Raises the number of descriptors that the process may open, as far as the system allows; how many that are."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (MOST_DESCRIPTORS if limit == resource.RLIM_INFINITY else limit for limit in limits)
    most = max(soft, min(hard, MOST_DESCRIPTORS))
    if most > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    return most


def listen(host: str, port: int, backlog: int = 2048) -> socket.socket:
    """A listening socket, at the first of the host's addresses that this machine has.

    Raises:
        OSError: The host is unknown, or the port is in use or not permitted.
    """
    # Names in ASCII as bytes: text would be encoded by IDNA, whose tables take 3 ms to import.
    name = host.encode() if host.isascii() else host
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    *others, (family, _, _, _, address) = found
    for other, _, _, _, place in others:
        try:
            return _listen_at(other, place, backlog)
        except OSError as error:
            # `localhost` is ::1, too, where the system, or the container, has no IPv6.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return _listen_at(family, address, backlog)


def _listen_at(family: int, address: Any, backlog: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def listen_unix(path: str, backlog: int = 2048) -> socket.socket:
    """A listening socket of the file system, in place of one that a server has left behind.

    Raises:
        OSError: The path is something else, or a server listens there, or it is not permitted.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket")
        with socket.socket(socket.AF_UNIX) as other:
            if other.connect_ex(path) != errno.ECONNREFUSED:
                raise OSError(errno.EADDRINUSE, "another server listens there")
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket, tls: bool = False) -> str:
    """Where a listening socket can be reached; port 0 has become a free one."""
    if sock.family == socket.AF_UNIX:
        return f"{'https' if tls else 'http'}+unix://{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def last_connections(listeners: Sequence[socket.socket]) -> Iterator[socket.socket | None]:
    """Closes listening sockets without losing a connection that a client takes as made.

    Clients that come later are refused: a socket of the file system loses its name, any other gets a filter that drops
    what asks for a connection, so that those clients try again and find nobody. Where there are no such filters, what
    is made between the last accept and the close is reset.

    Args:
        listeners: Closed at the end.

    Yields:
        A connection, or None where the caller has to wait for `PAUSE_S`: some may be under way.
    """
    refused = [_refuse_new(listener) for listener in listeners]
    until_s = time.monotonic() + (UNDER_WAY_S if any(refused) else 0.0)
    last = False
    while not last:
        last = time.monotonic() >= until_s
        for listener in listeners:
            listener.setblocking(False)
            with contextlib.suppress(OSError):  # BlockingIOError: that was the last one, for now.
                while True:
                    yield listener.accept()[0]
        if not last:
            yield None
    for listener in listeners:
        listener.close()


def _refuse_new(sock: socket.socket) -> bool:
    """Makes no more connections; true if the last packet of some may still come."""
    if sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            os.unlink(sock.getsockname())
        return False
    import ctypes

    instructions = (
        (0x30, 0, 0, 13),  # BPF_LD | BPF_B | BPF_ABS: the flags in TCP's header.
        (0x45, 0, 1, 0x02),  # BPF_JMP | BPF_JSET | BPF_K: is SYN among them?
        (0x06, 0, 0, 0),  # BPF_RET | BPF_K: dropped.
        (0x06, 0, 0, 0xFFFFFFFF),  # Taken, as on what is accepted later, which has the same filter.
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in instructions))
    option = struct.pack("HP", len(instructions), ctypes.addressof(program))
    try:
        sock.setsockopt(socket.SOL_SOCKET, 26, option)  # SO_ATTACH_FILTER, which Python does not name.
    except OSError:
        return False
    return True
