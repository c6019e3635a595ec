"""What the server imports, before it is ready and when it answers."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import deploy.__main__
from deploy.bundle import file_entry, write_manifest
from deploy.server.service.tokens import count_tokens
from deploy.server.variants.measurement import Job, Measurement
from tests.deploy.server_harness import make_manifest

ROOT = Path(__file__).resolve().parents[2]

# What a server of a bundle does without until it is ready: each takes milliseconds to import.
UNWANTED = {"numpy", "importlib.metadata", "importlib.resources", "encodings.idna"}
UNWANTED |= {"torch_ext.encoder", "torch_ext.ops", "deploy.engines.onnx", "deploy.export"}
UNWANTED |= {"deploy.texts", "deploy.folder", "deploy.server.workers", "deploy.server.tls"}

# Serves a bundle, with an engine in place of the one that torch_ext has, until it is ready.
PROGRAM = """
import gc, sys, types
sys.modules.update(dict.fromkeys(["torch", "transformers", "optimum", "onnxruntime", "safetensors"]))
class TorchExtEngine:
    task, isa = types.SimpleNamespace(usual=None), "none"
    load = classmethod(lambda cls, *arguments, **options: cls())
    def run(self, ids, options): return [[0.0]] * len(ids)
    def cost(self, *arguments): return 1
    def rest(self): pass
sys.modules["deploy.engines.torch_ext"] = types.ModuleType("deploy.engines.torch_ext")
sys.modules["deploy.engines.torch_ext"].TorchExtEngine = TorchExtEngine

import deploy.__main__, deploy.server.lifecycle as lifecycle
load = lifecycle.Server._load
async def load_then_stop(self):
    assert not gc.isenabled()
    await load(self)
    assert gc.isenabled() and gc.get_freeze_count() > 10000
    assert self._app.running
    print(*(name for name in sys.modules if sys.modules[name] is not None))
    self.should_exit = True
lifecycle.Server._load = load_then_stop
options = ["--port", "0", "--variant", "torch_ext-bf16", "--drain-delay", "0"]
sys.exit(deploy.__main__.main(["serve", sys.argv[1], *options]))
"""


def bundle(folder: Path) -> Path:
    """A bundle with a file that is not read in place of weights."""
    manifest = make_manifest(folder)
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(b"none")
    files = {name: file_entry(folder / name) for name in ("tokenizer.json", "config.json", "weights")}
    variant = replace(manifest.variants["fake"], name="torch_ext-bf16", file="weights", dtype="bf16")
    write_manifest(replace(manifest, files=files, variants={variant.name: variant}))
    return folder


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_start_needs_neither_torch_nor_exporters(tmp_path: Path) -> None:
    """Nor the engine of a variant that is not served."""
    done = start(bundle(tmp_path))
    assert done.returncode == 0, done.stderr
    serving, names = done.stdout.splitlines()
    assert "variant=torch_ext-bf16" in serving
    modules = set(names.split())
    assert {"uvicorn", "tokenizers", "torch_ext.machine"} <= modules
    assert not UNWANTED & modules


def test_a_changed_file_is_refused_though_it_is_checked_beside_the_imports(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    (folder / "weights").write_bytes(b"nope")
    done = start(folder)
    assert done.returncode == 2
    assert "expected SHA-256" in done.stderr
    assert done.stdout == ""


# Serves a bundle where numpy, torch and onnxruntime cannot be imported, asks it what it is told and the example of each
# route, and tells what has been imported.
SERVED = """
import asyncio, json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numpy", "torch", "onnxruntime"):
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())

