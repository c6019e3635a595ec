"""What one request may cost, and all of them together: bytes held, numbers answered, and who says so."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import WIDTH, Client, LiveServer, make_manifest, raw, running, wait_until

from deploy.bundle import Manifest
from deploy.heap import give_back
from deploy.server import lifecycle
from deploy.server.errors import ApiError
from deploy.server.http import bodies, leaving
from deploy.server.limits import budget
from deploy.server.limits.bounds import Settings
from deploy.server.limits.budget import BODY_FACTOR, CONNECTION_BYTES, MemoryBudget
from deploy.server.limits.callers import Caller
from deploy.tasks.fill_mask import Filled

MB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("fake"))


def held(server: LiveServer) -> int:
    return server.app.service.budget.request_bytes


# Numbers of an answer.


def test_an_answer_with_too_many_numbers_is_refused_before_it_is_computed(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, max_values=10 * WIDTH)) as server:
        for path, field in (("/api/embed", "inputs"), ("/v1/embeddings", "input")):
            assert server("POST", path, {field: ["w1"] * 10}).status == 200
            server.engine.batches.clear()
            reply = server("POST", path, {field: ["w1"] * 11})
            message = reply.json["error"]["message"]
            assert (reply.status, reply.kind) == (413, "too_large")
            assert all(word in message for word in ("--max-values", str(10 * WIDTH), str(11 * WIDTH)))
            assert server.engine.batches == []
        ids = {"input": [[2, 5, 3]] * 11}
    with running(manifest, Settings(port=0, max_values=10 * WIDTH, accept_token_ids=True)) as server:
        assert server("POST", "/v1/embeddings", ids).status == 413
        wait_until(lambda: held(server) == 0)


def test_numbers_of_fill_mask_are_counted_by_its_masks(tmp_path: Path) -> None:
    settings = Settings(port=0, max_values=3 * 12)
    with running(make_manifest(tmp_path, "fill-mask", max_tokens=50), settings) as server:
        for body, asked in (
            ({"inputs": ["[MASK] [MASK] w1", "[MASK]"], "top_k": 5}, 45),
            ({"inputs": ["[MASK] " * 13], "top_k": 1}, 39),
            ({"inputs": "[MASK]", "top_k": 13}, 39),
        ):
            reply = server("POST", "/api/fill-mask", body)
            assert (reply.status, reply.kind) == (413, "too_large")
            assert f"at most 36 numbers in one answer, got {asked}; --max-values" in reply.json["error"]["message"]
        assert server.engine.batches == []


def test_numbers_of_labels_count(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path, "text-classification"), Settings(port=0, max_values=8)) as server:
        reply = server("POST", "/api/classify", {"inputs": ["w1"] * 3})
        assert (reply.status, reply.kind) == (413, "too_large")
        assert "got 12" in reply.json["error"]["message"]


def test_predictions_are_made_while_they_are_written() -> None:
    found = Filled(np.array([7, 5], np.int32), np.array([0.5, 0.25], np.float32), "t{}".format)
    expected = [{"token": "t7", "token_id": 7, "score": 0.5}, {"token": "t5", "token_id": 5, "score": 0.25}]
    assert list(found) == found[:] == expected
    assert json.loads(bodies.encode({"predictions": [[found, found]]})) == {"predictions": [[expected, expected]]}
    large = bodies.Large({"predictions": [[found]] * 9000, "model": "m"}, "predictions", 6)
    assert b"".join(bodies.parts(large)) == bodies.encode(large.body)


# Memory of all.


def test_memory_is_held_from_before_it_is_there_until_the_answer_is(manifest: Manifest) -> None:
    body = json.dumps({"inputs": ["w1" + " " * 20_000] * 20}).encode()
    with (
        running(manifest, Settings(port=0, max_memory_mb=5), gate=threading.Event()) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\n\r\n{")
            wait_until(lambda: held(server) == BODY_FACTOR * 400_000)
        wait_until(lambda: held(server) == 0)
        replies = [pool.submit(server, "POST", "/api/embed", body) for _ in range(2)]
        wait_until(lambda: held(server) > 2 * BODY_FACTOR * len(body))
        reply = server("POST", "/api/embed", body)
        assert (reply.status, reply.kind) == (429, "memory_full")
        assert int(reply.headers["retry-after"]) >= 1
        assert "--max-memory-mb" in reply.json["error"]["message"]
        assert "of at most 5" in reply.json["error"]["message"]
        assert b"serve_held_bytes 4" in server("GET", "/metrics").body
        server.engine.gate.set()
        assert [found.result().status for found in replies] == [200, 200]
        wait_until(lambda: held(server) == 0)
        assert server("POST", "/api/embed", body).status == 200
        # Chunked, without a length to tell.
        with Client(server.port) as client:
            chunks = (body[start : start + 9999] for start in range(0, len(body), 9999))
            client.connection.request("POST", "/api/embed", chunks, encode_chunked=True)
            assert client.read().status == 200
        # One that will never fit.
        reply = server("POST", "/api/embed", json.dumps({"inputs": ["w" + " " * 30_000] * 40}).encode())
        assert (reply.status, reply.kind) == (413, "too_large")
        assert "MB of memory for one request, got 6; --max-memory-mb" in reply.json["error"]["message"]
        wait_until(lambda: held(server) == 0)


def test_memory_of_refused_and_failed_requests_is_given_back(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, max_queue_tokens=100)) as server:
        chunked = b"POST /api/embed HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        for data in (
            chunked + b"5\r\nhello\r\n0\r\n\r\n",
            chunked + b"5\r\nhello\r\nx",
            b"POST /api/embed HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n\r\n{}]",
        ):
            assert raw(server.port, data).startswith(b"HTTP/1.1 4")
        for body in ({"inputs": ["w1"] * 50}, {"inputs": ["w1"] * 2000}, {"input": 1}):
            assert server("POST", "/api/embed", body).status in (413, 422)
        wait_until(lambda: held(server) == 0)


def test_connections_and_what_they_do_not_read_count(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, max_memory_mb=1, keep_alive_s=100)) as server:
        open_ones = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(70)]
        wait_until(lambda: server.app.service.budget.connection_bytes > MB)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n" + b'{"inputs": "w1"}')
            assert b" 429 " in sock.recv(1 << 16)
        assert server("GET", "/health").status == 200
        for sock in open_ones:
            sock.close()
        wait_until(lambda: server.app.service.budget.connection_bytes < MB)
        assert server("POST", "/api/embed", {"inputs": "w1"}).status == 200


def test_the_budget_is_half_of_what_there_is_unless_it_is_set() -> None:
    made = MemoryBudget.of(None, lambda: "1")
    made.settle(None)
    assert made.limit_bytes > 1 << 40
    made.settle(600 * MB)
    assert made.limit_bytes == 300 * MB
    made = MemoryBudget.of(None, lambda: "1")
    made.settle(0)
    assert made.limit_bytes == budget.LEAST_BYTES
    made = MemoryBudget.of(7, lambda: "1")
    made.settle(600 * MB)
    assert made.limit_bytes == 7 * MB


def test_memory_is_returned_after_large_requests_only() -> None:
    made = MemoryBudget.of(200, lambda: "1")

    def run(size: int, others: int = 0) -> bool:
        caller, other = Caller(), Caller()
        made.hold(caller, size)
        made.hold(other, others)
        made.release(caller)
        due = made.trim_due()
        made.release(other)
        return due

    assert not run(1000)
    assert run(MB)
    # Once more when it has been quiet for some seconds: others may have held the rest.
    assert [made.trim_due() for _ in range(2 * budget.QUIET_CHECKS)].count(True) == 1
    assert run(MB)
    assert not any(made.trim_due() for _ in range(budget.QUIET_CHECKS - 1))
    busy = Caller()
    made.hold(busy, MB)
    assert not made.trim_due()
    made.release(busy)
    assert made.trim_due()
    assert not any(made.trim_due() for _ in range(budget.QUIET_CHECKS - 1))
    assert not run(MB, others=10_000)
    assert run(128 * MB, others=10_000)
    with pytest.raises(ApiError, match="--max-memory-mb"):
        made.hold(Caller(), 201 * MB)
    assert made.held_bytes == 0
    give_back()


_BURST = """
import os, threading

