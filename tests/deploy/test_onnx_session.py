"""Which CPUs get ONNX Runtime's slower, exact int8 kernels."""

from __future__ import annotations

import pytest

from deploy.onnx_session import saturates, session_options


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
