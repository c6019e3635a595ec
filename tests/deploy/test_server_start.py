"""What the server imports before it is ready."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from deploy.bundle import file_entry, write_manifest
from tests.deploy.server_harness import make_manifest

ROOT = Path(__file__).resolve().parents[2]

# Serves a bundle, with an engine in place of the one that torch_ext has, until it is ready.
PROGRAM = """
import sys, types
sys.modules.update(dict.fromkeys(["torch", "transformers", "optimum", "onnxruntime", "safetensors"]))
class TorchExtEngine:
    task, isa = types.SimpleNamespace(usual=None), "none"
    load = classmethod(lambda cls, *arguments: cls())
    def run(self, ids, options): return [[0.0]] * len(ids)
    def cost(self, *arguments): return 1
sys.modules["deploy.engines.torch_ext"] = types.ModuleType("deploy.engines.torch_ext")
sys.modules["deploy.engines.torch_ext"].TorchExtEngine = TorchExtEngine

import deploy.__main__, deploy.server.lifecycle as lifecycle
load = lifecycle.Server._load
async def load_then_stop(self):
    await load(self)
    assert self._batcher.running
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
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_start_needs_neither_torch_nor_exporters(tmp_path: Path) -> None:
    """Nor the engine of a variant that is not served."""
    done = start(bundle(tmp_path))
    assert done.returncode == 0, done.stderr
    serving, names = done.stdout.splitlines()
    assert "variant=torch_ext-bf16" in serving
    modules = set(names.split())
    assert {"uvicorn", "tokenizers", "torch_ext.machine"} <= modules
    unwanted = {"importlib.metadata", "deploy.engines.onnx", "deploy.export", "deploy.texts", "torch_ext.ops"}
    assert not unwanted & modules


def test_a_changed_file_is_refused_though_it_is_checked_beside_the_imports(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    (folder / "weights").write_bytes(b"nope")
    done = start(folder)
    assert done.returncode == 2
    assert "expected SHA-256" in done.stderr
    assert done.stdout == ""
