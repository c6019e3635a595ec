"""What clients do on the wire: leave, send half, send without end, and read nothing. By raw sockets."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import LiveServer, make_manifest, raw, running, wait_until

from deploy.bundle import Manifest
from deploy.server import lifecycle
from deploy.server.http import protocol, unread
from deploy.server.limits.bounds import MAX_PIPELINED, Settings

GOOD = b'{"inputs": "w1 w2"}'
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def server(manifest: Manifest) -> Any:
    with running(manifest) as live:
        yield live


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a client that may still read."""
    monkeypatch.setattr(protocol, "PROBE_AFTER_S", 0.05)
    monkeypatch.setattr(protocol, "PROBE_EVERY_S", 0.2)


def post(body: bytes = GOOD, *lines: bytes, version: bytes = b"1.1") -> bytes:
    fields = [b"Host: x", b"Content-Length: %d" % len(body), *lines]
    return b"POST /api/embed HTTP/%s\r\n%s\r\n\r\n%s" % (version, b"\r\n".join(fields), body)


def padded(size: int, texts: int = 40) -> bytes:
    """A body of so many texts, and of so many bytes at least."""
    return json.dumps({"inputs": ["w9" + " " * (size // texts)] * texts}).encode()


def statuses(answer: bytes) -> list[bytes]:
    return [found for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer) if found != b"100"]


@contextlib.contextmanager
def connected(server: LiveServer, timeout_s: float = 20.0) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s) as sock:
        yield sock


def everything(sock: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def abandoned(server: LiveServer) -> float:
    found = re.search(rb"^serve_abandoned_requests_total (\S+)", server("GET", "/metrics").body, re.MULTILINE)
    assert found is not None
    return float(found[1])


# Clients that leave.


@pytest.mark.parametrize("size", [100, 160_000, 600_000, 1_200_000])
@pytest.mark.parametrize("way", ["close", "reset", "pipelined", "chunked", "1.0"])
def test_a_client_that_leaves_is_noticed_at_any_size(manifest: Manifest, size: int, way: str) -> None:
    """While a batch runs: that one ends, and nothing of the request runs after it."""
    with running(manifest, Settings(port=0, max_batch_tokens=9), gate=threading.Event()) as server:
        body = padded(size)
        data = post(body)
        if way == "1.0":
            data = post(body, version=b"1.0")
        elif way == "pipelined":
            data += data
        elif way == "chunked":
            data = b"POST /api/embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            data += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        with connected(server) as sock:
            sock.sendall(data)
            assert server.engine.entered.wait(10)
            assert server.batcher.queued_tokens == 120
            if way == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: server.batcher.queued_tokens == 0)
        wait_until(lambda: not server.server.server_state.connections)
        server.engine.gate.set()
        assert server("POST", "/api/embed", GOOD).status == 200
        assert len(server.engine.batches) <= 3
        assert abandoned(server) == 1


def test_a_client_that_leaves_while_its_body_is_waited_for(server: LiveServer) -> None:
    before = abandoned(server)
    for size in (100, 100_000):
        with connected(server) as sock:
            sock.sendall(post(padded(size))[:-10])
            wait_until(lambda: len(server.server.server_state.tasks) == 1)
        wait_until(lambda: not server.server.server_state.tasks)
    assert abandoned(server) == before + 2


def test_a_client_that_leaves_behind_one_that_waits(manifest: Manifest) -> None:
    """Its request is in the queue and has not begun to run."""
    with running(manifest, gate=threading.Event()) as server, connected(server) as first:
        first.sendall(post())
        assert server.engine.entered.wait(10)
        with connected(server) as second:
            second.sendall(post(padded(600_000)))
            wait_until(lambda: server.batcher.queued_tokens > 100)
        wait_until(lambda: server.batcher.queued_tokens == 4)
        server.engine.gate.set()
        assert first.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert sum(map(len, server.engine.batches)) == 1


@pytest.mark.parametrize("size", [100, 600_000])
@pytest.mark.parametrize("slow", [False, True])
def test_a_half_close_is_answered(manifest: Manifest, size: int, slow: bool) -> None:
    with running(manifest, gate=threading.Event()) as server, connected(server) as sock:
        if not slow:
            server.engine.gate.set()
        sock.sendall(post(padded(size)))
        sock.shutdown(socket.SHUT_WR)
        if slow:
            assert server.engine.entered.wait(10)
            assert sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            server.engine.gate.set()
        answer = everything(sock)
        assert statuses(answer) == [b"200"]
        assert len(json.loads(answer.rpartition(b"\r\n\r\n")[2])["embeddings"]) == 40


def test_a_half_close_after_several_requests(server: LiveServer) -> None:
    for rest, count in ((b"", 3), (post()[:-5], 3), (post()[:20], 3)):
        with connected(server) as sock:
            sock.sendall(post() * 3 + rest)
            sock.shutdown(socket.SHUT_WR)
            assert statuses(everything(sock)) == [b"200"] * count
    with connected(server) as sock:
        sock.sendall(post()[:-5])
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock) == b""


# Clients that send too much.


def test_pipelined_requests_are_bounded_and_none_that_is_taken_is_lost(manifest: Manifest) -> None:
    with running(manifest, gate=threading.Event()) as server, connected(server) as sock:
        sock.sendall(post() * (3 * MAX_PIPELINED))
        assert server.engine.entered.wait(10)
        server.engine.gate.set()
        answer = everything(sock)
        assert statuses(answer) == [b"200"] * (MAX_PIPELINED + 1)
        assert answer.count(b"connection: close") == 1
    with running(manifest) as server:
        assert statuses(raw(server.port, post() * (MAX_PIPELINED // 2) + LAST)) == [b"200"] * (MAX_PIPELINED // 2 + 1)
        assert statuses(raw(server.port, post(padded(900_000)) * 3 + LAST)) == [b"200"] * 4


@pytest.mark.parametrize(
    "flood",
    [b"a: b\r\n" * 5_000_000, b"a: " + b"b" * 30_000_000, b"a" * 30_000_000],
    ids=["lines", "a long line", "a long name"],
)
@pytest.mark.parametrize("where", ["headers", "trailers"])
def test_headers_and_trailers_without_end_are_refused(server: LiveServer, flood: bytes, where: str) -> None:
    head = b"POST /api/embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    data = head + (b"" if where == "headers" else b"\r\n5\r\nhello\r\n0\r\n") + flood
    answer = raw(server.port, data)
    assert statuses(answer) == [b"431"]
    message = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert "this limit is fixed" in message
    assert server("POST", "/api/embed", GOOD).status == 200


def test_who_goes_on_sending_is_cut_off_and_can_read_why(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.2)
    with connected(server) as sock:
        sock.sendall(b"POST /api/embed HTTP/1.1\r\nHost: x\r\na: " + b"b" * 100_000)
        begun_s = time.monotonic()
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() - begun_s < 10:
                sock.sendall(b"b")
                time.sleep(0.02)
        assert time.monotonic() - begun_s < 5
        assert statuses(sock.recv(1 << 16)) == [b"431"]


def test_idle_connections_are_closed(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, keep_alive_s=0.5)) as server, connected(server) as sock:
        for _ in range(3):  # Not while it is busy.
            sock.sendall(post())
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.1)
        assert everything(sock) == b""


def test_bytes_between_requests_do_not_keep_a_connection(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, request_timeout_s=0.5)) as server, connected(server) as sock:
        sock.sendall(post())
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"\r\n")
        assert everything(sock) == b""


