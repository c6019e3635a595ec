"""Which CPUs get ONNX Runtime's exact int8 kernels, and that what our sessions compute is exact on all of them."""

from __future__ import annotations

import ast
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.onnx_session import kernels, saturates, session_options

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        ("fpu avx2 fma avx512f avx512_vnni", "x86_64", False),
        ("fpu avx2 fma avx_vnni", "AMD64", False),
        ("fpu avx2 fma avx512f avx512bw", "x86_64", True),
        ("fpu avx2", "x86_64", True),
        ("fp asimd asimddp i8mm", "aarch64", False),
    ],
)
def test_saturates(flags: str, machine: str, expected: bool) -> None:
    assert saturates(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n", machine) is expected


def test_a_cpu_that_is_not_described_counts_as_old() -> None:
    assert saturates("", "x86_64")
    assert not saturates("", "aarch64")


def test_options() -> None:
    options = session_options(3)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)


def product(options: onnxruntime.SessionOptions) -> np.ndarray:
    """255 times 127, 64 times added, in every element: sums of two such products need 17 bits."""
    weight = numpy_helper.from_array(np.full((64, 8), 127, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["m", 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["m", 8])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.full((3, 64), 255, np.uint8)})[0]


def test_products_are_exact_on_every_cpu() -> None:
    assert (product(session_options(1)) == 64 * 255 * 127).all()


def test_the_cpus_that_saturate_are_known() -> None:
    """What is read from /proc/cpuinfo is what ONNX Runtime's default does here."""
    path = Path("/proc/cpuinfo")
    cpuinfo = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    exact = (product(session_options(1, exact=False)) == 64 * 255 * 127).all()
    assert exact != saturates(cpuinfo, platform.machine())
    assert kernels("int8") == f"onnxruntime-{onnxruntime.__version__}, u8 by {'s8' if exact else 'u8'}"
    assert kernels("fp32") == f"onnxruntime-{onnxruntime.__version__}"


def calls(path: Path, name: str) -> Iterator[ast.Call]:
    """Calls of a function or method of that name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and name in {getattr(node.func, "attr", None), getattr(node.func, "id", None)}:
            yield node


def test_every_session_has_these_options() -> None:
    """Sessions with others may be inexact.

    What counts instructions runs on aarch64 alone, without `deploy`; other servers are measured as people run them.
    """
    opened = 0
    for folder in ("deploy", "benchmarks", "scripts", "loadtest", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            sessions = list(calls(path, "InferenceSession"))
            opened += len(sessions)
            if not sessions or path.name == "instructions_target.py" or path.parent.name == "peers":
                continue
            assert any(calls(path, "session_options")), path
            assert not any(calls(path, "SessionOptions")), path
            assert all(len(session.args) >= 2 for session in sessions), path
    assert opened >= 4