from deploy.heap import give_back
from deploy.server.limits.budget import settle_malloc

def resident_kb():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 10

def burst():
    blocks = [bytes([1]) * (100 << 10) for _ in range(200)]  # 20 MB; none is large enough to be mapped by itself.
    blocks.clear()
    done.set()
    ended.wait()

settle_malloc()
done, ended = threading.Event(), threading.Event()
large = bytes([1]) * (24 << 20)  # From now on, the allocator keeps what is smaller.
del large
give_back()
before = resident_kb()
thread = threading.Thread(target=burst)
thread.start()
done.wait()
give_back()
print(resident_kb() - before)
ended.set()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory in this way")
def test_a_burst_on_another_thread_leaves_no_memory_behind() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def left_kb(**more: str) -> int:
        command = [sys.executable, "-c", _BURST]
        return int(subprocess.check_output(command, cwd=ROOT, env={**environment, **more}, text=True))

    assert left_kb() < 3 << 10
    assert left_kb(MALLOC_TRIM_THRESHOLD_=str(64 << 20)) > 6 << 10  # Who sets it wants it.


def test_a_server_settles_its_allocator(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[str] = []
    monkeypatch.setattr(lifecycle, "settle_malloc", lambda: settled.append(threading.current_thread().name))
    with running(manifest, Settings(port=0)):
        assert len(settled) == 1
        assert settled != [threading.main_thread().name]  # It takes some ms, while the model is loaded.


@pytest.mark.parametrize("kind", ["answered", "wrong", "full", "late"])
def test_requests_leave_no_garbage(manifest: Manifest, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever refers to itself stays until Python's collector comes, which holds everybody up."""
    body = {"inputs": 1 if kind == "wrong" else "w1 w2"}
    status = {"answered": 200, "wrong": 422, "full": 429, "late": 429}[kind]
    with running(manifest, Settings(port=0, max_queue_tokens=1000)) as server, Client(server.port) as client:
        admission = server.batcher.admission
        assert client("POST", "/api/embed", {"inputs": "w1"}).status == 200
        if kind == "full":
            admission.line_costs[0] = 999
        if kind == "late":
            admission.line_costs[0] = 10
            admission.speed.known = True
            monkeypatch.setattr(type(admission.speed), "cost_per_s", 1.0)
            monkeypatch.setattr(admission.speed, "line_cost_per_s", lambda line: 1.0)
        for _ in range(20):
            assert client("POST", "/api/embed", body).status == status
        gc.collect()
        gc.disable()
        try:
            for _ in range(100):
                client("POST", "/api/embed", body)
            assert gc.collect() < 100
        finally:
            gc.enable()


# Large answers.


def test_a_large_answer_waits_for_its_reader(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 MB, a client that reads nothing is sent what the sockets take, and one part waits in the server."""
    made: list[int] = []
    encode_part = bodies.encode_part

    def padded(items: Sequence[Any]) -> bytes:
        made.append(len(items))
        return encode_part(items) + b" " * MB

    monkeypatch.setattr(bodies, "encode_part", padded)
    monkeypatch.setattr(leaving, "WHOLE_BYTES", 0)
    many = json.dumps({"inputs": ["w1"] * 20_000}).encode()
    with running(manifest, Settings(port=0, max_inputs=20_000)) as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.settimeout(10)
        sock.sendall(
            b"POST /api/embed HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(many) + many
        )
        wait_until(lambda: server.server._connections)
        (connection,) = server.server._connections
        wait_until(lambda: made and connection.unsent_bytes)
        threading.Event().wait(0.3)
        assert 1 <= len(made) < 15
        assert connection.unsent_bytes < 1.5 * MB
        assert held(server) > 0
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"transfer-encoding: chunked" in answer
        assert b"content-length" not in answer
        assert answer.endswith(b"\r\n0\r\n\r\n")
        assert sum(made) == 20_000
        wait_until(lambda: held(server) == 0)


def test_an_answer_is_encoded_before_it_leaves(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is killed then loses an answer only in the moment in which it leaves."""
    encode_part = bodies.encode_part
    monkeypatch.setattr(bodies, "encode_part", lambda items: encode_part(items) + b" " * (MB // 2))
    many = json.dumps({"inputs": ["w1"] * 20_000}).encode()
    head = b"POST /api/embed HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(many)
    with running(manifest, Settings(port=0, max_inputs=20_000)) as server:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.settimeout(10)
            sock.sendall(head + many)
            wait_until(lambda: server.app._leaving._waiting_bytes)
            waiting_bytes = server.app._leaving._waiting_bytes
            monkeypatch.setattr(leaving, "ALL_BYTES", waiting_bytes + 1)
            # There is no room for another one.
            assert server("POST", "/api/embed", {"inputs": ["w1"] * 20_000}).headers["transfer-encoding"] == "chunked"
            start, _, body = b"".join(iter(lambda: sock.recv(1 << 16), b"")).partition(b"\r\n\r\n")
        assert start.startswith(b"HTTP/1.1 200 ")
        assert b"content-length: %d" % len(body) in start
        assert len(body) == waiting_bytes > bodies.INLINE_BYTES
        assert len(json.loads(body)["embeddings"]) == 20_000
        wait_until(lambda: not server.app._leaving._waiting_bytes)
        assert "content-length" in server("POST", "/api/embed", {"inputs": ["w1"] * 20_000}).headers


@pytest.mark.parametrize(("limit_bytes", "whole"), [(8 * 11_999, False), (8 * 12_000, True)])
def test_little_memory_has_room_for_fewer_encoded_answers(limit_bytes: int, whole: bool) -> None:
    large = bodies.Large({"": list(range(1000))}, "", 1)  # About 12,000 bytes.

    async def aside(function: Callable[..., bytes], *arguments: Any) -> bytes:
        return function(*arguments)

    begun = leaving.Leaving(MemoryBudget(limit_bytes, lambda: "1")).begin(large, aside, in_chunks=True)
    data, rest = asyncio.run(begun)
    assert (rest is None) == whole
    assert json.loads(b"".join((data, *(rest or ())))) == list(range(1000))


def test_a_client_that_leaves_a_large_answer(manifest: Manifest) -> None:
    many = json.dumps({"inputs": ["w1"] * 20_000}).encode()
    with running(manifest, Settings(port=0, max_inputs=20_000)) as server:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(many) + many)
            sock.recv(100)
        wait_until(lambda: held(server) == 0 and not server.server.server_state.tasks)
        assert server("POST", "/api/embed", {"inputs": "w1"}).status == 200


def test_a_large_answer_to_a_client_that_knows_no_chunks(manifest: Manifest) -> None:
    many = json.dumps({"inputs": ["w1"] * 20_000}).encode()
    with running(manifest, Settings(port=0, max_inputs=20_000)) as server:
        answer = raw(
            server.port, b"POST /api/embed HTTP/1.0\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(many) + many
        )
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert len(json.loads(body)["embeddings"]) == 20_000


def test_connections_that_have_ended_leave_memory_behind() -> None:
    made = MemoryBudget(1 << 30, lambda: "1")
    for count in (10, 100, 90, 60, 100):  # Some come and go all the time.
        made.hold_connections(count * CONNECTION_BYTES)
        assert made.connection_bytes == count * CONNECTION_BYTES
        assert not made.trim_due()
    made.hold_connections(20 * CONNECTION_BYTES)
    assert made.trim_due()
    assert not made.trim_due()
    made.hold_connections(0)
    assert not made.trim_due()
