"""Listening sockets: which connections are taken when they close."""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import time

import pytest

from deploy.server.sockets import PAUSE_S, last_connections, listen

ATTACH_FILTER, DETACH_FILTER = 26, 27
"""SO_ATTACH_FILTER and SO_DETACH_FILTER."""


def drop_all(sock: socket.socket) -> None:
    """Lets a socket drop what it receives."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))


def test_a_connection_under_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has answered, but the client's last packet comes after it began to stop: not reset, not lost."""
    monkeypatch.setattr("deploy.server.sockets.UNDER_WAY_S", 3.0)  # The kernel sends its answer again after a second.
    listener = listen("127.0.0.1", 0)
    address = listener.getsockname()
    late = socket.create_connection(address)  # Made, but not accepted.
    with late, socket.socket() as client, socket.socket() as new:
        client.setblocking(False)
        drop_all(client)
        with pytest.raises(BlockingIOError):
            client.connect(address)
        found = []
        told = False
        for connection in last_connections([listener]):
            if connection is not None:
                found.append(connection)
                continue
            if not told:
                told = True
                client.setsockopt(socket.SOL_SOCKET, DETACH_FILTER, 0)
                new.setblocking(False)
                with pytest.raises(BlockingIOError):
                    new.connect(address)
            time.sleep(PAUSE_S)
        assert select.select([], [client], [], 0)[1], "not connected"
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        client.setblocking(True)
        peers = {connection.getpeername(): connection for connection in found}
        assert set(peers) == {late.getsockname(), client.getsockname()}
        for one in (late, client):
            one.sendall(b"asked")
            assert peers[one.getsockname()].recv(5) == b"asked"
            peers[one.getsockname()].sendall(b"answered")
            assert one.recv(8) == b"answered"
            peers[one.getsockname()].close()
        # A new one is not made, and hears so when it tries again.
        assert select.select([], [new], [], 10)[1]
        assert new.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
    assert listener.fileno() < 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
