"""Listening sockets. Standard library only: the supervisor of several workers imports no server."""

from __future__ import annotations

import contextlib
import socket
import struct

__all__ = ["listen", "refuse_new", "url_of"]


def listen(host: str, port: int, backlog: int = 2048) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: The host is unknown, or the port is in use or not permitted.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a listening socket can be reached; port 0 has become a free one."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def refuse_new(sock: socket.socket) -> None:
    """Lets a listening socket drop every packet, so that what the kernel has accepted is all there is to take.

    Without this, a connection that is made between the last accept and the close would be reset. A client whose packet
    is dropped tries again and is refused then. Does nothing where there are no socket filters.
    """
    import ctypes

    accept_no_bytes = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K, 0.
    program = ctypes.create_string_buffer(accept_no_bytes)
    so_attach_filter = 26
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, so_attach_filter, struct.pack("HP", 1, ctypes.addressof(program)))
