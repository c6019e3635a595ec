"""What one client, one text or one broken engine must not do to others; each was seen."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import (
    VOCABULARY,
    Client,
    FakeEngine,
    LiveServer,
    Reply,
    make_manifest,
    raw,
    running,
    token_ids,
    wait_until,
)

from deploy.bundle import Manifest
from deploy.server import sockets
from deploy.server.errors import ApiError
from deploy.server.http.protocol import MAX_HEADER_BYTES, MAX_HEADERS
from deploy.server.limits import bounds
from deploy.server.limits.bounds import Limits, Settings
from deploy.server.limits.callers import Caller, CallerLeft
from deploy.server.metrics import Metrics
from deploy.server.service import Service, batching, request, tokenizing
from deploy.server.service.batching import Batcher
from deploy.server.service.tokens import TextTokenizer
from deploy.server.service.work import Work

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"inputs": "w1 w2"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def server(manifest: Manifest) -> Any:
    with running(manifest) as live:
        yield live


def in_one_batch(server: LiveServer, *bodies: Any) -> list[Reply]:
    """Sends requests that share a batch; the engine waits in an earlier one meanwhile."""
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        first = pool.submit(server, "POST", "/api/embed", {"inputs": "w0"})
        assert server.engine.entered.wait(10)
        replies = []
        for body in bodies:
            before = server.batcher.queued_tokens
            replies.append(pool.submit(server, "POST", "/api/embed", body))
            wait_until(lambda before=before: server.batcher.queued_tokens > before)
        server.engine.gate.set()
        assert first.result().status == 200
        return [reply.result() for reply in replies]


# Texts and batches.


def test_a_text_without_a_finite_result_fails_its_own_request_only(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        running(manifest, gate=threading.Event(), infinite=VOCABULARY["w66"]) as server,
        caplog.at_level(logging.CRITICAL, "deploy.server"),
    ):
        good, bad, other = in_one_batch(server, GOOD, {"inputs": ["w1", "w2", "w66", "w3"]}, {"inputs": ["w5"] * 3})
        assert len(server.engine.batches) == 2
        assert (good.status, bad.status, other.status) == (200, 500, 200)
        assert bad.kind == "internal"
        assert "input 2: an embedding is not finite" in bad.json["error"]["message"]
        assert server.batcher.queued_tokens == 0
        assert server("POST", "/api/embed", GOOD).status == 200


def test_a_batch_that_fails_is_run_request_by_request(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    with (
        running(manifest, gate=threading.Event(), poison=VOCABULARY["w66"]) as server,
        caplog.at_level(logging.CRITICAL, "deploy.server"),
    ):
        good, bad, other = in_one_batch(server, GOOD, {"inputs": ["w1", "w66"]}, {"inputs": ["w5"] * 3})
        assert (good.status, bad.status, other.status) == (200, 500, 200)
        assert server.batcher.queued_tokens == 0


def test_batches_and_queue_hold_what_texts_cost(manifest: Manifest) -> None:
    """Texts of 3 tokens that cost 5 each, where a batch holds 12 and the queue 20."""
    gate = threading.Event()
    batches: list[int] = []

    class Engine:
        def cost(self, ids: Any) -> int:
            return 5

        def rest(self) -> None:
            pass

        def run(self, ids: Sequence[Any], options: Sequence[Any]) -> Sequence[Any]:
            batches.append(len(ids))
            assert gate.wait(20)
            return list(ids)

    counted: list[tuple[int, int]] = []

    async def run() -> None:
        batcher = Batcher(Engine, 12, 20, on_batch=lambda texts, tokens, longest: counted.append((texts, tokens)))
        await batcher.start()

        def submit(texts: int) -> Work:
            ids = [np.array([2, 5, 3])] * texts
            work = Work(ids, "options", asyncio.get_running_loop().create_future())
            batcher.submit(work)
            return work

        with pytest.raises(ApiError, match=r"at most 20 tokens in one request, got 25; .*masks add 10 to 15 tokens"):
            submit(5)
        work = submit(4)
        assert batcher.queued_tokens == 20
        with pytest.raises(ApiError, match="20 tokens are waiting and the queue holds 20"):
            submit(1)
        gate.set()
        assert len(await work.future) == 4
        assert batcher.queued_tokens == 0
        await batcher.close()

    asyncio.run(run())
    assert batches == [2, 2]
    assert counted == [(2, 6), (2, 6)]  # Metrics count tokens as they are.


# The engine thread.


def test_an_engine_thread_that_ends_ends_the_server(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    fake: dict[str, Any] = {"gate": threading.Event(), "death": VOCABULARY["w66"]}
    with caplog.at_level(logging.CRITICAL, "deploy.server"):
        server = LiveServer(manifest, Settings(port=0), FakeEngine(**fake))
        assert server.ready.wait(10)
        assert server("GET", "/ready").status == 200
        replies = in_one_batch(server, GOOD, {"inputs": "w66"}, GOOD)
        assert {reply.status for reply in replies} == {500}
        assert all("the engine has stopped" in reply.json["error"]["message"] for reply in replies)
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert server.server.exit_code == 1
    assert any("engine thread has ended" in record.message for record in caplog.records)
    assert not server.app.service.ready
    with pytest.raises(ApiError, match="engine has stopped"):
        server.app.service.check_ready()


# Tokenising.


class TellingTokenizer:
    """Says whose texts are encoded; those with w99 wait until the gate opens."""

    def __init__(self, inner: TextTokenizer) -> None:
        self.inner = inner
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.order: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, texts: Sequence[str], truncate: bool, first: int = 0) -> list[Any]:
        self.order.append(texts[0].split()[0])
        if "w99" in texts[0]:
            self.entered.set()
            assert self.gate.wait(20)
        return self.inner.encode(texts, truncate, first)


def long_text(word: str) -> str:
    return f"{word} " * (bounds.INLINE_CHARS // 3 + 10)


def test_a_long_request_does_not_keep_others_from_being_tokenised(manifest: Manifest) -> None:
    with running(manifest) as server:
        tokenizer = TellingTokenizer(server.app.service._tokenizer)
        server.app.service._tokenizer = tokenizer  # type: ignore[assignment]
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(server, "POST", "/api/embed", {"inputs": long_text("w99")})
            assert tokenizer.entered.wait(10)
            assert server("POST", "/api/embed", {"inputs": long_text("w1")}).status == 200
            tokenizer.gate.set()
            assert slow.result().status == 200
        assert server("GET", "/info").json["tokenization_workers"] >= 2


def test_long_requests_are_tokenised_in_turns(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "TURN_CHARS", len(long_text("w1")))
    with running(manifest) as server:
        inner = server.app.service
        inner._helpers.shutdown()
        inner._helpers = ThreadPoolExecutor(1)  # So that the order is that of the queue.
        tokenizer = TellingTokenizer(inner._tokenizer)
        inner._tokenizer = tokenizer  # type: ignore[assignment]
        with ThreadPoolExecutor(3) as pool:
            blocker = pool.submit(server, "POST", "/api/embed", {"inputs": long_text("w99")})
            assert tokenizer.entered.wait(10)
            large = pool.submit(server, "POST", "/api/embed", {"inputs": [long_text("w1")] * 6})
            wait_until(lambda: inner._helpers._work_queue.qsize() == 1)
            small = pool.submit(server, "POST", "/api/embed", {"inputs": long_text("w2")})
            wait_until(lambda: inner._helpers._work_queue.qsize() == 2)
            tokenizer.gate.set()
            assert [reply.result().status for reply in (blocker, large, small)] == [200] * 3
        assert tokenizer.order[:3] == ["w99", "w1", "w2"]
        assert tokenizer.order.count("w1") == 6
        # Messages count from the request's first text, not from that of the turn.
        texts = [long_text("w1")] * 3
        reply = server("POST", "/api/embed", {"inputs": [*(["w1"] * 3), *texts], "truncate": False})
        assert "input 3:" in reply.json["error"]["message"]
        short = "w1 " + " " * len(long_text("w1"))
        reply = server("POST", "/api/embed", {"inputs": [short, short, long_text("w1")], "truncate": False})
        assert "input 2:" in reply.json["error"]["message"]


def test_a_full_tokenising_backlog_names_its_own_limit(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "TOKENIZE_BACKLOG_CHARS", 5000)
    with running(manifest) as server:
        tokenizer = TellingTokenizer(server.app.service._tokenizer)
        server.app.service._tokenizer = tokenizer  # type: ignore[assignment]
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(server, "POST", "/api/embed", {"inputs": long_text("w99")})
            assert tokenizer.entered.wait(10)
            reply = server("POST", "/api/embed", {"inputs": long_text("w1")})
            assert (reply.status, reply.kind) == (429, "queue_full")
            assert "5000" in reply.json["error"]["message"]
            assert "characters are waiting to be tokenised" in reply.json["error"]["message"]
            assert "retry-after" in reply.headers
            tokenizer.gate.set()
            assert slow.result().status == 200


def test_what_finds_no_room_in_the_queue_is_not_tokenised(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be refused afterwards: while another one computes, or is tokenised; then there is room again."""
    words = bounds.INLINE_CHARS // 3 + 10
    with running(manifest, Settings(port=0, max_queue_tokens=20 * 16)) as server:
        inner = server.app.service
        tokenizer = TellingTokenizer(inner._tokenizer)
        inner._tokenizer = tokenizer  # type: ignore[assignment]
        admission = server.app.models[0].batcher.admission
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(server, "POST", "/api/embed", {"inputs": ["w99 " * words] * 12})
            assert tokenizer.entered.wait(10)
            reply = server("POST", "/api/embed", {"inputs": ["w1 " * words] * 12})
            assert (reply.status, reply.kind) == (429, "queue_full")
            message = reply.json["error"]["message"]
            assert f"{12 * 16} tokens are waiting or being tokenised, and the queue holds {20 * 16}" in message
            assert "retry-after" in reply.headers
            assert server("POST", "/api/embed", {"inputs": "w1 " * words}).status == 200  # There is room for it.
            tokenizer.gate.set()
            assert slow.result().status == 200
        assert tokenizer.order == ["w99", "w1"]
        assert admission._reserved == []
        reply = server("POST", "/api/embed", {"inputs": ["w1 " * words] * 21})  # More than there will ever be.
        assert (reply.status, reply.kind) == (413, "too_large")
        assert tokenizer.order == ["w99", "w1"]
        assert server("POST", "/api/embed", {"inputs": ["w2 " * words] * 12}).status == 200


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["a b c"], (3, 3)),
        (["a"], (1, 1)),
        ([""], (1, 1)),
        (["  a \n b  "], (2, 4)),
        (["unquestionably so"], (2, 8)),
        (["a " * 100], (8, 8)),
        (["\u6771\u4eac\u90fd"], (1, 3)),
        ([("a b", "c d e")], (5, 5)),
        ([("a " * 6, "b " * 6), "a"], (9, 9)),
    ],
)
def test_estimated_tokens(inputs: list[Any], expected: tuple[int, int]) -> None:
    assert tokenizing.estimate_tokens(inputs, 8) == expected


