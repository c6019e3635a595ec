"""`--cache-mb`: what is computed once, what is not kept, and that nobody pays for another one's errors."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deploy.bundle import Manifest
from deploy.engines.batch import FilledIds, PairIds
from deploy.engines.open import load_engine
from deploy.folder.describe import describe_folder
from deploy.server.limits.bounds import Settings
from deploy.server.limits.callers import Caller
from deploy.server.metrics import Metrics
from deploy.server.service.batching import Batcher
from deploy.server.service.cache import Cache, _key
from deploy.server.service.work import Work
from deploy.tasks.feature_extraction import EmbedOptions, TokenVectorOptions
from tests.deploy.server_harness import Client, LiveServer, expected_row, make_manifest, running, wait_until
from tests.deploy.test_observe import sample


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_manifest(tmp_path)


def cached(manifest: Manifest, **engine: Any) -> Any:
    return running(manifest, Settings(port=0, cache_mb=1, max_batch_tokens=engine.pop("budget", 2048)), **engine)


def counts(server: LiveServer) -> dict[str, float]:
    names = ("hit", "joined", "computed")
    return {name: sample(server, f'serve_cache_texts_total{{result="{name}"}}') for name in names}


def texts_run(server: LiveServer) -> int:
    return sum(map(len, server.engine.batches))


def test_a_text_is_computed_once(manifest: Manifest) -> None:
    with cached(manifest) as server:
        first = server("POST", "/embed", {"inputs": ["w1", "w2", "w1"]})
        again = server("POST", "/embed", {"inputs": ["w2", "w3", "w1"]})
        assert server.engine.batches == [[[2, 6, 3], [2, 7, 3]], [[2, 8, 3]]]
        assert [first.json[place] for place in (1, 0, 0)] == [again.json[0], again.json[2], first.json[2]]
        assert again.headers["x-compute-tokens"] == "9"  # As without a cache.
        # Other options are another result; the same ones of another dialect are not.
        server("POST", "/embed", {"inputs": "w1", "normalize": False})
        server("POST", "/embed", {"inputs": "w1", "dimensions": 4})
        assert texts_run(server) == 5
        server("POST", "/v1/embeddings", {"input": "w1"})
        assert texts_run(server) == 5
        assert counts(server) == {"hit": 3, "joined": 0, "computed": 5}
        assert 5 * 500 < sample(server, "serve_cache_bytes") < 5 * 1000


def test_without_the_option_nothing_is_kept(manifest: Manifest) -> None:
    with running(manifest) as server:
        for _ in range(2):
            server("POST", "/embed", {"inputs": ["w1", "w1"]})
        assert texts_run(server) == 4


def test_token_types_and_options_are_part_of_the_key() -> None:
    ids, types, others = array("q", [2, 5, 3]), array("q", [0, 0, 0]), array("q", [0, 1, 1])
    options = (EmbedOptions(True), EmbedOptions(False), EmbedOptions(True, 4), TokenVectorOptions())
    texts = (ids, PairIds(ids, types), PairIds(ids, others), others, FilledIds(ids, 1), FilledIds(ids, 2))
    assert len({_key(text, option) for text in texts for option in options}) == 24
    assert _key(PairIds(ids, types), EmbedOptions(True)) == _key(PairIds(ids[:], types[:]), EmbedOptions(True))


@pytest.fixture
def held(manifest: Manifest) -> Iterator[LiveServer]:
    """A server whose engine waits for its gate, with one batch in it."""
    gate = threading.Event()
    with cached(manifest, gate=gate) as server, Client(server.port) as client:
        client.send("POST", "/embed", {"inputs": "w99"})
        assert server.engine.entered.wait(10)
        yield server
        gate.set()
        assert client.read().status == 200


def test_what_is_being_computed_is_waited_for(held: LiveServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(held, "POST", "/embed", {"inputs": ["w1", f"w{number}"]}) for number in range(2, 10)]
        wait_until(lambda: held.app.service._running == 9)
        held.engine.gate.set()
        replies = [future.result() for future in asked]
    assert {reply.status for reply in replies} == {200}
    assert len({str(reply.json[0]) for reply in replies}) == 1
    assert texts_run(held) == 10
    assert counts(held) == {"hit": 0, "joined": 7, "computed": 10}


def test_who_leaves_takes_nothing_from_the_others(held: LiveServer) -> None:
    with Client(held.port) as first, Client(held.port) as second, Client(held.port) as third:
        first.send("POST", "/embed", {"inputs": ["w1"]})
        wait_until(lambda: held.app.service._running == 2)
        second.send("POST", "/embed", {"inputs": ["w1"]})
        third.send("POST", "/embed", {"inputs": ["w1"]})
        wait_until(lambda: held.app.service._running == 4)
        first.connection.close()
        wait_until(lambda: held.app.service._running == 3)
        third.connection.close()
        wait_until(lambda: held.app.service._running == 2)
        held.engine.gate.set()
        reply = second.read()
    assert (reply.status, reply.json) == (200, [expected_row([2, 6, 3])])
    assert held.engine.batches == [[[2, 104, 3]], [[2, 6, 3]]]


def test_errors_are_not_shared(manifest: Manifest) -> None:
    gate = threading.Event()
    with cached(manifest, gate=gate, poison=6) as server, Client(server.port) as one, Client(server.port) as other:
        one.send("POST", "/embed", {"inputs": ["w1"]})
        assert server.engine.entered.wait(10)
        other.send("POST", "/embed", {"inputs": ["w1", "w2"]})
        wait_until(lambda: server.app.service._running == 2)
        gate.set()
        assert one.read().status == other.read().status == 424
        server.engine.poison = -1  # It was a fault of the moment.
        assert server("POST", "/embed", {"inputs": ["w1"]}).status == 200
        server.engine.infinite = 8
        reply = server("POST", "/embed", {"inputs": ["w1", "w2", "w3"]})
        assert "input 2: " in reply.json["error"]  # By its place in the request, not among what was computed.


def test_a_deadline_is_that_of_who_waits(held: LiveServer) -> None:
    with Client(held.port) as first:
        first.send("POST", "/embed", {"inputs": ["w1"]})
        wait_until(lambda: held.app.service._running == 2)
        assert held("POST", "/embed", {"inputs": ["w1"]}, X_Request_Timeout_Ms="50").status == 504
        held.engine.gate.set()
        assert first.read().status == 200


def test_a_small_request_does_not_wait_for_a_large_one(manifest: Manifest) -> None:
    gate = threading.Event()
    with cached(manifest, gate=gate, budget=16) as server, Client(server.port) as large, Client(server.port) as small:
        large.send("POST", "/embed", {"inputs": [f"w{number}" for number in range(12)]})
        assert server.engine.entered.wait(10)
        small.send("POST", "/embed", {"inputs": ["w11"]})  # The last of the large one.
        wait_until(lambda: server.app.service._running == 2)
        gate.set()
        assert small.read().json == large.read().json[-1:] == [expected_row([2, 16, 3])]
        places = [index for index, batch in enumerate(server.engine.batches) if [2, 16, 3] in batch]
        assert places == [1, len(server.engine.batches) - 1]


def test_it_is_bounded_by_bytes() -> None:
    class Engine:
        def cost(self, ids: Any) -> int:
            return len(ids)

        def rest(self) -> None:
            pass

        def run(self, ids: Any, options: Any) -> list[Any]:
            return [memoryview(array("f", [float(text[0])] * 250)) for text in ids]

    async def main() -> None:
        batcher = Batcher(Engine, 1 << 20, 1 << 20)
        await batcher.start()
        told: dict[str, int] = {}
        cache = Cache(batcher, 20_000, lambda name, texts: told.__setitem__(name, told.get(name, 0) + texts))

        async def ask(*numbers: int, length: int = 1) -> list[float]:
            ids = [array("q", [number] * length) for number in numbers]
            work = Work(ids, None, asyncio.get_running_loop().create_future())
            return [row[0] for row in await cache.compute(work, Caller())]

        assert await ask(*range(40)) == list(range(40))
        assert 18_000 < cache.held_bytes <= 20_000
        kept = len(cache._entries)
        assert await ask(*range(39, 39 - kept, -1)) == list(range(39, 39 - kept, -1))
        assert told == {"computed": 40, "hit": kept, "joined": 0}
        assert await ask(39 - kept) == [39 - kept]  # The next one has gone.
        assert told["computed"] == 41
        assert await ask(38) == [38]  # 39 was asked for before it, and has made room.
        assert told["hit"] == kept + 1
        assert await ask(39) == [39]
        assert told["computed"] == 42
        # What is larger than a part of it is not kept, and pushes nothing out.
        held = cache.held_bytes
        assert await ask(7, length=400) == [7]
        assert cache.held_bytes == held
        # Nothing else is held: neither who computed, nor the memory of a batch.
        assert not cache._flights
        assert all(entry.value.readonly and entry.value.nbytes == 1000 for entry in cache._entries.values())
        await batcher.close()

    asyncio.run(main())


def test_a_cache_that_replaces_another_is_the_one_that_is_told_of() -> None:
    metrics = Metrics()
    for held in (1.0, 2.0):
        metrics.cache(lambda held=held: held)
    assert b"serve_cache_bytes 2.0" in metrics.render()


CASES: dict[str, list[tuple[str, Any]]] = {
    "feature-extraction": [("/embed", ["a list", "of values", "a list"]), ("/embed_all", ["a list", "of values"])],
    "text-classification": [("/predict", [["a list"], ["of", "values"]]), ("/predict", ["a", "list"])],
    "token-classification": [("/api/token-classify", ["a list of values", "x"])],
    "question-answering": [("/api/answer", {"question": "what", "context": "a list of values"})],
    "fill-mask": [("/api/fill-mask", ["a [MASK] of [MASK]", "the [MASK]"])],
    "sparse-embedding": [("/embed_sparse", ["a list", "of values"])],
}


@pytest.mark.parametrize("task", CASES)
def test_answers_have_the_same_bits(task: str, tiny_model: Callable[..., Path]) -> None:
    manifest = describe_folder(str(tiny_model("bert", task)), None)
    variant = manifest.variant("torch_ext-bf16")
    found: list[list[bytes]] = []
    for cache_mb in (None, 1):
        server = LiveServer(
            manifest,
            Settings(port=0, cache_mb=cache_mb),
            None,  # type: ignore[arg-type]
            lambda: load_engine(manifest, variant, 1)[0],
        )
        try:
            assert server.ready.wait(30)
            found += [[server("POST", path, {"inputs": inputs}).body for path, inputs in CASES[task]] for _ in range(2)]
            if cache_mb is not None:
                assert counts(server)["hit"] >= counts(server)["computed"] > 0
        finally:
            server.terminate()
            server.thread.join(20)
    assert b"error" not in b"".join(found[0])
    assert found[0] == found[1] == found[2] == found[3]


def test_many_at_once_get_their_own(manifest: Manifest) -> None:
    """Random requests of few texts, some of which are given up: every answer is right, and nothing is left behind."""
    with cached(manifest, budget=32) as server:
        run = server.engine.run

        def slow(ids: Any, options: Any) -> Any:
            time.sleep(0.001)
            return run(ids, options)

        server.engine.run = slow  # type: ignore[method-assign]

        def client(seed: int) -> None:
            for turn in range(25):
                numbers = [(seed * 7 + turn * place) % 12 for place in range(1 + (seed + turn) % 9)]
                with Client(server.port) as asking:
                    asking.send("POST", "/embed", {"inputs": [f"w{number}" for number in numbers]})
                    if (seed + turn) % 5 == 0:
                        continue
                    reply = asking.read()
                    assert reply.json == [expected_row([2, 5 + number, 3]) for number in numbers]

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(client, range(6)))
        wait_until(lambda: server.app.service._running == 0)
        assert counts(server)["hit"] > 0
        assert sample(server, "serve_queue_tokens") == 0
