"""Inner loops of the aarch64 micro-kernels under LLVM's model of a CPU: cycles, share of peak, spills.

    python benchmarks/mca.py                            # every kernel, GCC's code and clang's
    python benchmarks/mca.py --filter mmla --cpu neoverse-v1      # SVE beside NEON

Each kernel is compiled as setup.py compiles it, its innermost loop is cut out of the disassembly and given to llvm-mca.
The figures are a model's, with every load a hit in the first-level cache: they say whether the loop could reach the
peak, not how fast a machine is. Needs g++-aarch64-linux-gnu (or clang) and LLVM 16 or newer: older models are wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "torch_ext" / "csrc"
SOURCES = (
    "kernels/neon_bf16/gemm_bfmmla.cpp",
    "kernels/neon/vec_neon.cpp",
    "kernels/sve_bf16/gemm_sve_bfmmla.cpp",
    "kernels/neon_i8mm/gemm_smmla.cpp",
    "kernels/neon_dotprod/gemm_sdot.cpp",
)
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden")
OLDEST_LLVM = 16

# Instructions that one cycle can start, in LLVM 19's models (AArch64SchedNeoverse*.td): of 128 bits, and of 256 for
# sve256, whose kernels need vectors of that length. N1 has no MMLA; only V1 has vectors of 256 bits.
PEAK_PER_CYCLE = {
    "neoverse-n1": {"fmla": 2, "sdot": 2},
    "neoverse-n2": {"fmla": 2, "bfmmla": 2, "smmla": 2, "sdot": 2},
    "neoverse-v1": {"fmla": 4, "bfmmla": 4, "sve256_bfmmla": 2, "smmla": 4, "sdot": 4},
    "neoverse-v2": {"fmla": 4, "bfmmla": 4, "smmla": 4, "sdot": 4},
}

# Products of each.
PRODUCTS = {"fmla": 4, "bfmmla": 16, "sve256_bfmmla": 32, "smmla": 32, "sdot": 16}

_KERNEL = re.compile(r"(gemm_f32_\w+)\(|(vec_\w+)::ukernel_(f32|bf16)<(\d+)\w*>")
_BRANCH = re.compile(r"^(?:b(?:\.\w+)?|cbn?z|tbn?z)\s.*?\b([0-9a-f]+) <")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly.

    Attributes:
        address: in its section.
        text: mnemonic and operands, without comments.
    """

    address: int
    text: str

    @property
    def mnemonic(self) -> str:
        """The first word."""
        return self.text.split(maxsplit=1)[0]

    @property
    def branch_target(self) -> int | None:
        """Where a branch within the function goes; None for everything else."""
        match = _BRANCH.match(self.text)
        return int(match.group(1), 16) if match else None


@dataclass(frozen=True)
class Loop:
    """The innermost loop of a micro-kernel.

    Attributes:
        kernel: name of the micro-kernel, as in its table.
        engine: what does the work, a key of ``PRODUCTS``.
        body: its instructions, the branch back last.
    """

    kernel: str
    engine: str
    body: tuple[Instruction, ...]

    @property
    def work(self) -> int:
        """How many of the instructions do the work."""
        return sum(i.mnemonic == self.engine.rsplit("_", 1)[-1] for i in self.body)

    @property
    def steps(self) -> float:
        """How many steps of four products of a whole tile one pass makes."""
        rows, columns = map(int, re.search(r"_(\d+)x(\d+)_", self.kernel).groups())  # type: ignore[union-attr]
        return self.work * PRODUCTS[self.engine] / (rows * columns * 4)

    @property
    def loads(self) -> int:
        """How many vectors one pass loads."""
        count = 0
        for i in self.body:
            if i.mnemonic.startswith("ld"):
                registers = i.text.split("[")[0]
                span = re.search(r"v(\d+)[.\w]*-v(\d+)", registers)
                count += int(span[2]) - int(span[1]) + 1 if span else len(re.findall(r"\b[vqz]\d+", registers))
        return count

    @property
    def products(self) -> int:
        """How many products one pass makes."""
        return self.work * PRODUCTS[self.engine]

    def spills(self) -> list[str]:
        """Instructions that should not be there: stores of any kind, and loads from the stack."""
        return [
            i.text
            for i in self.body
            if re.match(r"st\w*\s", i.text) or (re.match(r"ld\w*\s", i.text) and re.search(r"\[(sp|x29)\b", i.text))
        ]

    def assembly(self) -> str:
        """The loop as llvm-mca takes it: the branch goes to a label."""
        lines = []
        for i in self.body:
            lines.append(re.sub(r"\b[0-9a-f]+ <.*>", "loop", i.text) if i.branch_target is not None else i.text)
        return "loop:\n" + "\n".join(lines) + "\n"