@pytest.mark.parametrize("line", [b"POST", b"GET", b"HEAD"])
def test_a_small_answer_leaves_at_once(server: LiveServer, line: bytes) -> None:
    """A worker that is killed has answered, or has not: the head is in one packet with the body."""
    with connected(server) as sock:
        for number in range(1, 4):
            sock.sendall(post() if line == b"POST" else line + b" /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
            assert struct.unpack_from("I", info, 152)[0] == number  # tcpi_data_segs_in


# Clients that read nothing.


def test_who_reads_nothing_is_disconnected(manifest: Manifest) -> None:
    settings = Settings(port=0, response_timeout_s=0.5)
    with running(manifest, settings) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.settimeout(0.5)
            many = json.dumps({"inputs": ["w1"] * 1000}).encode()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    sock.sendall(post(many))
        wait_until(lambda: not server.server.server_state.connections, 20)
        assert server("POST", "/api/embed", GOOD).status == 200


def test_who_reads_slowly_is_not(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, response_timeout_s=2.0)) as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.settimeout(10)
        sock.sendall(post(json.dumps({"inputs": ["w1"] * 1000}).encode()) * 20 + LAST)
        found = b""
        begun_s = time.monotonic()
        while part := sock.recv(1 << 15):
            found += part
            if time.monotonic() - begun_s < 4:
                time.sleep(0.05)
        assert statuses(found) == [b"200"] * 21


