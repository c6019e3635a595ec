"""Listening sockets. Standard library only: the supervisor of several workers imports no server."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat
import struct
from typing import Any

__all__ = ["FEW_DESCRIPTORS", "listen", "listen_unix", "raise_descriptors", "refuse_new", "url_of"]

MOST_DESCRIPTORS = 1 << 16
"""A server has one for each connection; where the system allows it, so many are taken."""

FEW_DESCRIPTORS = 1024
"""With fewer, clients may meet the limit."""


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


def refuse_new(sock: socket.socket) -> None:
    """Lets a listening socket drop every packet, so that what the kernel has accepted is all there is to take.

    Without this, a connection that is made between the last accept and the close would be reset. A client whose packet
    is dropped tries again and is refused then. Does nothing where there are no socket filters. One of the file system
    loses its name instead.
    """
    if sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            os.unlink(sock.getsockname())
        return
    import ctypes

    accept_no_bytes = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K, 0.
    program = ctypes.create_string_buffer(accept_no_bytes)
    so_attach_filter = 26
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, so_attach_filter, struct.pack("HP", 1, ctypes.addressof(program)))