import deploy.__main__, deploy.server.lifecycle as lifecycle
def ask(port):
    import http.client
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    def send(method, path, body=None):
        connection.request(method, path, None if body is None else json.dumps(body))
        reply = connection.getresponse()
        return [path, reply.status, json.loads(reply.read())]
    replies = [send("POST", path, body) for path, body in json.loads(sys.argv[3])]
    examples = []
    for path, methods in send("GET", "/openapi.json")[2]["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" in content:
            examples.append(send("POST", path, content["example"]))
    print(json.dumps([replies, examples]))
startup, load = lifecycle.Server.startup, lifecycle.Server._load
async def listen(self, sockets=None):
    self.port = sockets[0].getsockname()[1]
    await startup(self, sockets)
async def load_then_ask(self):
    await load(self)
    print(json.dumps([*sys.modules]))
    await asyncio.to_thread(ask, self.port)
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
    self.should_exit = True
lifecycle.Server.startup, lifecycle.Server._load = listen, load_then_ask
options = ["--port", "0", "--variant", sys.argv[2], "--drain-delay", "0", "--threads", "1", "--accept-token-ids"]
sys.exit(deploy.__main__.main(["serve", sys.argv[1], *options]))
"""

TEXTS = ["the name of the file", "a list"]


@pytest.mark.parametrize(
    ("task", "variant", "requests"),
    [
        (
            "feature-extraction",
            "torch_ext-bf16",
            [
                ("/api/embed", {"inputs": TEXTS}),
                ("/v1/embeddings", {"input": [[2, 30, 3]], "encoding_format": "float"}),
                ("/v1/embeddings", {"input": TEXTS, "encoding_format": "base64"}),
                ("/embed", {"inputs": TEXTS, "dimensions": 5}),
                ("/similarity", {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS}}),
                ("/tokenize", {"inputs": TEXTS}),
                ("/api/embed", {"inputs": TEXTS * 150}),  # An answer in parts.
            ],
        ),
        (
            "text-classification",
            "torch_ext-int8",
            [("/api/classify", {"inputs": TEXTS}), ("/predict", {"inputs": [TEXTS]})],
        ),
        ("fill-mask", "torch_ext-fp32", [("/api/fill-mask", {"inputs": ["the [MASK] of the [MASK]"], "top_k": 3})]),
        ("token-classification", "torch_ext-bf16", [("/api/token-classify", {"inputs": TEXTS})]),
        (
            "question-answering",
            "torch_ext-bf16",
            [("/api/answer", {"inputs": {"question": TEXTS[0], "context": "a list of names"}})],
        ),
        ("sparse-embedding", "torch_ext-bf16", [("/embed_sparse", {"inputs": TEXTS})]),
    ],
)
def test_serving_needs_no_numpy(
    task: str,
    variant: str,
    requests: list[tuple[str, dict[str, Any]]],
    tiny_bundle: Callable[[str, str], Path],
) -> None:
    command = [sys.executable, "-c", SERVED, str(tiny_bundle("bert", task)), variant, json.dumps(requests)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ready, (replies, examples), modules = map(json.loads, done.stdout.splitlines()[1:])
    assert not UNWANTED & {*ready}
    assert [status for _, status, _ in replies] == [200] * len(requests), replies
    assert not {"numpy", "torch", "onnxruntime", "transformers"} & set(modules)
    # Routes of other tasks refuse, as some do for this model; none fails for want of a package.
    assert [path for path, status, _ in examples if status == 200]
    assert not [reply for reply in examples if reply[1] >= 500]
    answers = [body for _, _, body in replies]
    if task == "feature-extraction":
        first, ids, coded, cut, cosines, _, many = answers
        assert [len(row) for row in cut] == [5, 5]
        assert cosines[0] == pytest.approx(1, abs=1e-5)
        assert [len(row) for row in first["embeddings"]] == [64, 64]
        assert len(ids["data"][0]["embedding"]) == 64
        for item, row in zip(coded["data"], first["embeddings"], strict=True):
            assert array("f", base64.b64decode(item["embedding"])).tolist() == array("f", row).tolist()
        assert len(many["embeddings"]) == 300
    elif task == "fill-mask":
        assert [len(mask) for mask in answers[0]["predictions"][0]] == [3, 3]
    elif task == "text-classification":
        assert [len(labels) for labels in answers[0]["predictions"]] == [2, 2]
        assert [len(labels) for labels in answers[1]] == [2]


def test_tokens_are_counted_as_the_library_counts_them(tmp_path: Path) -> None:
    """It copies the whole vocabulary for that."""
    tokenizer = Tokenizer.from_file(str(make_manifest(tmp_path).tokenizer_path))
    for added in ([], ["two words", "a"], [tokenizer.id_to_token(3)]):
        tokenizer.add_tokens(added)
        tokenizer.add_special_tokens(added[:1])
        assert count_tokens(tokenizer) == tokenizer.get_vocab_size(with_added_tokens=True)


def test_measuring_needs_no_numpy(
    tiny_bundle: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "torch", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("torch_ext-bf16", "torch_ext-int8")
    outcome = Measurement(Job(str(tiny_bundle("bert", "fill-mask")), names, 1, 500), 60).run()
    assert set(outcome.texts_per_s) == set(names)
    assert not outcome.failed


def test_objects_are_in_the_heap_of_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is started again, once, with the arguments of Python itself; whoever has chosen a heap keeps it."""
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr("os.execv", lambda path, arguments: started.append((path, arguments)))
    monkeypatch.setattr("sys.orig_argv", ["python", "-X", "utf8", "-m", "deploy", "serve", "bundle"])
    monkeypatch.setenv("PYTHONMALLOC", "pymalloc")
    deploy.__main__._use_malloc()
    assert started == []
    monkeypatch.delenv("PYTHONMALLOC")
    deploy.__main__._use_malloc()
    assert started == [(sys.executable, [sys.executable, "-X", "utf8", "-m", "deploy", "serve", "bundle"])]
    assert os.environ["PYTHONMALLOC"] == "malloc"
    deploy.__main__._use_malloc()
    assert len(started) == 1


def test_a_server_starts_itself_again() -> None:
    code = "import os, sys; os.execv = lambda *given: os._exit(7); sys.argv[1] = 'serve'; import runpy; "
    code += "runpy.run_module('deploy', run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONMALLOC"}
    for command, code_expected in (("serve", 7), ("--help", 0)):
        program = code.replace("'serve'", repr(command))
        done = subprocess.run(
            [sys.executable, "-c", program, command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )
        assert done.returncode == code_expected
