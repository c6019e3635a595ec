"""A server in this process with an engine that a test controls, and clients that speak to it through a socket."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from deploy.bundle import (
    Accuracy,
    FileEntry,
    Manifest,
    ModelInfo,
    Pooling,
    Role,
    Sparse,
    SpecialToken,
    TokenVectors,
    Variant,
)
from deploy.engines.open import load_engine
from deploy.server.api import ROUTES
from deploy.server.api.route import Route
from deploy.server.app import App
from deploy.server.lifecycle import Server
from deploy.server.limits.bounds import Settings
from deploy.server.metrics import Metrics
from deploy.server.service import Service
from deploy.server.service.batching import Batcher
from deploy.server.service.tokens import TextTokenizer
from deploy.server.sockets import listen
from deploy.server.variants.choice import Choice
from deploy.tasks import TASKS, Ids

WIDTH = 8
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL, *(f"w{number}" for number in range(100))))}


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words `w0` to `w99`, with `[CLS]` and `[SEP]` around a text."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def make_manifest(folder: Path, task: str = "feature-extraction", max_tokens: int = 16) -> Manifest:
    """A manifest around the tokenizer; there are no weights."""
    write_tokenizer(folder)
    return Manifest(
        root=folder,
        model=ModelInfo("fake", None, "FakeModel"),
        created_with={"torch_ext": "0"},
        task=task,
        hidden_size=WIDTH,
        max_tokens=max_tokens,
        pooling=Pooling("mean", True) if task == "feature-extraction" else None,
        labels=("no", "yes") if TASKS[task].needs.labels else None,
        problem_type="single_label_classification" if TASKS[task].needs.labels else None,
        sparse=Sparse() if TASKS[task].needs.sparse else None,
        token_vectors=TokenVectors(True, Role(), Role()) if TASKS[task].needs.token_vectors else None,
        special_tokens={
            "pad": SpecialToken(0, "[PAD]"),
            "cls": SpecialToken(2, "[CLS]"),
            "sep": SpecialToken(3, "[SEP]"),
            "mask": SpecialToken(4, "[MASK]"),
        },
        files={"tokenizer.json": FileEntry("0" * 64, 0)},
        variants={"fake": Variant("fake", "none", "torch_ext", "fp32", 0, Accuracy("cosine", 1.0, 1.0, 1))},
    )


def token_ids(ids: Sequence[int]) -> Ids:
    """Token ids of a text as engines take them."""
    return array("q", ids)


def expected_row(ids: Sequence[int]) -> list[float]:
    """What the fake engine answers to token ids."""
    return [float(len(ids)), float(sum(ids)), float(ids[0]), float(ids[-1]), 0.25, 0.0, 0.0, 1.0]


@dataclass
class FakeEngine:
    """Answers with numbers that are made of the ids.

    Attributes:
        gate: Batches wait until it is set.
        entered: Set as soon as a batch has begun.
        batches: Ids of every batch.
        poison: A batch with this token id fails.
        infinite: A text with this token id has no finite result.
        death: A batch with this token id ends the thread.
        drop: Answers with one result too few.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    batches: list[list[list[int]]] = field(default_factory=list)
    options: list[list[Any]] = field(default_factory=list)
    poison: int = -1
    infinite: int = -1
    death: int = -1
    drop: bool = False

    def cost(self, ids: Ids) -> int:
        return len(ids)

    def rest(self) -> None:
        pass

    def run(self, ids: Sequence[Ids], options: Sequence[Any]) -> Sequence[Any]:
        self.batches.append([text.tolist() for text in ids])
        self.options.append(list(options))
        self.entered.set()
        assert self.gate.wait(20), "the test never opened the gate"
        if any(self.poison in text for text in ids):
            raise RuntimeError("poisoned")
        if any(self.death in text for text in ids):
            raise SystemExit("killed")
        rows: list[Any] = [memoryview(array("f", expected_row(text))) for text in ids]
        for index, text in enumerate(ids):
            if self.infinite in text:
                rows[index] = FloatingPointError("an embedding is not finite")
        return rows[self.drop :]


@dataclass
class Reply:
    """An answer: status, headers with lower-case names, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        """Kind of the error; fails unless it is one, well formed."""
        error = self.json["error"]
        assert isinstance(error["message"], str)
        assert error["message"]
        return str(error.get("code", error["type"]))


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int, timeout_s: float = 20.0) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> None:
        """Sends a request; a body that is not bytes becomes JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, body, fields)

    def read(self) -> Reply:
        """Reads the answer."""
        response = self.connection.getresponse()
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        self.send(method, path, body, **headers)
        return self.read()


def raw(port: int, data: bytes, timeout_s: float = 20.0) -> bytes:
    """Sends bytes and returns everything that comes until the server closes the connection.

    A server that has refused what it reads closes before all is sent where sending takes longer than it lingers;
    its answer is there to read all the same.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as sock:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(1 << 16):
                parts.append(part)
        return b"".join(parts)


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    """Waits until a condition holds; fails if it never does."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never held"
        time.sleep(0.005)


class LiveServer:
    """A server in a thread of this process, with the fake engine."""

    def __init__(
        self,
        manifest: Manifest,
        settings: Settings,
        engine: FakeEngine,
        load: Any = None,
        routes: Sequence[Route] = ROUTES,
    ) -> None:
        self.engine = engine
        self.choice = Choice("fake", "only", {}, {"other": "it is not there"})
        self.manifest = manifest
        self.batcher = Batcher(
            lambda: self.loaded(load or (lambda: engine)),
            settings.max_batch_tokens,
            settings.max_queue_tokens,
            max_queue_s=1e-3 * settings.max_queue_ms,
        )
        self.app = App(settings, routes)
        self.app.use([self.app.model(manifest, TextTokenizer.from_manifest(manifest), self.batcher)])
        self.ready = threading.Event()
        self.server = Server(self.app, settings, self.ready.set)
        sock = listen("127.0.0.1", 0)
        self.port = int(sock.getsockname()[1])
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]}, name="server")
        self.thread.start()

    def loaded(self, load: Callable[[], FakeEngine]) -> FakeEngine:
        engine = load()
        self.app.models[0].serves(self.choice, "fake-isa")
        return engine

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request on a connection of its own."""
        with Client(self.port) as client:
            return client(method, path, body, **headers)

    def terminate(self) -> None:
        """What a SIGTERM does."""
        self.server.handle_exit(15, None)

    def stop(self) -> int:
        """Drains, waits for the end, and returns the exit code."""
        self.terminate()
        self.engine.gate.set()
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server did not stop"
        return self.server.exit_code


@contextlib.contextmanager
def running(manifest: Manifest, settings: Settings | None = None, **engine: Any) -> Iterator[LiveServer]:
    """A server that is ready; its engine's gate is open unless the test gives one."""
    fake = FakeEngine(**engine)
    if "gate" not in engine:
        fake.gate.set()
    server = LiveServer(manifest, settings or Settings(port=0, request_timeout_s=5.0), fake)
    try:
        assert server.ready.wait(10), "the server never became ready"
        yield server
    finally:
        code = server.stop()
    assert code == 0


def ask(manifest: Manifest, variant: str, question: Callable[[Service], Any]) -> Any:
    """What a service with the engine of a variant answers."""

    async def run() -> Any:
        batcher = Batcher(lambda: load_engine(manifest, manifest.variant(variant), 1)[0], 2048, 100_000)
        await batcher.start()
        service = Service(manifest, TextTokenizer.from_manifest(manifest), batcher, Settings(), Metrics())
        try:
            return await question(service)
        finally:
            service.close()
            await batcher.close()

    return asyncio.run(run())