def test_what_nobody_looks_at_is_not_read_at_full_speed(manifest: Manifest) -> None:
    """A body of 1 GB, too long by its head, and what comes behind headers that are too many: both would take a core."""
    too_long = b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n"
    too_many = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 1000
    part = b"x" * (1 << 20)
    with running(manifest) as server:
        for head, status in ((too_long, b"413"), (too_many, b"431")):
            with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as sock:
                sock.sendall(head)
                sent, until_s = 0, time.monotonic() + 1.5
                while time.monotonic() < until_s:
                    with contextlib.suppress(TimeoutError):
                        sent += sock.send(part)
                sock.settimeout(5)
                assert statuses(sock.recv(1 << 16)) == [status]
            # 16 MB at once, 4 MB a second, and what the system keeps.
            assert 16 << 20 < sent < 40 << 20
        assert server("POST", "/api/embed", GOOD).status == 200


def test_pairs_are_tokenised_in_turns_like_texts(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones part by part on a helper thread, within the backlog; short ones at once."""
    parts: list[tuple[int, int, str]] = []

    class Tokenizer(TextTokenizer):
        def encode_pairs(self, pairs: Any, truncate: bool, first: int = 0, cut_left: bool | None = None) -> Any:
            parts.append((first, len(pairs), threading.current_thread().name.partition("_")[0]))
            return super().encode_pairs(pairs, truncate, first)

    class Engine(FakeEngine):
        def run(self, ids: Sequence[Any], options: Sequence[Any]) -> Sequence[Any]:
            return [text.types.tolist() for text in ids]

    async def run() -> None:
        batcher = Batcher(Engine, 1000, 100_000)
        await batcher.start()
        inner = Service(manifest, Tokenizer.from_manifest(manifest), batcher, Settings(), Metrics())

        def ask(pairs: list[tuple[str, str]], truncate: bool = True) -> Any:
            return inner.classify(pairs, Caller(), Limits(inputs=10, chars=50_000), truncate=truncate)

        assert (await ask([("w1 w2", "w3")])).values == [[0, 0, 1]]
        assert parts == [(0, 1, "MainThread")]
        long = ("w1 " * 1000, "w2 " * 1000)
        monkeypatch.setattr(request, "TURN_CHARS", 12_000)
        parts.clear()
        assert len((await ask([long] * 5)).values) == 5
        assert parts == [(0, 2, "helper"), (2, 2, "helper"), (4, 1, "helper")]
        with pytest.raises(ApiError, match="input 3: expected at most 16 tokens in a pair"):
            await ask([*[("w1", "w2" + " " * 6000)] * 3, long], truncate=False)
        with pytest.raises(ApiError, match="input 0: expected text, got a NUL"):
            ask([("w1", "w\0")])
        inner._tokenizing.chars = 1
        monkeypatch.setattr(tokenizing, "TOKENIZE_BACKLOG_CHARS", 6000)
        with pytest.raises(ApiError, match="1 characters are waiting to be tokenised"):
            await ask([long])
        inner.close()
        await batcher.close()

    asyncio.run(run())


# The wire.

BODY = json.dumps(GOOD).encode()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


def request_with(*lines: bytes, body: bytes = BODY, length: bool = True) -> bytes:
    fields = [b"Host: x", *lines, *([b"Content-Length: %d" % len(body)] if length else [])]
    return b"POST /api/embed HTTP/1.1\r\n" + b"".join(line + b"\r\n" for line in fields) + b"\r\n" + body


def statuses(answer: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)


def send_in_parts(port: int, parts: Sequence[bytes]) -> bytes:
    """Sends parts that the server reads one by one, and everything that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            sock.sendall(part)
            threading.Event().wait(0.002)  # Most often they arrive as they were sent; the answer is the same if not.
        found = []
        while data := sock.recv(1 << 16):
            found.append(data)
        return b"".join(found)


def assert_cut_off(port: int, data: bytes) -> None:
    """The server answers or closes the connection without waiting for the end of a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=4) as sock:  # Its own time-out is longer.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(data)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(1 << 16):
                found += part
    # An answer to a client that goes on sending can be lost.
    assert statuses(found) in ([b"431"], [b"400"], []), found[:300]


@pytest.mark.parametrize("name", [b"Upgrade", b"UPGRADE", b"upgrade", b"uPgRaDe"])
@pytest.mark.parametrize("value", [b"h2c", b"H2C", b"websocket"])
def test_offers_of_other_protocols_do_not_cost_the_body(server: LiveServer, name: bytes, value: bytes) -> None:
    offer = [b"Connection: Upgrade, HTTP2-Settings", name + b": " + value]
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    plain = request_with(*offer)
    chunked = request_with(*offer, b"Transfer-Encoding: chunked", body=CHUNKED, length=False)
    bare = b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n%s: %s\r\n\r\n" % (name, value)
    for parts in (
        [plain + last],
        [chunked + last],
        [bare + last],
        [plain + plain + chunked + bare + plain + last],
        [request_with() + plain + last],
        [plain[:60], plain[60:], last],
        [plain[: plain.index(name) + 3], plain[plain.index(name) + 3 :] + last],
        [plain[:-5], plain[-5:] + last],
        [chunked[:-20], chunked[-20:-6], chunked[-6:] + last],
    ):
        found = statuses(send_in_parts(server.port, parts))
        assert set(found) == {b"200"}, parts
        assert len(found) == sum(map(b"".join(parts).count, (b"POST ", b"GET "))), parts


def test_header_lines_are_bounded(server: LiveServer) -> None:
    def lines(count: int) -> list[bytes]:
        return [b"%x:y" % number for number in range(count)]

    fine = request_with(b"Connection: close", *lines(MAX_HEADERS - 3))
    assert statuses(raw(server.port, fine)) == [b"200"]
    for count in (MAX_HEADERS - 2, 10_000):
        answer = raw(server.port, request_with(b"Connection: close", *lines(count)))
        assert statuses(answer) == [b"431"]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "headers_too_large"
    for long in (MAX_HEADER_BYTES, 200_000, 2_000_000):
        assert_cut_off(server.port, request_with(b"X: " + b"y" * long, length=False)[: -len(BODY) - 4])
    large = request_with(b"Connection: close", body=json.dumps({"inputs": ["w1 " * 100] * 900}).encode())
    assert statuses(raw(server.port, large)) == [b"200"]  # A long body is no header.
    assert server("POST", "/api/embed", GOOD).status == 200


@pytest.mark.parametrize("scheme", [b"http", b"HTTP", b"https"])
def test_targets_as_proxies_are_sent_them(server: LiveServer, scheme: bytes) -> None:
    """RFC 9112, 3.2.2: every server takes them, with an empty path too, which is the root."""
    line = b"GET %s://[::1]:80%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    for rest, mark in ((b"", b"<!doctype"), (b"?a=/b", b"<!doctype"), (b"/?a", b"<!doctype"), (b"/health", b"status")):
        answer = raw(server.port, line % (scheme, rest))
        assert statuses(answer) == [b"200"], (rest, answer)
        assert mark in answer
    for target in (b"x:443", b"x"):
        assert statuses(raw(server.port, b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % target)) == [b"400"]
    assert server("POST", "/api/embed", GOOD).status == 200


def test_trailers_are_bounded_and_are_no_headers(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, api_key="sesame")) as server:
        chunk = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
        head = b"POST /api/embed HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n%s\r\n"
        key = b"Authorization: Bearer sesame\r\n"
        fine = raw(server.port, head % key + chunk + b"X: y\r\n\r\n")
        assert statuses(fine) == [b"200"]
        assert statuses(raw(server.port, head % b"" + chunk + key + b"\r\n")) == [b"401"]
        for trailers in (b"X: y\r\n" * 1_000_000, b"X: " + b"y" * 4_000_000, b"z" * 4_000_000):
            assert_cut_off(server.port, head % key + chunk + trailers)
        # Small chunks of a body are not framing to be bounded.
        many = b"".join(b"1\r\n%c\r\n" % byte for byte in json.dumps({"inputs": ["w1 w2"] * 1000}).encode())
        assert statuses(raw(server.port, head % key + many + b"0\r\n\r\n")) == [b"200"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /api/embed HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", b"400"),
        (b"POST /api/embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", b"501"),
        (
            b"GET /info HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"501",
        ),
        (b"POST /api/embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n", b"501"),
    ],
)
def test_what_http_forbids(server: LiveServer, head: bytes, status: bytes) -> None:
    found = statuses(raw(server.port, head))
    assert found in ([status], [b"400"])


def test_a_refusal_does_not_overtake_an_answer(manifest: Manifest) -> None:
    with running(manifest, gate=threading.Event()) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(request_with())
            assert server.engine.entered.wait(10)
            sock.sendall(b"nonsense\r\n\r\n")
            assert sock.recv(1 << 16) == b""  # Closed: an error here would be read as the first request's answer.
        wait_until(lambda: server.batcher.queued_tokens == 0)
        server.engine.gate.set()
        assert server("POST", "/api/embed", GOOD).status == 200


def test_work_of_pipelined_requests_is_dropped_when_their_client_leaves(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, max_batch_tokens=9), gate=threading.Event()) as server:
        many = json.dumps({"inputs": ["w9"] * 50}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(request_with(body=many) + request_with())
            assert server.engine.entered.wait(10)
            wait_until(lambda: server.batcher.queued_tokens == 150)
        wait_until(lambda: server.batcher.queued_tokens == 0)
        server.engine.gate.set()
        assert server("POST", "/api/embed", GOOD).status == 200
        assert sum(map(len, server.engine.batches)) < 10


# The process.

INTERRUPTED = """
import os, signal, sys, importlib.abc

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "deploy.server.main":
            print(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, flush=True)
            os.kill(os.getpid(), signal.{name})
            print("survived", flush=True)

sys.meta_path.insert(0, Interrupt())
from deploy.__main__ import main
sys.exit(main(["serve", "nowhere"]))
"""


def test_a_second_sigint_is_what_ends_requests(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deploy.server.lifecycle.os._exit", lambda code: None)  # Its engine is in a batch.
    engine = FakeEngine()
    server = LiveServer(manifest, Settings(port=0), engine)
    assert server.ready.wait(10)
    with Client(server.port) as client:
        client.send("POST", "/api/embed", {"inputs": "a"})
        wait_until(lambda: server.server.server_state.tasks)
        for _ in range(2):
            server.server.handle_exit(signal.SIGINT, None)
        wait_until(lambda: "not answered" in caplog.text)
    assert server.stop() == 1
    assert "1 requests were not answered before a second SIGINT" in caplog.text


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_before_anything_is_imported_ends_the_process(name: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED.replace("{name}", name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


LOADING = """
import pathlib, sys, threading
sys.path[:0] = sys.argv[1:3]
from server_harness import FakeEngine, LiveServer, Settings, make_manifest
loading = threading.Event()

def blocked():
    loading.set()
    threading.Event().wait()

server = LiveServer(make_manifest(pathlib.Path(sys.argv[3])), Settings(port=0), FakeEngine(), blocked)
loading.wait()
server.terminate()
server.thread.join()
"""


def test_a_server_that_is_told_to_stop_does_not_wait_for_its_engine(tmp_path: Path) -> None:
    """Importing torch takes seconds, and nothing was accepted: no reason to wait, nor to call it a failure."""
    command = [sys.executable, "-c", LOADING, str(ROOT), str(ROOT / "tests" / "deploy"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("option", "variable", "expected"),
    [
        (None, None, 8000),
        (None, "", 8000),
        (None, "9000", 9000),
        (7000, "9000", 7000),
        (0, "9000", 0),
        (7000, "x", 7000),
    ],
)
def test_port(option: int | None, variable: str | None, expected: int) -> None:
    from deploy.server.process import port_of

    assert port_of(option, {} if variable is None else {"PORT": variable}) == expected


@pytest.mark.parametrize(
    ("option", "variable", "named"), [(None, "x", "PORT"), (None, "70000", "PORT"), (-1, None, "--port")]
)
def test_wrong_port(option: int | None, variable: str | None, named: str) -> None:
    from deploy.server.process import UsageError, port_of

    with pytest.raises(UsageError, match=named):
        port_of(option, {} if variable is None else {"PORT": variable})


def test_the_server_listens_where_the_health_check_asks() -> None:
    """Both read PORT in the same way."""
    from deploy.server.process import port_of

    script = ROOT / "dockerfiles" / "healthcheck.py"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for value, expected in ((str(port), f"port {port}"), ("x", "PORT: expected"), ("70000", "PORT: expected")):
        environment = {**os.environ, "PORT": value}
        command = [sys.executable, "-I", "-S", str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert expected in done.stderr
    assert port_of(None, {"PORT": str(port)}) == port


@pytest.mark.parametrize("missing", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_a_name_is_listened_at_by_an_address_that_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    """`localhost` is ::1 first in many a container without IPv6."""
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    there = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))
    listen_at = sockets._listen_at

    def without_ipv6(family: int, address: Any, backlog: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(missing, os.strerror(missing))
        return listen_at(family, address, backlog)

    monkeypatch.setattr(sockets, "_listen_at", without_ipv6)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: [there, here])
    with sockets.listen("localhost", 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: [there])
    with pytest.raises(OSError, match=os.strerror(missing)):
        sockets.listen("localhost", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = (*here[:4], taken.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: [used, here])
        with pytest.raises(OSError, match="in use"):
            sockets.listen("localhost", 0)


def test_an_idle_engine_thread_keeps_nothing_of_its_last_batch() -> None:
    class Engine:
        def cost(self, ids: Any) -> int:
            return len(ids)

        def rest(self) -> None:
            pass

        def run(self, ids: Sequence[Any], options: Sequence[Any]) -> Sequence[Any]:
            return [None] * len(ids)

    async def run() -> None:
        batcher = Batcher(Engine, 1000, 1000)
        await batcher.start()
        ids = token_ids([1, 2, 3])
        kept = weakref.ref(ids)
        await batcher.compute(Work([ids], None, asyncio.get_running_loop().create_future()), Caller())
        del ids
        for _ in range(200):
            if kept() is None:
                break
            await asyncio.sleep(0.01)
            gc.collect()
        assert kept() is None
        await batcher.close()

    asyncio.run(run())


def test_an_idle_engine_frees_its_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "REST_AFTER_S", 0.02)
    called: list[str] = []

    class Engine:
        def cost(self, ids: Any) -> int:
            return len(ids)

        def run(self, ids: Sequence[Any], options: Sequence[Any]) -> Sequence[Any]:
            called.append("run")
            return [None] * len(ids)

        def rest(self) -> None:
            called.append("rest")

    async def run() -> None:
        batcher = Batcher(Engine, 1000, 1000)
        await batcher.start()
        for turn in (1, 2, 3):
            await asyncio.to_thread(wait_until, lambda turn=turn: called.count("rest") == turn)
            await asyncio.sleep(0.1)  # Five times as long as it waits: there is nothing more to free.
            if turn < 3:
                await batcher.compute(
                    Work([token_ids([1])], None, asyncio.get_running_loop().create_future()), Caller()
                )
        await batcher.close()

    asyncio.run(run())
    assert called == ["rest", "run", "rest", "run", "rest"]


def test_the_default_prompt_counts_among_the_characters_to_tokenise(manifest: Manifest) -> None:
    with running(manifest) as server:
        inner = server.app.service
        inner._tokenizing._prompt_chars = bounds.INLINE_CHARS
        aside = []
        tokenize = inner._tokenizing.in_parts

        async def note(request: Any, sizes: Sequence[int]) -> list[Any]:
            aside.append(list(request.inputs))
            return await tokenize(request, sizes)

        inner._tokenizing.in_parts = note  # type: ignore[method-assign]
        assert server("POST", "/api/embed", {"inputs": ["w1", "w2"]}).status == 200
        assert aside == [["w1", "w2"]]


def test_nothing_runs_for_a_client_that_left_before(manifest: Manifest) -> None:
    with running(manifest) as server:
        caller = Caller()
        caller.leave()

        async def ask() -> None:
            with pytest.raises(CallerLeft):
                await server.app.service.embed(["w1"], caller, Limits.of_texts(Settings()))

        asyncio.run(ask())
        assert server.engine.batches == []


# Small requests and large ones.


class Counted:
    """What an engine says that a text costs: its tokens."""

    def cost(self, ids: Any) -> int:
        return len(ids)

    def rest(self) -> None:
        pass


class Gated(Counted):
    """Notes the lengths of every batch, and runs none before its gate opens."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()

    def run(self, ids: Sequence[Any], options: Sequence[Any]) -> Sequence[Any]:
        self.batches.append([len(text) for text in ids])
        self.entered.set()
        assert self.gate.wait(20)
        return list(ids)


def test_small_requests_do_not_wait_behind_many_large_ones() -> None:
    """A small request waits for the batch that runs, and its own holds no text of a large one."""
    engine = Gated()
    batches = engine.batches

    async def run() -> None:
        batcher = Batcher(lambda: engine, 40, 10_000)
        await batcher.start()
        loop = asyncio.get_running_loop()
        large = [Work([np.zeros(20, np.int64)] * 5, None, loop.create_future()) for _ in range(30)]
        for work in large:
            batcher.submit(work)
        while not engine.entered.is_set():
            await asyncio.sleep(0.01)
        small = [Work([np.zeros(3, np.int64)], None, loop.create_future()) for _ in range(2)]
        for work in small:
            batcher.submit(work)
        engine.gate.set()
        await asyncio.gather(*(work.future for work in (*small, *large)))
        await batcher.close()

    asyncio.run(run())
    assert batches[0] in ([20], [20, 20])
    assert batches[1] == [3, 3] or batches[2] == [3, 3]
    assert sum(map(len, batches)) == 152


def test_large_requests_do_not_wait_behind_many_small_ones() -> None:
    engine = Gated()
    batches = engine.batches

    async def run() -> None:
        batcher = Batcher(lambda: engine, 40, 10_000)
        await batcher.start()
        loop = asyncio.get_running_loop()
        works = [Work([np.zeros(10, np.int64)], None, loop.create_future()) for _ in range(40)]
        works.insert(8, Work([np.zeros(40, np.int64)] * 2, None, loop.create_future()))
        for work in works:
            batcher.submit(work)
            while not engine.entered.is_set():
                await asyncio.sleep(0.01)
        engine.gate.set()
        await asyncio.gather(*(work.future for work in works))
        await batcher.close()

    asyncio.run(run())
    assert [40] in batches[1:3]
    assert batches[3:5].count([40]) == 1


def test_a_part_of_the_queue_is_for_small_requests() -> None:
    async def run() -> None:
        batcher = Batcher(lambda: None, 40, 800)  # type: ignore[arg-type,return-value]
        batcher.running = True
        batcher._engine = Counted()  # type: ignore[assignment]
        loop = asyncio.get_running_loop()

        def work(tokens: int) -> Work:
            return Work([np.zeros(tokens, np.int64)], None, loop.create_future())

        batcher.submit(work(650))
        with pytest.raises(ApiError, match="650 tokens are waiting"):
            batcher.submit(work(60))
        batcher.submit(work(50))
        for _ in range(10):
            batcher.submit(work(10))
        with pytest.raises(ApiError, match="800 tokens are waiting"):
            batcher.submit(work(10))
        for waiting in batcher.admission.all():
            batcher.abandon(waiting)
        batcher.submit(work(800))

    asyncio.run(run())