@contextlib.contextmanager
def narrow(live: LiveServer) -> Iterator[socket.socket]:
    """A client whose system takes little: the rest of an answer waits in the server's."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", live.port))
        sock.settimeout(10)
        yield sock


def is_reset(sock: socket.socket) -> bool:
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    return False


@pytest.mark.parametrize("reads", [True, False])
def test_what_is_left_on_a_closed_connection_does_not_stay(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    monkeypatch.setattr(unread, "CHECK_EVERY_S", 0.1)
    many = json.dumps({"inputs": ["w1"] * 5000}).encode()
    with running(manifest, Settings(port=0, response_timeout_s=0.5)) as server, narrow(server) as sock:
        sock.sendall(post(many, b"Connection: close"))
        wait_until(lambda: server.server.server_state.total_requests and not server.server.server_state.connections)
        if reads:
            found = everything(sock)
            assert found.endswith(b"}}")
            assert found.count(b"[") == 5001
        else:
            time.sleep(2)
            assert is_reset(sock)
        wait_until(lambda: not any(unread._LEFT.values()))


def test_an_answer_that_waits_in_the_system_is_not_read(manifest: Manifest) -> None:
    many = json.dumps({"inputs": ["w1"] * 1000}).encode()
    with running(manifest, Settings(port=0, response_timeout_s=0.5)) as server, narrow(server) as sock:
        sock.sendall(post(many))
        wait_until(lambda: server.server.server_state.total_requests)
        (connection,) = server.server.server_state.connections
        assert not connection.transport.get_write_buffer_size()  # Nothing is left for the server to write.
        begun_s = time.monotonic()
        wait_until(lambda: not server.server.server_state.connections)
        assert time.monotonic() - begun_s < 5
        assert is_reset(sock)  # An end alone would wait behind the answer.


def test_answers_that_go_on_are_not_read(manifest: Manifest) -> None:
    """The system takes each of them; that says nothing of the client."""
    many = json.dumps({"inputs": ["w1"] * 2000}).encode()
    with running(manifest, Settings(port=0, response_timeout_s=1.0)) as server, narrow(server) as sock:
        begun_s = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begun_s < 10:
                sock.sendall(post(many))
                time.sleep(0.3)
        assert time.monotonic() - begun_s < 8


def test_who_reads_what_waits_in_the_system_is_not_idle(manifest: Manifest) -> None:
    many = json.dumps({"inputs": ["w1"] * 8000}).encode()
    settings = Settings(port=0, keep_alive_s=0.5, response_timeout_s=3.0)
    with running(manifest, settings) as server, narrow(server) as sock:
        sock.sendall(post(many))
        wait_until(lambda: server.server.server_state.total_requests)
        found = b""
        begun_s = time.monotonic()
        while not found.endswith(b"}}"):
            found += (part := sock.recv(1 << 15))
            assert part
            if time.monotonic() - begun_s < 4:
                time.sleep(0.2)
        assert found.count(b"[") == 8001


@pytest.mark.parametrize(("body", "kept"), [(GOOD, True), (b"{", False)])
def test_who_was_refused_is_not_idle_for_long(manifest: Manifest, body: bytes, kept: bool) -> None:
    with running(manifest, Settings(port=0, response_timeout_s=0.3)) as server, connected(server) as sock:
        sock.sendall(post() + post(body))
        wait_until(lambda: server.server.server_state.total_requests == 2)
        time.sleep(2.5)
        assert len(server.server.server_state.connections) == kept
        if kept:
            sock.sendall(post() + LAST)
        assert len(statuses(everything(sock))) == (4 if kept else 2)


# Drain.


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /em",
        post()[:-5],
        post(padded(100_000))[:-5],
        post(padded(1_200_000))[:1_000_000],
        post() + post()[:-5],
    ],
)
def test_a_drain_does_not_wait_for_half_a_request(
    manifest: Manifest, begun: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lifecycle, "RECEIVING_GRACE_S", 0.2)
    monkeypatch.setattr(lifecycle, "IDLE_GRACE_S", 0.1)
    with running(manifest) as server, connected(server) as sock:
        sock.sendall(begun)
        wait_until(lambda: server.server.server_state.connections)
        time.sleep(0.1)
        begun_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun_s < 5
        assert statuses(everything(sock)) == [b"200"] * (begun.count(b"POST ") - 1)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_drain_waits_for_a_request_that_arrives(manifest: Manifest) -> None:
    with running(manifest) as server, connected(server) as sock:
        data = post()
        sock.sendall(data[:-5])
        wait_until(lambda: server.server.server_state.tasks)
        server.terminate()
        time.sleep(0.3)
        sock.sendall(data[-5:])
        assert statuses(everything(sock)) == [b"200"]


def test_a_drain_does_not_wait_for_who_reads_nothing(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "READING_GRACE_S", 0.3)
    with running(manifest) as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.settimeout(0.5)
        many = json.dumps({"inputs": ["w1"] * 1000}).encode()
        with contextlib.suppress(OSError):
            for _ in range(100):
                sock.sendall(post(many))
        begun_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun_s < 10
