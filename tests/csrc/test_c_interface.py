"""The C interface as other programs use it: the header alone; the example, built and run here and under emulation."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.csrc.test_kernels import build
from tests.ops import reference
from tests.ops.test_encoder import SPEC, make_weights
from torch_ext import Encoder, pool

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "torch_ext"
HEADER = PACKAGE / "include" / "torch_ext_runtime.h"
EXAMPLE = ROOT / "examples" / "embed.c"

TEXTS = [[1, 2, 3], [4], [49, 0, 7, 7, 7, 8, 9, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]]
C = ("cc", "-std=c99", "-Wall", "-Wextra", "-Werror")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)


def expect_built(*command: str | Path) -> None:
    done = run(*command)
    assert done.returncode == 0, done.stderr


@pytest.fixture(name="model")
def fixture_model(tmp_path: Path) -> Path:
    encoder = Encoder(SPEC, make_weights(SPEC, torch.Generator().manual_seed(1)))
    encoder.save(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture(name="ids")
def fixture_ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids"
    path.write_text("".join(f"{' '.join(map(str, text))}\n" for text in TEXTS))
    return path


def vectors(output: str) -> torch.Tensor:
    return torch.tensor([[float(word) for word in line.split()] for line in output.splitlines()])


@pytest.mark.parametrize(
    "compiler",
    [
        (*C, "-pedantic", "-x", "c"),
        ("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wstrict-prototypes", "-x", "c"),
        ("c++", "-std=c++11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-x", "c++"),
        ("c++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-pedantic", "-x", "c++"),
    ],
    ids=" ".join,
)
def test_the_header_stands_alone(compiler: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text(f'#include "{HEADER}"\n#include "{HEADER}"\nint main(void) {{ return TXR_OK; }}\n')
    expect_built(*compiler, "-fsyntax-only", source)


def test_every_function_is_exported_and_nothing_else() -> None:
    declared = set(re.findall(r"\b(txr_\w+)\(", HEADER.read_text()))
    library = PACKAGE / "libtorch_ext_runtime.so"
    symbols = run("nm", "--dynamic", "--defined-only", library).stdout
    exported = {line.split()[-1].split("@")[0] for line in symbols.splitlines()}
    assert exported == declared


def test_the_example(model: Path, ids: Path, tmp_path: Path) -> None:
    program = tmp_path / "embed"
    flags = (f"-I{HEADER.parent}", f"-L{PACKAGE}", "-ltorch_ext_runtime", f"-Wl,-rpath,{PACKAGE}")
    expect_built(*C, "-pedantic", "-g", EXAMPLE, "-o", program, *flags)
    done = run(program, model, ids)
    assert done.returncode == 0, done.stderr
    bounds = reference.cu_seqlens([len(text) for text in TEXTS])
    hidden = Encoder.load(model)(torch.tensor([*itertools.chain(*TEXTS)]), bounds)
    # Nine digits tell floats apart; PyTorch's own linear layers round elsewhere.
    torch.testing.assert_close(vectors(done.stdout), pool(hidden, bounds, "mean", True), rtol=0, atol=5e-3)
    program_of_runtime = (
        "import sys, json; from torch_ext import runtime; from itertools import accumulate\n"
        "texts = json.loads(sys.argv[2])\n"
        "states = runtime.Encoder.open(sys.argv[1]).encode(sum(texts, []), [0, *accumulate(map(len, texts))])\n"
        "print(json.dumps(states.pool('mean', True).tolist()))"
    )
    same = run(sys.executable, "-c", program_of_runtime, model, json.dumps(TEXTS))
    assert torch.equal(vectors(done.stdout), torch.tensor(json.loads(same.stdout))), same.stderr
    done = run(program, tmp_path / "none", ids)
    assert done.returncode == 1
    assert f"cannot open {tmp_path / 'none'}: No such file" in done.stderr
    for content, message in (
        ("1 2\n50 1\n", "embed: Encoder: expected input_ids from 0 to 49, got 50 at 2"),
        ("1 2\n\n", "text 1 has no tokens"),
        ("", "expected at least one text"),
        ("1 2.5\n", "expected token ids, spaces and line breaks"),
    ):
        ids.write_text(content)
        done = run(program, model, ids)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr


@pytest.mark.emulator
@pytest.mark.parametrize("cpu", ["max", "neoverse-n1"])
def test_the_example_on_arm(cpu: str, model: Path, ids: Path, tmp_path: Path) -> None:
    if missing := build.missing_tools("aarch64"):
        pytest.skip(f"no {' and no '.join(missing)}: install g++-aarch64-linux-gnu and qemu-user-static")
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("no aarch64-linux-gnu-gcc: install gcc-aarch64-linux-gnu")
    objects = build.compile_sources("aarch64", build.kernel_sources())
    example, program = tmp_path / "embed.o", tmp_path / "embed"
    compiler = ("aarch64-linux-gnu-gcc", *C[1:], f"-I{HEADER.parent}")
    expect_built(*compiler, "-c", EXAMPLE, "-o", example)
    expect_built("aarch64-linux-gnu-g++", "-static", example, *objects, "-o", program)
    done = run(build.EMULATOR, "-cpu", cpu, program, model, ids)
    assert done.returncode == 0, done.stderr
    bounds = reference.cu_seqlens([len(text) for text in TEXTS])
    hidden = Encoder.load(model)(torch.tensor([*itertools.chain(*TEXTS)]), bounds)
    # Vectors of length 1, from two layers that round to bf16 where others may not.
    torch.testing.assert_close(vectors(done.stdout), pool(hidden, bounds, "mean", True), rtol=0, atol=1e-2)


def test_the_declarations_of_pythons_abi_are_pythons(tmp_path: Path) -> None:
    """`csrc/python/python_abi.h` stands for Python's headers, so that a build does not need them; this test does."""
    own = (ROOT / "torch_ext" / "csrc" / "python" / "python_abi.h").read_text()
    numbers = re.findall(r"\b((?:METH|PyBUF|Py_tp|Py_sq|Py_bf|Py_TPFLAGS|PYTHON_ABI)_\w+) = ", own)
    structures = re.findall(r"^struct (\w+) \{", own, re.MULTILINE)
    assert len(numbers) > 20
    assert {"PyObject", "PyModuleDef", "PyType_Spec", "Py_buffer"} <= set(structures)
    lines = [f'std::printf("{name} %ld\\n", (long){name});' for name in numbers]
    lines += [f'std::printf("{name} %ld\\n", (long)sizeof({name}));' for name in structures]
    body = "#include <cstdio>\nint main() {\n" + "\n".join(lines) + "\n}\n"
    include = sysconfig.get_paths()["include"]
    heads = {
        "own": '#include "python/python_abi.h"\n',
        "python": "#define Py_LIMITED_API 0x030B0000\n#include <Python.h>\n",
    }
    said = []
    for name, head in heads.items():
        source, program = tmp_path / f"{name}.cpp", tmp_path / name
        source.write_text(head + body)
        subprocess.run(
            ["g++", "-std=c++20", f"-I{ROOT / 'torch_ext' / 'csrc'}", f"-I{include}", str(source), "-o", str(program)],
            check=True,
        )
        said.append(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout)
    assert said[0] == said[1]
