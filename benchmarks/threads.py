"""How an encoder scales over the cores of one machine, modelled: docs/threads.md.

    python benchmarks/threads.py            # computes tables and plot, and writes them into docs/
    python benchmarks/threads.py --check    # exit code 1 if docs/threads.md holds other tables

What each thread gets is not modelled: threads.cpp asks the functions that the ops ask (plan_gemm, balance_heads). What
that costs is: products at a rate, bytes at another, and so much for each parallel region. Nothing here was timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # In place of this folder, whose modules are those of a package.
    sys.path[0] = str(ROOT)

from benchmarks import report  # noqa: E402

CSRC = ROOT / "torch_ext" / "csrc"
DOCS = ROOT / "docs"
BEGIN, END = "<!-- written by benchmarks/threads.py: begin -->", "<!-- end -->"

MODELS = {"MiniLM-L6": (384, 1536, 12, 6), "BERT-base": (768, 3072, 12, 12)}  # hidden, wide, heads, layers
TOKENS = (16, 128, 512, 2048, 8192)
TEXT_TOKENS = 128  # longest text; a batch of more tokens holds several
MOST_THREADS = 64
SHOWN = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Costs:
    """What the model takes work to cost.

    Attributes:
        macs_per_ns: products of one core.
        core_bytes_per_ns: what one core reads from beyond its own caches.
        all_bytes_per_ns: what all cores read from there together.
        row_elements_per_ns: elements of residual and norm by one core.
        barrier_us: a parallel region of 32 threads or more; fewer cost less, with the logarithm of their number.
    """

    macs_per_ns: float = 143.0
    core_bytes_per_ns: float = 20.0
    all_bytes_per_ns: float = 300.0
    row_elements_per_ns: float = 2.0
    barrier_us: float = 5.0

    def barrier_ns(self, threads: int) -> float:
        """A region in which so many threads take part; nothing for one."""
        return 1e3 * self.barrier_us * min(1.0, math.log2(threads) / 5)


LOW, HIGH = Costs(barrier_us=3.0), Costs(barrier_us=8.0)


@dataclass(frozen=True)
class Part:
    """One part of a layer on so many threads.

    Attributes:
        name: of the part.
        tasks: how many there are.
        most_macs: products of the most loaded task.
        macs: products of all.
        most_bytes: weights and rows that the most loaded task reads.
        bytes: the same of all.
        elements: of the most loaded task, for residual and norm.
    """

    name: str
    tasks: int
    most_macs: int = 0
    macs: int = 0
    most_bytes: int = 0
    bytes: int = 0
    elements: int = 0

    def balance(self, threads: int) -> float | None:
        """The most loaded task over the mean of all threads, those without a task included; 1 is even."""
        return self.most_macs * threads / self.macs if self.macs else None

    def ns(self, costs: Costs) -> float:
        """Modelled time: the slowest of products, a core's bytes and all cores' bytes, then the barrier."""
        work = max(
            self.most_macs / costs.macs_per_ns,
            self.most_bytes / costs.core_bytes_per_ns,
            self.bytes / costs.all_bytes_per_ns,
            self.elements / costs.row_elements_per_ns,
        )
        return work + costs.barrier_ns(self.tasks)


def norm_part(name: str, tokens: int, hidden: int, threads: int, grain_elements: int) -> Part:
    """Residual and norm, split by rows as the encoder does."""
    tasks = max(1, min(threads, tokens * hidden // grain_elements))
    return Part(name, tasks, elements=math.ceil(tokens / tasks) * hidden)


def row_grain() -> int:
    """Elements of residual and norm that are worth a task, as encoder.cpp says."""
    match = re.search(r"kStepGrain = ([^;]+);", (CSRC / "encoder.cpp").read_text())
    if match is None:
        raise RuntimeError("encoder.cpp: expected a constant kStepGrain; tell benchmarks/threads.py how rows are split")
    return math.prod(int(factor) for factor in match[1].split("*"))


def compile_planner(folder: Path, compiler: str) -> Path:
    """Compiles threads.cpp with the sources that it asks."""
    program = folder / "threads"
    sources = [ROOT / "benchmarks" / "threads.cpp", CSRC / "gemm.cpp", CSRC / "attention.cpp"]
    # What the functions that are asked do not need may be missing.
    flags = ["-std=c++20", "-O2", "-ffunction-sections", "-Wl,--gc-sections", f"-I{CSRC}"]
    command = [*shlex.split(compiler), *flags, "-o", str(program), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return program


def plan(program: Path, model: str, tokens: int) -> dict[int, list[Part]]:
    """The parts of one layer, by the number of threads."""
    hidden, wide, heads, _ = MODELS[model]
    command = [str(program), *map(str, (hidden, wide, heads, tokens, TEXT_TOKENS, MOST_THREADS))]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    grain = row_grain()
    layers: dict[int, list[Part]] = {}
    for line in lines:
        found = json.loads(line)
        parts = layers.setdefault(found["threads"], [])
        parts.append(
            Part(
                found["part"],
                found["tasks"],
                found["most_macs"],
                found["macs"],
                2 * (found["most_weights"] + found["most_rows"]),  # bf16
                2 * (found["weights"] + found["rows"]),
            )
        )
        if found["part"] in ("out", "down"):
            parts.append(norm_part(f"norm after {found['part']}", tokens, hidden, found["threads"], grain))
    return layers


def speed_up(layers: Mapping[int, Sequence[Part]], threads: int, costs: Costs) -> float:
    """Of a whole layer, over one thread."""
    one, many = (sum(part.ns(costs) for part in layers[count]) for count in (1, threads))
    return one / many


def tables(plans: Mapping[tuple[str, int], Mapping[int, Sequence[Part]]]) -> str:
    """What goes into the document."""
    parts = []
    for model in MODELS:
        rows = []
        for tokens in TOKENS:
            cells = []
            for threads in SHOWN[1:]:
                best, worst = (speed_up(plans[model, tokens], threads, costs) for costs in (LOW, HIGH))
                cells.append(f"{worst:.1f} - {best:.1f}")
            rows.append([str(tokens), *cells])
        parts += [
            f"### {model}: modelled speed-up over one thread, regions at 8 and at 3 us",
            report.markdown(["tokens in the batch", *(f"{threads} threads" for threads in SHOWN[1:])], rows),
        ]
    rows = []
    for model in MODELS:
        for tokens in (128, 2048):
            for threads in (8, 64):
                layer = plans[model, tokens][threads]
                balances = (part.balance(threads) for part in layer)
                rows.append(
                    [
                        f"{model}, {tokens} tokens, {threads} threads",
                        " ".join(str(part.tasks) for part in layer),
                        " ".join(f"{value:.2f}" for value in balances if value is not None),
                        str(sum(part.tasks > 1 for part in layer)),
                        f"{sum(part.most_bytes for part in layer) / 2**20:.2f}",
                        f"{sum(part.ns(LOW) for part in layer) / 1e3:.0f}",
                        f"{sum(LOW.barrier_ns(part.tasks) for part in layer) / 1e3:.0f}",
                    ]
                )
    names = ", ".join(part.name for part in next(iter(plans.values()))[1])
    parts += [
        f"### One layer in detail; parts in order: {names}",
        report.markdown(
            ["", "tasks of each part", "balance", "regions", "MiB read by a core", "us", "of them regions"], rows
        ),
        (
            "Balance is the most loaded task over the mean of all threads, those without a task included, for qkv, "
            "attention, out, up and down. Regions at 3 us."
        ),
    ]
    return "\n\n".join(parts)


def insert(document: str, text: str) -> str:
    """The document with its tables replaced.

    Raises:
        ValueError: the marks between which they stand are missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/threads.md: expected the lines {BEGIN!r} and {END!r} around the tables")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def panels(plans: Mapping[tuple[str, int], Mapping[int, Sequence[Part]]]) -> list[report.Curves]:
    """The plot: speed-up over threads for each model and number of tokens."""
    threads = list(range(1, MOST_THREADS + 1))
    return [
        report.Curves(
            f"{model}, parallel regions at {costs.barrier_us:g} us",
            "threads",
            "modelled speed-up",
            threads,
            {f"{tokens} tokens": [speed_up(plans[model, tokens], n, costs) for n in threads] for tokens in TOKENS},
        )
        for model in MODELS
        for costs in (LOW, HIGH)
    ]


def main() -> int:
    """Computes and writes, or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the tables differ")
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"), help="C++ compiler (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder with threads.md (default: docs)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = compile_planner(Path(folder), arguments.cxx)
        plans = {(model, tokens): plan(program, model, tokens) for model in MODELS for tokens in TOKENS}
    path = arguments.output / "threads.md"
    document = path.read_text(encoding="utf-8")
    written = insert(document, tables(plans))
    if arguments.check:
        if written != document:
            print(f"{path}: other tables than the code gives: run python benchmarks/threads.py", file=sys.stderr)
        return int(written != document)
    path.write_text(written, encoding="utf-8")
    report.plot_curves(panels(plans), "Modelled, not measured: one layer's speed-up", arguments.output / "threads")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
