"""Several models in one server: who answers a request, what is said of each, and what happens to unknown names."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.engines.batch import PairIds
from deploy.server.app import App
from deploy.server.cli import parse
from deploy.server.exposition import labelled, merge, of_process
from deploy.server.lifecycle import Server
from deploy.server.limits.bounds import Settings
from deploy.server.process import UsageError
from deploy.server.service.batching import Batcher
from deploy.server.service.tokens import TextTokenizer
from deploy.server.sockets import listen
from deploy.server.variants.choice import Choice
from deploy.server.wanted import Wanted, threads_of, wanted
from tests.deploy.server_harness import Client, FakeEngine, expected_row, make_manifest, wait_until
from tests.deploy.test_workers import workers

ROWS = [expected_row([2, 6, 3])]


class Labels(FakeEngine):
    """Answers as a classifier."""

    def run(self, ids: Any, options: Any) -> Any:
        self.batches.append([list(text.ids if isinstance(text, PairIds) else text) for text in ids])
        return [[{"label": "yes", "score": 1.0}] for _ in ids]


class Several:
    """A server in a thread with models of fake engines, by their names."""

    def __init__(self, folder: Path, tasks: dict[str, str], settings: Settings) -> None:
        self.app = App(settings)
        self.engines: dict[str, FakeEngine] = {}
        models = []
        for place, (name, task) in enumerate(tasks.items()):
            models.append(self.model(folder / str(place), name, task, place))
        self.app.use(models)
        self.ready = threading.Event()
        self.server = Server(self.app, settings, self.ready.set)
        sock = listen("127.0.0.1", 0)
        self.port = int(sock.getsockname()[1])
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]})

    def model(self, folder: Path, name: str, task: str, place: int) -> Any:
        folder.mkdir()
        manifest = make_manifest(folder, task)
        if task == "text-classification":
            manifest = dataclasses.replace(manifest, labels=("yes",))
        engine = self.engines[name] = Labels() if task == "text-classification" else FakeEngine()
        engine.gate.set()

        def load() -> FakeEngine:
            model.serves(Choice("fake", "only", {}, {}), "fake-isa")
            return engine

        batcher = Batcher(load, 2048, 100_000)
        model = self.app.model(manifest, TextTokenizer.from_manifest(manifest), batcher, place, served_model_name=name)
        return model

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        with Client(self.port) as client:
            return client(method, path, body, **headers)


@contextlib.contextmanager
def several(folder: Path, tasks: dict[str, str], settings: Settings | None = None) -> Iterator[Several]:
    server = Several(folder, tasks, settings or Settings(port=0))
    server.thread.start()
    try:
        assert server.ready.wait(10)
        yield server
    finally:
        server.server.handle_exit(15, None)
        server.thread.join(20)
        assert not server.thread.is_alive()
    assert server.server.exit_code == 0


TASKS = {"first": "feature-extraction", "org/second": "feature-extraction", "ranker": "text-classification"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    with several(tmp_path_factory.mktemp("several"), TASKS) as running:
        yield running


def asked(server: Several) -> dict[str, int]:
    """How many batches each engine has run."""
    return {name: len(engine.batches) for name, engine in server.engines.items()}


OIP_BODY = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w1"]}]}
RANK = {"query": "w1", "documents": ["w2"]}


@pytest.mark.parametrize(
    ("path", "body", "who"),
    [
        ("/embed", {"inputs": "w1"}, "first"),
        ("/api/embed", {"inputs": "w1"}, "first"),
        ("/", {"inputs": "w1"}, "first"),
        ("/models/first/embed", {"inputs": "w1"}, "first"),
        ("/models/org/second/embed", {"inputs": "w1"}, "org/second"),
        ("/models/org%2Fsecond/api/embed", {"inputs": "w1"}, "org/second"),
        ("/models/org/second/", {"inputs": "w1"}, "org/second"),
        ("/models/ranker/predict", {"inputs": "w1"}, "ranker"),
        ("/v1/embeddings", {"input": "w1"}, "first"),
        ("/v1/embeddings", {"input": "w1", "model": None}, "first"),
        ("/v1/embeddings", {"input": "w1", "model": "first"}, "first"),
        ("/v1/embeddings", {"input": "w1", "model": "org/second"}, "org/second"),
        ("/v1/embeddings", {"input": ["w1"] * 3000, "model": "org/second"}, "org/second"),
        ("/embeddings", {"input": "w1", "model": "org/second"}, "org/second"),
        ("/v1/embed", {"texts": ["w1"], "model": "org/second"}, "org/second"),
        ("/v2/embed", {"texts": ["w1"]}, "first"),
        ("/v1/rerank", {**RANK, "model": "ranker"}, "ranker"),
        ("/v2/rerank", {**RANK, "model": "ranker"}, "ranker"),
        ("/rerank", {**RANK, "model": "ranker"}, "ranker"),
        ("/v2/models/org/second/infer", OIP_BODY, "org/second"),
        ("/v2/models/ranker/versions/1/infer", OIP_BODY, "ranker"),
    ],
)
def test_a_request_reaches_the_model_that_it_names(server: Several, path: str, body: Any, who: str) -> None:
    before = asked(server)
    reply = server("POST", path, body)
    assert reply.status == 200, reply.body
    after = asked(server)
    assert {name for name in after if after[name] > before[name]} == {who}
    if "model" in (answer := reply.json):
        assert answer["model"] == who
    if "/v2/models" in path:
        assert answer["model_name"] == who
    assert all(model.requests == 0 for model in server.app.models)


def test_a_name_that_is_not_there_is_404_in_the_form_of_the_dialect(server: Several) -> None:
    before = asked(server)
    error = server("POST", "/v1/embeddings", {"input": "w1", "model": "nope"})
    assert (error.status, error.json["error"]["code"], error.json["error"]["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert "expected one of first, org/second, ranker, got 'nope'" in error.json["error"]["message"]
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        error = server("POST", path, {**RANK, "model": "nope"})
        assert error.status == 404
        assert set(error.json) == {"message", "detail"}
    error = server("POST", "/rerank", {"query": "w1", "texts": ["w2"], "model": "nope"})
    assert (error.status, error.json["error_type"]) == (404, "Validation")
    for method, path, keys in (
        ("POST", "/models/nope/embed", {"error", "error_type"}),
        ("POST", "/v2/models/nope/infer", {"error"}),
        ("GET", "/v2/models/nope", {"error"}),
        ("GET", "/v1/models/nope", {"error"}),
    ):
        error = server(method, path, {"inputs": "w1"} if method == "POST" else None)
        assert (error.status, set(error.json)) == (404, keys)
        assert "this server has first, org/second, ranker" in error.body.decode()
    # What a model is not for, it is not for by another name.
    error = server("POST", "/v1/embeddings", {"input": "w1", "model": "ranker"})
    assert (error.status, error.json["error"]["code"]) == (400, "wrong_task")
    # The path that it is told is that model's, too.
    assert error.json["error"]["message"].endswith(": POST to /models/ranker/api/classify")
    error = server("POST", "/models/ranker/embed", {"inputs": "w1"})
    assert error.json["error"].endswith(": POST to /models/ranker/api/classify")
    assert server("POST", "/v1/rerank", RANK).json["message"].endswith(": POST to /api/embed")
    assert server("POST", "/v1/rerank", RANK).status == 400
    assert asked(server) == before


def test_every_model_is_told_of(server: Several) -> None:
    names = list(TASKS)
    assert [item["id"] for item in server("GET", "/v1/models").json["data"]] == names
    assert server("GET", "/v1/models/org/second").json["id"] == "org/second"
    assert server("GET", "/v2/models/ranker").json["name"] == "ranker"
    assert server("GET", "/v2/models/org/second/ready").json["ready"]
    info = server("GET", "/info").json
    assert (info["served_model_name"], info["models"]) == ("first", names)
    info = server("GET", "/models/ranker/info").json
    assert (info["served_model_name"], info["task"], info["models"]) == ("ranker", "text-classification", ["ranker"])
    document = server("GET", "/openapi.json").json
    assert "model_not_found" in document["paths"]["/v1/embeddings"]["post"]["responses"]["404"]["description"]
    paths = server("GET", "/models/ranker/openapi.json").json["paths"]
    assert {"/v2/models/ranker/infer", "/models/ranker/predict", "/v1/rerank"} <= set(paths)
    assert "/predict" not in paths


def test_metrics_have_the_name_of_the_model(server: Several) -> None:
    server("POST", "/models/ranker/predict", {"inputs": "w1"})
    lines = server("GET", "/metrics").body.decode().splitlines()
    assert 'serve_model_info{model="org/second",task="feature-extraction",variant="fake"} 1.0' in lines
    assert any(
        line.startswith('serve_requests_total{model="ranker",endpoint="/models/ranker/predict"') for line in lines
    )
    assert any(line.startswith('serve_batch_texts_count{model="first"}') for line in lines)
    assert [line for line in lines if line.startswith("serve_ready")] == [
        f'serve_ready{{model="{name}"}} 1.0' for name in TASKS
    ]
    # What is of the process is there once, and without a name.
    assert len([line for line in lines if line.startswith("process_resident_memory_bytes ")]) == 1
    assert len([line for line in lines if line.startswith("serve_held_bytes")]) == 1
    assert not any(line.startswith("process_") and "model=" in line for line in lines)


def test_names_in_labels_are_written_as_prometheus_has_them() -> None:
    text = b'# TYPE a counter\na 1.0\na{b="c"} 2.0\na{model="x"} 3.0\n# TYPE process_x gauge\nprocess_x 4.0\n'
    lines = labelled(text, 'q"\\').decode().splitlines()
    assert lines[1:] == ['a{model="q\\"\\\\"} 1.0', 'a{model="q\\"\\\\",b="c"} 2.0', 'a{model="x"} 3.0']
    assert of_process(text).decode().splitlines() == ["# TYPE process_x gauge", "process_x 4.0"]
    assert merge([labelled(text, "one"), labelled(text, "two")]).count(b"# TYPE a counter") == 1


def test_a_model_that_is_replaced_answers_what_it_has(tmp_path: Path) -> None:
    with several(tmp_path, {"one": "feature-extraction"}) as server:
        old = server.app.models[0]
        engine = server.engines["one"]
        engine.gate.clear()
        with Client(server.port) as client:
            client.send("POST", "/embed", {"inputs": "w1"})
            assert engine.entered.wait(10)
            new = server.model(tmp_path / "new", "other", "feature-extraction", 0)
            loop = old.batcher._loop
            assert loop is not None

            async def replace() -> None:
                await server.server.start([new])
                server.app.use([new])
                await old.retire()

            done = asyncio.run_coroutine_threadsafe(replace(), loop)
            wait_until(lambda: server.app.models == (new,))
            assert server("POST", "/v1/embeddings", {"input": "w1"}).json["model"] == "other"
            assert not done.done()
            engine.gate.set()
            assert client.read().json == ROWS
            done.result(10)
        lines = server("GET", "/metrics").body.decode()
        assert 'serve_model_info{model="other"' in lines
        assert 'serve_model_info{model="one"' not in lines
        assert 'serve_requests_total{endpoint="/embed",status="200"} 1.0' in lines


# ---- options ---------------------------------------------------------------------------------------------------------


def test_options_name_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted(parse(["a", "--model", "x=b=c", "--model", "org/y=d"])) == [
        Wanted("a"),
        Wanted("b=c", "x"),
        Wanted("d", "org/y"),
    ]
    assert wanted(parse(["--model-id", "a", "--served-model-name", "n", "--model", "x=b"])) == [
        Wanted("a", "n"),
        Wanted("b", "x"),
    ]
    monkeypatch.setenv("MODEL_ID", "from the environment")
    assert wanted(parse(["--model", "x=b"])) == [Wanted("b", "x")]
    with pytest.raises(UsageError, match="two models are called x"):
        wanted(parse(["--model", "x=a", "--model", "x=b"]))
    for wrong in (
        ["--model", "x"],
        ["--model", "=a"],
        ["--model", "/x=a"],
        ["--model", "x=a", "--served-model-name", "n"],
    ):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "expected NAME=DIR, got 'x'" in capsys.readouterr().err


def test_threads_are_shared_out() -> None:
    assert threads_of(8, 1) == [8]
    assert threads_of(8, 3) == [2, 3, 3]
    assert sum(threads_of(7, 4)) == 7
    assert threads_of(1, 3) == [1, 1, 1]


def test_workers_serve_all_of_them(tiny_bundle: Any) -> None:
    one, other = tiny_bundle("bert", "feature-extraction"), tiny_bundle("bert", "text-classification")
    with workers(one, "--model", f"classes={other}") as server:
        assert "tiny-bert-feature-extraction (feature-extraction), classes (text-classification) on " in server.line
        assert "variant=torch_ext-bf16,torch_ext-bf16 " in server.line
        for _ in range(4):
            with Client(server.port) as client:
                assert client("POST", "/embed", {"inputs": "a"}).status == 200
                assert client("POST", "/models/classes/predict", {"inputs": "a"}).status == 200
                assert client("GET", "/models/classes/info").json["threads"] == 1
        sample = 'serve_requests_total{model="classes",endpoint="/models/classes/predict",status="200"}'
        wait_until(lambda: server.metric(sample) == 4, 20)
        code, err = server.stop()
    assert (code, err) == (0, "")
    with socket.socket() as closed:
        assert closed.connect_ex(("127.0.0.1", server.port)) != 0
