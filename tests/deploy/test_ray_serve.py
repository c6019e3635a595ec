"""The Ray Serve application without Ray: what a replica does with a request.

benchmarks/ray_cluster.py runs it on a cluster of Ray.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import ray_serve
from deploy.ray_serve import Loaded, Options, Replica, app, load

TEXTS = {"inputs": ["what is a quota?", "rounded down"]}


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(tiny_bundle: Callable[[str, str], Path]) -> Path:
    return tiny_bundle("bert", "feature-extraction")


@pytest.fixture(scope="module")
def loaded(folder: Path, loop: asyncio.AbstractEventLoop) -> Iterator[list[Loaded]]:
    """One bundle, in a list that may be emptied."""
    held = [loop.run_until_complete(load(folder, Options(bundle=str(folder))))]
    yield held
    held.clear()
    settle(loop)


def settle(loop: asyncio.AbstractEventLoop) -> None:
    """What closes behind an object that nobody holds."""
    gc.collect()
    loop.run_until_complete(asyncio.sleep(0.01))
    while ray_serve._CLOSING:
        loop.run_until_complete(asyncio.wait(set(ray_serve._CLOSING)))


async def ask(
    to: Any, path: str, body: object = None, headers: dict[str, str] | None = None, root: str = "", leave: bool = False
) -> tuple[int, Any]:
    """A request by ASGI, as Ray hands it over: the body in two parts, then silence until the client leaves."""
    data = b"" if body is None else json.dumps(body).encode()
    parts = [data[: len(data) // 2], data[len(data) // 2 :]]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        if not leave:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET" if body is None else "POST",
        "path": root + path,
        "root_path": root,
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
    }
    await to(scope, receive, send)
    if not sent:
        return 0, None
    return sent[0]["status"], json.loads(b"".join(part["body"] for part in sent[1:]))


def test_answers(loop: asyncio.AbstractEventLoop, loaded: list[Loaded], folder: Path) -> None:
    async def model(name: str) -> Loaded:
        return loaded[0]

    replica = Replica(Options(bundle=str(folder)), model)
    loop.run_until_complete(replica.start())
    status, answer = loop.run_until_complete(ask(replica, "/api/embed", TEXTS, {"Content-Type": "application/json"}))
    assert (status, len(answer["embeddings"])) == (200, 2)
    # Behind a route prefix; other dialects; errors in their form.
    assert loop.run_until_complete(ask(replica, "/api/embed", TEXTS, root="/minilm")) == (200, answer)
    assert loop.run_until_complete(ask(replica, "/v1/embeddings", {"input": "x"}))[1]["object"] == "list"
    assert loop.run_until_complete(ask(replica, "/ready")) == (200, {"status": "ready"})
    assert loop.run_until_complete(ask(replica, "/nope"))[0] == 404
    replica.check_health()


def test_a_client_that_leaves_is_not_answered(loop: asyncio.AbstractEventLoop, loaded: list[Loaded]) -> None:
    many = {"inputs": ["word " * 10] * 400}
    assert loop.run_until_complete(ask(loaded[0].answer, "/embed", many, leave=True)) == (0, None)


def test_lifespan(loop: asyncio.AbstractEventLoop, folder: Path) -> None:
    messages, sent = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}], []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])

    replica = Replica(Options(bundle=str(folder)), lambda name: pytest.fail("nothing is asked for"))
    loop.run_until_complete(replica({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_bundles_by_name(loop: asyncio.AbstractEventLoop, loaded: list[Loaded], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(folder)
    (tmp_path / "two").symlink_to(folder)
    names: list[str] = []
    asked = [""]

    async def model(name: str) -> Loaded:
        names.append(name)
        return loaded[0]

    replica = Replica(Options(bundles=str(tmp_path)), model, lambda: asked[0])
    loop.run_until_complete(replica.start())
    assert names == []  # Until they are asked for.
    for asked[0] in ("two", "one"):
        assert loop.run_until_complete(ask(replica, "/embed", TEXTS))[0] == 200
    assert names == ["two", "one"]
    for asked[0] in ("", "three", "../one"):
        status, answer = loop.run_until_complete(ask(replica, "/embed", TEXTS))
        assert status == 404
        assert "one, two in the header serve_multiplexed_model_id" in answer["error"]["message"]
    assert names == ["two", "one"]  # None was loaded, and none dropped for it.


def test_a_bundle_that_is_dropped_ends_after_its_requests(loop: asyncio.AbstractEventLoop, folder: Path) -> None:
    async def drop() -> tuple[int, Any]:
        held = [await load(folder, Options(bundle=str(folder)))]
        engines.extend(held[0]._batchers)
        request = asyncio.create_task(ask(held[0].answer, "/embed", TEXTS))
        await asyncio.sleep(0)
        held.clear()
        return await request

    engines: list[Any] = []
    assert loop.run_until_complete(drop())[0] == 200
    settle(loop)
    assert not engines[0]._thread.is_alive()


def test_health_follows_the_engine(loop: asyncio.AbstractEventLoop, folder: Path) -> None:
    class Dead:
        failure = RuntimeError("out of memory")

    async def model(name: str) -> Any:
        return Dead()

    replica = Replica(Options(bundle=str(folder)), model)
    loop.run_until_complete(replica.start())
    with pytest.raises(RuntimeError, match="out of memory"):
        replica.check_health()


def test_what_cannot_be_served(loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    options = Options(bundles=str(tmp_path))
    replica = Replica(options, lambda name: load(options.folder(name), options), lambda: "empty")
    status, answer = loop.run_until_complete(ask(replica, "/embed", TEXTS))
    assert (status, answer["error"]["kind"]) == (500, "internal")
    assert "empty cannot be served: " in answer["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "bundle=FOLDER"),
        ({"bundle": "a", "bundles": "b"}, "bundle=FOLDER"),
        ({"bundle": "a", "cpu": 4}, "expected arguments among bundle, bundles, options, cpus.* got cpu"),
        ({"bundle": "a", "cpus": "many"}, "cpus: expected a whole number, got 'many'"),
        ({"bundle": "a", "cpus": "0"}, "cpus: expected 1 or more"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options.of(arguments)


def test_arguments_of_the_command_line() -> None:
    assert Options.of({"bundle": "a", "cpus": "4"}) == Options(bundle="a", cpus=4)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"^the package ray is missing; .*pip install 'ray\[serve\]") as error:
        app({"bundle": "a"})
    assert "\n" not in str(error.value)
