"""Loading again: on SIGHUP and at the operator's address, in one process and with workers."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import signal
import socket
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from deploy.server.admin import Admin, NotNowError
from deploy.server.process import UsageError, open_admin
from deploy.server.service.batching import Batcher
from tests.deploy.server_harness import Client, Reply, wait_until
from tests.deploy.test_workers import BundleMaker, Load, copy, workers


def ask(port: int, method: str = "POST", path: str = "/admin/reload", **headers: str) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, None, headers)
    answer = connection.getresponse()
    return Reply(answer.status, dict(answer.getheaders()), answer.read())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def rename(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["name"] = name
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("count", [None, 2])
def test_a_reload_loses_nothing_and_a_broken_bundle_changes_nothing(
    tiny_bundle: BundleMaker, tmp_path: Path, count: int | None
) -> None:
    bundle = copy(tiny_bundle("bert", "feature-extraction"), tmp_path)
    admin = free_port()
    options = ("--model", f"second={bundle}", "--admin-address", f"127.0.0.1:{admin}")
    with workers(bundle, *options, workers=count) as server:
        before = server.pids
        with Load(server) as load:
            load.go_on(20)
            rename(bundle, "another")
            told = ask(admin)
            assert (told.status, told.json["status"]) == (200, "reloaded")
            assert told.json["serving"].startswith("another (feature-extraction, torch_ext-bf16), second (")
            assert server.read_line().startswith("reloaded, serving another (feature-extraction), second (")
            load.go_on(20)
            with Client(server.port) as client:
                assert client("GET", "/v1/models").json["data"][0]["id"] == "another"
            rename(bundle, "a third")
            server.process.send_signal(signal.SIGHUP)
            assert server.read_line().startswith("reloaded, serving a third (feature-extraction), second (")
            load.go_on(20)
            weights = bundle / "encoder_bf16.safetensors"
            sound = weights.read_bytes()
            weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
            told = ask(admin)
            assert told.status == 422
            assert "SHA-256" in told.json["error"]["message"]
            assert told.json["error"]["message"].endswith("; what was served before is served on")
            assert server.process.stderr is not None
            assert "nothing was loaded again, and what was before stays: " in server.process.stderr.readline()
            load.go_on(20)
        assert not load.broken
        assert not load.wrong
        with Client(server.port) as client:
            assert client("GET", "/v1/models").json["data"][0]["id"] == "a third"
            assert client("POST", "/models/second/embed", {"inputs": "a"}).status == 200
        assert (server.pids == before) == (count is None)
        if count is not None:
            assert server.metric("serve_reloads_total") == 2
        assert server.stop() == (0, "")


def test_an_engine_that_is_replaced_is_let_go() -> None:
    class Engine:
        def cost(self, ids: Any) -> int:
            return 1

        def rest(self) -> None:
            pass

        def run(self, ids: Any, options: Any) -> Any:
            return ids

    async def run() -> None:
        batcher = Batcher(Engine, 10, 10)
        await batcher.start()
        engine = weakref.ref(batcher._engine)
        gc.disable()
        try:
            await batcher.close()
            assert engine() is None
        finally:
            gc.enable()

    asyncio.run(run())


# ---- the operator's address ------------------------------------------------------------------------------------------


class Operator:
    """An address whose reloads end as a test says."""

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.sock.getsockname()[1])
        self.asked: list[Future[str]] = []
        self.admin = Admin(self.sock, self.reload)

    def reload(self) -> Future[str]:
        self.asked.append(Future())
        return self.asked[-1]

    def __call__(self, end: Any) -> Reply:
        replies: list[Reply] = []
        thread = threading.Thread(target=lambda: replies.append(ask(self.port)))
        before = len(self.asked)
        thread.start()
        wait_until(lambda: len(self.asked) > before)
        end(self.asked[-1])
        thread.join(10)
        return replies[0]


@pytest.fixture
def operator() -> Iterator[Operator]:
    made = Operator()
    yield made
    made.admin.close()


def test_an_operator_is_told_what_happened(operator: Operator) -> None:
    told = operator(lambda asked: asked.set_result("a (b, c)"))
    assert (told.status, told.json) == (200, {"status": "reloaded", "serving": "a (b, c)"})
    told = operator(lambda asked: asked.set_exception(ValueError("no\nweights")))
    assert told.status == 422
    assert told.json["error"] == {
        "type": "not_reloaded",
        "message": "no weights; what was served before is served on",
    }
    assert operator(lambda asked: asked.set_exception(NotNowError("it starts"))).status == 503
    assert operator(lambda asked: asked.cancel()).status == 503


def test_nobody_else_is_answered(operator: Operator) -> None:
    assert ask(operator.port, "GET").status == 405
    assert ask(operator.port, "GET", "/").status == 404
    assert ask(operator.port, "POST", "/metrics").status == 404
    # A page that an operator has open may send what it likes, but not without this header.
    assert ask(operator.port, Origin="http://elsewhere").status == 403
    assert not operator.asked


def test_an_address_that_cannot_be_used() -> None:
    with pytest.raises(UsageError, match="--admin-address: cannot listen on nonsense"):
        open_admin("nonsense")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="expected HOST:PORT"):
        open_admin(f"127.0.0.1:{taken.getsockname()[1]}")
