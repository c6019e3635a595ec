"""What the compiler makes of the main loops for x86-64: products, loads, and nothing else.

GCC 12 copied each accumulator of the int8 loop from register to register, before and after every product, and narrowed
inputs to bytes one by one: right results, at two thirds of the speed.
"""

from __future__ import annotations

import collections
import platform
import re
import shutil
import subprocess

import pytest

from tests.csrc.test_kernels import CSRC, build

pytestmark = [
    pytest.mark.long,  # In CI: other compilers may copy more, at some cost of speed.
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump: install binutils"),
]

X86 = CSRC / "kernels" / "x86"
COPY = re.compile(r"\svmov\w+\s+%[xyz]mm\d+,%[xyz]mm\d+\s*$")
STACK = re.compile(r"\(%r[sb]p\)")
ONE_ELEMENT = re.compile(r"\s(vpinsr[bw]|vpextr[bw]|vinsertps)\s")


def functions(source: str) -> dict[str, list[str]]:
    """The instructions of each function of an object, by its demangled name."""
    (made,) = build.compile_sources("native", [X86 / source])
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(made)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if name := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            lines = found.setdefault(name[1], [])
        elif found and line.startswith(" "):
            lines.append(line)
    return found


def loops(lines: list[str]) -> list[list[str]]:
    """The instructions from the target of each jump back to the jump, of those that hold no other such jump."""
    places = {int(line.partition(":")[0], 16): index for index, line in enumerate(lines)}
    found: list[list[str]] = []
    last = -1
    for index, line in enumerate(lines):
        if jump := re.search(r"\sj\w+\s+([0-9a-f]+) <", line):
            begin = places.get(int(jump[1], 16), index + 1)
            if begin <= index:
                if begin > last:
                    found.append(lines[begin : index + 1])
                last = index
    return found


@pytest.mark.parametrize(
    ("source", "kernel", "instruction", "products"),
    [
        ("gemm_avx512_vnni.cpp", "dot_tile<8ul>", "vpdpbusd", 16),
        ("gemm_avx_vnni.cpp", "dot_tile<6ul>", "vpdpbusd", 12),
        ("gemm_pmaddwd.cpp", "crossed_tile<5ul>", "vpmaddwd", 10),
        ("gemm_pmaddwd.cpp", "packed_tile<6ul>", "vpmaddwd", 9),
        ("vec_avx512_bf16.cpp", "ukernel_dot<8ul>", "vdpbf16ps", 16),
        ("vec_avx2.cpp", "ukernel_f32<6ul>", "vfmadd", 12),
        ("vec_avx512.cpp", "ukernel_f32<8ul>", "vfmadd", 16),
    ],
)
def test_the_main_loop_holds_its_accumulators(source: str, kernel: str, instruction: str, products: int) -> None:
    (lines,) = [lines for name, lines in functions(source).items() if f"::{kernel}(" in name]
    bodies = {sum(bool(re.search(rf"\s{instruction}", line)) for line in body): body for body in loops(lines)}
    most = max(bodies)
    assert most >= products
    assert most % products == 0
    body = bodies[most]
    assert [line for line in body if STACK.search(line)] == []
    copies = [line for line in body if COPY.search(line)]
    assert len(copies) <= most / 4, copies


@pytest.mark.parametrize("source", ["gemm_avx512_vnni.cpp", "gemm_avx_vnni.cpp"])
def test_rows_are_narrowed_to_bytes_together(source: str) -> None:
    packing = {name: lines for name, lines in functions(source).items() if "pack_rows_s8<torch_ext::bf16" in name}
    assert packing
    for lines in packing.values():
        counts = collections.Counter(match[1] for line in lines if (match := ONE_ELEMENT.search(line)))
        assert sum(counts.values()) <= 16, counts  # Of a row's rest and sums; GCC 12 had 56.


LISTING = """\
 10:\tvpxor  %xmm0,%xmm0,%xmm0
 14:\tvmovdqa64 %zmm31,%zmm30
 18:\tvpdpbusd %zmm1,%zmm2,%zmm30
 1c:\tvmovdqa32 %zmm8,-0x38(%rsp)
 20:\tjne    14 <kernel+0x4>
 22:\tjne    10 <kernel>
 24:\tret
""".splitlines()


def test_copies_and_loops_are_told_apart() -> None:
    assert loops(LISTING) == [LISTING[1:5]]
    assert [line for line in LISTING if COPY.search(line)] == LISTING[1:2]
    assert [line for line in LISTING if STACK.search(line)] == LISTING[3:4]
