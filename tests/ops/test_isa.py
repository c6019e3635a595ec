"""TORCH_EXT_ISA: every instruction set that this CPU has really runs, and gives the same results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import torch_ext
from tests import warm

HERE = Path(__file__).resolve().parent

NAMES = {
    "aarch64": {"sve_bf16", "neon_i8mm", "neon_bf16", "neon_dotprod", "neon", "portable"},
    "x86_64": {"amx", "avx512_bf16", "avx512", "onednn", "avx_vnni", "avx2", "torch", "portable"},
}

# Runs a layer of every kind; prints what was used, and writes the results.
PROGRAM = """
import json, sys, torch, torch_ext
generator = torch.Generator().manual_seed(int(sys.argv[2]))
def rand(*shape): return torch.randn(*shape, generator=generator)
bounds = torch.tensor([0, 3, 12, 13], dtype=torch.int32)
results = []
for dtype in (torch.float32, torch.bfloat16):
    x = rand(13, 64).to(dtype)
    for activation in ("none", "gelu", "gelu_tanh", "relu", "tanh", "silu", "quick_gelu", "sigmoid", "leaky_relu"):
        x = torch_ext.linear(x, torch_ext.pack_linear_weight(rand(64, 64) / 8), rand(64) / 8, activation, None, x)
        results.append(x)
    x = torch_ext.linear(x, torch_ext.pack_linear_weight(rand(192, 64) / 8))
    x = torch_ext.varlen_attention(x, bounds, 2)
    x = torch_ext.add_layer_norm(x, x, rand(64), rand(64), 1e-5)
    results += [x, torch_ext.pool(x, bounds, "mean", True)]
torch.save(results, sys.argv[1] + sys.argv[3])
print(json.dumps(torch_ext.isa_report()))
"""


def supported() -> list[str]:
    return [entry["name"] for entry in torch_ext.isa_report()["candidates"] if entry["supported"]]


def run(isa: str | None, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in which torch is imported, but no kernels are chosen yet."""
    environ = {name: value for name, value in os.environ.items() if name != "TORCH_EXT_ISA"}
    if isa is not None:
        environ["TORCH_EXT_ISA"] = isa
    return warm.python("torch").run(*command, env=environ, complete=False)


def run_all(program: str, names: Sequence[str], *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """What `program` does under each instruction set, whose name comes after its other arguments."""
    return [run(name, "-c", program, *arguments, name) for name in names]


def test_report() -> None:
    report = torch_ext.isa_report()
    assert report["arch"] == {"x86_64": "x86-64"}.get(platform.machine(), platform.machine())
    assert {entry["name"] for entry in report["candidates"]} == NAMES[platform.machine()]
    assert report["isa"] in supported()
    assert isinstance(report["cpu_features"], list)
    assert report["forced"] == bool(os.environ.get("TORCH_EXT_ISA"))
    # What runs everywhere comes last.
    assert report["candidates"][-1] == {"name": "portable", "supported": True, "requires": []}
    for entry in report["candidates"]:
        assert entry["supported"] == (set(entry["requires"]) <= set(report["cpu_features"]))


def test_best_is_chosen() -> None:
    process = run(None, "-c", "import json, torch_ext; print(json.dumps(torch_ext.isa_report()))")
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["isa"] == supported()[0]
    assert report["forced"] is False


def test_all_give_the_same_results(seed: int, tmp_path: Path) -> None:
    names = supported()
    for name, process in zip(names, run_all(PROGRAM, names, f"{tmp_path}/", str(seed)), strict=True):
        assert process.returncode == 0, process.stderr
        report = json.loads(process.stdout)
        assert report["isa"] == name
        assert report["forced"] is True
    expected = torch.load(tmp_path / "portable")
    for name in names:
        for index, (one, other) in enumerate(zip(torch.load(tmp_path / name), expected, strict=True)):
            similarity = F.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0)
            # Nine layers in a row, each of which rounds to bf16 where others may not.
            assert similarity > 0.9995, f"{name}, result {index}: {similarity}"


@pytest.mark.anywhere
def test_unknown_names_raise() -> None:
    program = "import torch, torch_ext; torch_ext.pack_linear_weight(torch.ones(3, 3))"
    for process in run_all(program, ["avx1024", "NEON", " ", "portable,torch"]):
        assert process.returncode == 1, process.args
        assert "TORCH_EXT_ISA" in process.stderr
        assert all(known in process.stderr for known in NAMES[platform.machine()])


@pytest.mark.anywhere
def test_names_that_this_cpu_lacks_raise() -> None:
    lacking = sorted(NAMES[platform.machine()] - set(supported()))
    for process in run_all("import torch_ext; torch_ext.isa_report()", lacking):
        assert process.returncode == 1, process.args
        assert "needs a CPU with" in process.stderr


@pytest.mark.anywhere
def test_other_architectures_names_raise() -> None:
    process = run("neon_bf16" if platform.machine() == "x86_64" else "onednn", "-m", "torch_ext.doctor")
    assert process.returncode == 1
    assert "TORCH_EXT_ISA" in process.stdout


# What depends on the kernels.
PARTS = ("linear", "matmul", "attention", "rows", "encoder", "int8")


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(supported()) - {torch_ext.isa_report()["isa"]}))
def test_whole_suite_under(name: str) -> None:
    """The tests of the ops, in a process of their own, on every instruction set that the CPU has."""
    files = [str(HERE / f"test_{part}.py") for part in PARTS]
    process = run(
        name,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not compile and not needs_transformers and not anywhere",
        *files,
    )
    assert process.returncode == 0, process.stdout[-4000:]