def find_tool(*names: str) -> str | None:
    """The first of the commands that is there, or None."""
    return next((name for name in names if shutil.which(name)), None)


def find_mca() -> str | None:
    """llvm-mca, new enough for the models of Neoverse, or None."""
    versioned = [f"llvm-mca-{version}" for version in range(30, OLDEST_LLVM - 1, -1)]
    tool = find_tool(*versioned)
    if tool is None and shutil.which("llvm-mca"):
        text = subprocess.run(["llvm-mca", "--version"], check=True, capture_output=True, text=True).stdout
        match = re.search(r"LLVM version (\d+)", text)
        if match and int(match.group(1)) >= OLDEST_LLVM:
            tool = "llvm-mca"
    return tool


def find_compilers() -> dict[str, str]:
    """Commands that compile for aarch64, by a short name: ``gcc`` and ``clang``, those that are there."""
    found = {}
    gcc = find_tool("aarch64-linux-gnu-g++")
    clang = find_tool(*(f"clang++-{version}" for version in range(30, OLDEST_LLVM - 1, -1)), "clang++")
    if gcc:
        found["gcc"] = gcc
    if clang:
        found["clang"] = f"{clang} --target=aarch64-linux-gnu"
    return found


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    return done.stdout


def disassemble(object_file: Path) -> str:
    """The disassembly of an object for aarch64.

    Raises:
        RuntimeError: the command failed; the message holds its output.
        FileNotFoundError: there is no objdump for aarch64.
    """
    objdump = find_tool("aarch64-linux-gnu-objdump", "llvm-objdump-19", "llvm-objdump")
    if objdump is None:
        raise FileNotFoundError("no objdump for aarch64: install binutils-aarch64-linux-gnu")
    return _run([objdump, "-d", "-C", "--no-show-raw-insn", str(object_file)])


def compile_and_disassemble(compiler: str, source: Path) -> str:
    """Compile one source of the kernels for aarch64 and return the disassembly of the object.

    Args:
        compiler: command of the compiler, flags allowed.
        source: a .cpp file of the kernels.

    Raises:
        RuntimeError: a command failed; the message holds its output.
        FileNotFoundError: there is no objdump for aarch64.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernel.o"
        _run([*shlex.split(compiler), *FLAGS, f"-I{CSRC}", "-c", str(source), "-o", str(made)])
        return disassemble(made)


def functions(disassembly: str) -> dict[str, list[Instruction]]:
    """Instructions of each function, by its demangled name."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in disassembly.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = found.setdefault(header.group(1), [])
        elif match := re.match(r"\s*([0-9a-f]+):\s+(\S.*)$", line):
            text = re.sub(r"\s+", " ", match.group(2).split("//")[0]).strip()
            current.append(Instruction(int(match.group(1), 16), text))
    return found


def kernel_name(function: str) -> str | None:
    """Name in the table of micro-kernels of a demangled function, or None if it is no micro-kernel."""
    match = _KERNEL.search(function)
    if not match:
        return None
    if match.group(1):
        return match.group(1)
    engine = match.group(2).removeprefix("vec_") + "_fmla"
    return f"gemm_f32_f32_{match.group(3)}p12x1_{match.group(4)}x12_{engine}"


def inner_loop(kernel: str, body: list[Instruction]) -> Loop:
    """The innermost loop that does most of a kernel's work.

    Args:
        kernel: name in the table; its last word is the instruction that does the work.
        body: the function.

    Raises:
        ValueError: there is no such loop.
    """
    engine = next(name for name in sorted(PRODUCTS, key=len, reverse=True) if kernel.endswith(f"_{name}"))
    ranges = [
        (i.branch_target, i.address) for i in body if i.branch_target is not None and i.branch_target <= i.address
    ]
    innermost = [r for r in ranges if not any(o != r and o[0] >= r[0] and o[1] <= r[1] for o in ranges)]
    loops = [Loop(kernel, engine, tuple(i for i in body if first <= i.address <= last)) for first, last in innermost]
    best = max(loops, key=lambda loop: loop.work, default=None)
    if best is None or best.work == 0:
        raise ValueError(f"{kernel}: no loop with {engine} in its code")
    return best


def kernel_loops(compiler: str) -> list[Loop]:
    """The inner loop of every aarch64 micro-kernel as a compiler makes it."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return loops_of(pool.map(lambda source: compile_and_disassemble(compiler, CSRC / source), SOURCES))


def loops_of(listings: Iterable[str]) -> list[Loop]:
    """The inner loop of every aarch64 micro-kernel in some disassemblies."""
    loops = []
    for listing in listings:
        for function, body in functions(listing).items():
            kernel = kernel_name(function)
            if kernel is not None:
                loops.append(inner_loop(kernel, body))
    return sorted(loops, key=lambda loop: (loop.engine, loop.kernel))


def cycles(loop: Loop, cpu: str, mca: str) -> float:
    """Modelled cycles of one pass through a loop, in the steady state.

    Args:
        loop: what ``kernel_loops`` returned.
        cpu: as LLVM calls it.
        mca: command of llvm-mca.

    Raises:
        RuntimeError: llvm-mca refused the code.
    """
    totals = []
    for iterations in (100, 300):
        command = [mca, "-mtriple=aarch64", f"-mcpu={cpu}", f"-iterations={iterations}", "-"]
        done = subprocess.run(command, input=loop.assembly(), capture_output=True, text=True)
        match = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
        if done.returncode != 0 or not match:
            raise RuntimeError(f"{shlex.join(command)} failed on {loop.kernel}:\n{done.stderr}")
        totals.append(int(match.group(1)))
    return (totals[1] - totals[0]) / 200


def share_of_peak(loop: Loop, cpu: str, mca: str) -> float | None:
    """Work per cycle over the most that the model allows; None if the CPU has not the instruction."""
    peak = PEAK_PER_CYCLE[cpu].get(loop.engine)
    return None if peak is None else loop.work / peak / cycles(loop, cpu, mca)


def main(argv: list[str]) -> int:
    """Print the table; returns 1 if a loop spills."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cpu", action="append", choices=PEAK_PER_CYCLE, help="default: all")
    parser.add_argument("--compiler", action="append", choices=("gcc", "clang"), help="default: all that are there")
    parser.add_argument("--filter", default="", help="kernels whose name contains this")
    args = parser.parse_args(argv)
    mca, compilers = find_mca(), find_compilers()
    if mca is None:
        parser.error(f"no llvm-mca of LLVM {OLDEST_LLVM} or newer: install llvm-19")
    missing = [name for name in args.compiler or () if name not in compilers]
    if missing or not compilers:
        parser.error(f"no compiler for aarch64 ({', '.join(missing) or 'gcc, clang'}): install g++-aarch64-linux-gnu")
    cpus = args.cpu or list(PEAK_PER_CYCLE)
    print(f"{mca}, cycles for each step of four products, and share of the model's peak; of 1000 products, the loop's")
    print("instructions and the vectors that it loads")
    print(
        f"{'kernel':<46} {'code':<6}{'loop':>5}{'work':>5}{'instr.':>7}{'loads':>7}"
        + "".join(f"{cpu:>16}" for cpu in cpus)
        + "  spills"
    )
    spilled = 0
    for name in args.compiler or compilers:
        for loop in kernel_loops(compilers[name]):
            if args.filter not in loop.kernel:
                continue
            cells = ""
            for cpu in cpus:
                if loop.engine not in PEAK_PER_CYCLE[cpu]:
                    cells += f"{'-':>16}"
                    continue
                passed = cycles(loop, cpu, mca)
                share = loop.work / PEAK_PER_CYCLE[cpu][loop.engine] / passed
                cells += f"{passed / loop.steps:>9.2f} {share:>5.0%} "
            spills = loop.spills()
            spilled += len(spills)
            rates = f"{1000 * len(loop.body) / loop.products:>7.1f}{1000 * loop.loads / loop.products:>7.1f}"
            print(f"{loop.kernel:<46} {name:<6}{len(loop.body):>5}{loop.work:>5}{rates}{cells}  {len(spills)}")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
