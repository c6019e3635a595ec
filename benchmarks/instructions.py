"""No ARM hardware: executed instructions of single calls on an emulated Neoverse N2, and cycles under LLVM's models.

    python benchmarks/instructions.py --tools TOOLS --root ARM64_ROOT --site DIR[:DIR]            # torch_ext alone
    python benchmarks/instructions.py --tools TOOLS --root ARM64_ROOT --site DIR[:DIR] --peers    # make bench-model

Counts, not times: emulation says nothing of speed. One thread, bias included, one call of each, not the first.
ARM64_ROOT holds an aarch64 Python (scripts/arm64_root.sh makes one); DIRs hold its packages (torch 2.10.0; onnxruntime
for peers) and torch_ext (an unpacked wheel). TOOLS holds qemu-aarch64 with plugins (scripts/counting_emulator.sh builds
it); classes.c, compiled here, counts by class between markers. Needs the aarch64 cross compiler for the markers, for
cycles llvm-mca as well. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # In place of this folder, whose modules are those of a package.
    sys.path[0] = str(ROOT)

from benchmarks import report  # noqa: E402
from benchmarks.blocks import COVERED, CPUS, Block, Model, read_blocks  # noqa: E402
from benchmarks.instructions_report import (  # noqa: E402
    OURS,
    OURS_INT8,
    PEERS,
    WORKS,
    Found,
    bars,
    panels_of,
    text_of,
)
from benchmarks.mca import find_mca  # noqa: E402

MARKERS = "".join(f'void marker_{n}(void) {{ __asm__ volatile("hint #{n}"); }}\n' for n in range(120, 128))
REGION_LINE = re.compile(r"^region(\d+) calls=1 (.*)$", re.MULTILINE)


@dataclass
class Run:
    """One run of the emulator.

    Attributes:
        found: a result for each case that is supported.
        blocks: blocks of each of them, if they were asked for.
        unsupported: why the others are missing, by engine and work.
        versions: of the emulated packages.
    """

    found: list[Found]
    blocks: list[Counter[Block]]
    unsupported: dict[tuple[str, str], str]
    versions: dict[str, str]


class Emulator:
    """Runs cases in the emulated root.

    Args:
        arguments: of the command line.
        folder: for what is compiled and written.
        blocks: whether blocks are counted, too.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path, blocks: bool) -> None:
        self.folder = folder
        self._arguments = arguments
        self._blocks = blocks
        markers = folder / "markers.c"
        markers.write_text(MARKERS)
        _compile(arguments.cc, markers, folder / "markers.so")
        _compile(arguments.host_cc, Path(__file__).with_name("classes.c"), folder / "classes.so")
        if blocks:
            _compile(arguments.host_cc, Path(__file__).with_name("blocks.c"), folder / "blocks.so")

    def run(self, cases: Sequence[Mapping[str, Any]], number: int) -> Run:
        """Runs cases, each in a process that is forked after the engine is imported, for imports take the longest.

        Args:
            cases: works with the same ``engine``.
            number: of the run; names its files.
        """
        tools, root = self._arguments.tools.resolve(), self._arguments.root.resolve()
        out, dump = self.folder / f"counts-{number}.txt", self.folder / f"blocks-{number}.txt"
        environment = {
            "PYTHONHOME": f"{root}/usr",
            "PYTHONPATH": self._arguments.site,
            # Compiled once for all runs.
            "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX") or f"{self.folder}/bytecode",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        command = [tools / "qemu-aarch64", "-cpu", self._arguments.cpu]
        command += ["-plugin", f"{self.folder}/classes.so,out={out}"]
        written = [out]
        if self._blocks:
            command += ["-plugin", f"{self.folder}/blocks.so,out={dump}"]
            written.append(dump)
        command += ["-L", root]
        for name, value in environment.items():
            command += ["-E", f"{name}={value}"]
        target = Path(__file__).with_name("instructions_target.py")
        command += [find_python(root), target, self.folder / "markers.so", self.folder, json.dumps(cases), *written]
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        run = subprocess.run(command, capture_output=True, text=True, env=inherited)
        if run.returncode != 0:
            names = ", ".join(f"{case['engine']} {case['name']}" for case in cases)
            raise SystemExit(
                f"instructions: the emulated run of {names} failed with exit code {run.returncode}:\n"
                f"{run.stderr[-2000:]}"
            )
        said = json.loads(run.stdout.splitlines()[-1])
        missing = {int(index): why for index, why in said["unsupported"].items()}
        here = [index for index in range(len(cases)) if index not in missing]
        return Run(
            [Found(cases[i]["name"], cases[i]["engine"], read_counts(Path(f"{out}.{i}").read_text())[0]) for i in here],
            [read_blocks(Path(f"{dump}.{i}")).get(0, Counter()) if self._blocks else Counter() for i in here],
            {(cases[index]["engine"], cases[index]["name"]): why for index, why in missing.items()},
            said["versions"],
        )


def _compile(compiler: str, source: Path, target: Path) -> None:
    command = [*shlex.split(compiler), "-shared", "-fPIC", "-O2", "-o", str(target), str(source)]
    subprocess.run(command, check=True)


def find_python(root: Path) -> Path | None:
    """The Python of a root, ``usr/bin/python3.N``; None without one."""
    found = [path for path in (root / "usr/bin").glob("python3.*") if path.name[8:].isdigit()]
    return max(found, key=lambda path: int(path.name[8:]), default=None)


def read_counts(text: str) -> dict[int, dict[str, int]]:
    """Counts by class of every region that ran once."""
    return {
        int(region): {key: int(value) for key, value in (pair.split("=") for pair in counts.split())}
        for region, counts in REGION_LINE.findall(text)
    }


def write_onnx(folder: Path) -> None:
    """The works as ONNX models, fp32 and dynamically quantized, as ``deploy export`` makes them."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import BertConfig, BertModel

    from deploy.export.write_onnx import export_fp32, quantize_int8

    torch.manual_seed(0)
    done = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for work in WORKS:
            if work["file"] in done:
                continue
            done.add(work["file"])
            fp32, int8 = folder / f"{work['file']}.onnx", folder / f"{work['file']}-int8.onnx"
            if work["kind"] == "encoder":
                config = BertConfig(**work["model"])
                export_fp32(BertModel(config).eval(), "feature-extraction", folder / "work", fp32)
                quantize_int8(fp32, int8, folder / "work", config)
                continue
            m, k, n = work["shape"]
            layers = [torch.nn.Linear(k, n), *([torch.nn.GELU()] if work["activation"] == "gelu" else [])]
            # Three dimensions, as in a model: two would make it a Gemm, which fast math leaves in fp32.
            torch.onnx.export(
                torch.nn.Sequential(*layers).eval(),
                (torch.randn(1, max(m, 2), k),),
                str(fp32),
                dynamo=False,
                input_names=["x"],
                output_names=["y"],
                dynamic_axes={"x": {1: "m"}, "y": {1: "m"}},
            )
            quantize_dynamic(fp32, int8, per_channel=True, weight_type=QuantType.QInt8)


def cases_of(engines: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Runs: all works of one engine each."""
    return [[{**work, "engine": engine} for work in WORKS] for engine in engines]


def heading(arguments: argparse.Namespace, versions: Mapping[str, str], mca: str | None) -> str:
    """What was counted with what, as a paragraph."""
    emulator = subprocess.run(
        [arguments.tools / "qemu-aarch64", "--version"], check=True, capture_output=True, text=True
    ).stdout
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    model = f", {mca}" if mca else ""
    command = shlex.join(["python", "benchmarks/instructions.py", *arguments.shown])
    return (
        f"Emulated CPU: {arguments.cpu} ({emulator.splitlines()[0]}{model}). Emulated packages: {used}. `{command}`, "
        f"commit {report.commit()}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}."
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked for what has to be there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--tools", type=Path, required=True, help="folder of qemu-aarch64 (scripts/counting_emulator.sh)"
    )
    parser.add_argument("--root", type=Path, required=True, help="aarch64 root with Python (scripts/arm64_root.sh)")
    parser.add_argument("--site", required=True, help="folders with torch and torch_ext for it, separated by colons")
    parser.add_argument("--peers", action="store_true", help="PyTorch and ONNX Runtime on the same work, and cycles")
    parser.add_argument("--cpu", default="neoverse-n2", help="the emulator's CPU (default: %(default)s)")
    parser.add_argument("--cc", default="aarch64-linux-gnu-gcc", help="compiler of the markers")
    parser.add_argument("--host-cc", default="gcc", help="compiler of the emulator's plugins (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    parser.add_argument("--output", type=Path, help="folder for tables and plot (default with --peers: results)")
    arguments = parser.parse_args(argv)
    if not (arguments.tools / "qemu-aarch64").exists():
        parser.error(f"{arguments.tools}/qemu-aarch64 is not there: scripts/counting_emulator.sh builds it")
    if find_python(arguments.root) is None:
        parser.error(f"{arguments.root}/usr/bin/python3.* is not there: scripts/arm64_root.sh makes a root")
    arguments.site = ":".join(str(Path(part).resolve()) for part in arguments.site.split(":"))
    # Where things lie on this machine says nothing to others.
    arguments.shown = ["--peers"] if arguments.peers else []
    if arguments.peers and arguments.output is None:
        arguments.output = report.RESULTS
    return arguments


def main(argv: Sequence[str]) -> int:
    """Counts all works by all engines, prints and writes the results; returns the exit code."""
    arguments = parse(argv)
    mca = find_mca() if arguments.peers else None
    if arguments.peers and mca is None:
        print("instructions: no llvm-mca of LLVM 16 or newer (install llvm-19): no cycles", file=sys.stderr)
    engines = [OURS, OURS_INT8, *(PEERS if arguments.peers else ())]
    found: list[Found] = []
    blocks: list[Counter[Block]] = []
    unsupported: dict[tuple[str, str], str] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.peers:
            write_onnx(folder)
        emulator = Emulator(arguments, folder, mca is not None)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            plan = cases_of(engines)
            for run in pool.map(emulator.run, plan, range(len(plan))):
                found += run.found
                blocks += run.blocks
                unsupported |= run.unsupported
                versions |= run.versions
                if run.found:
                    done = ", ".join(f"{item.work} {item.counts['total'] / 1e6:.2f}" for item in run.found)
                    print(f"{run.found[0].engine}: {done}", flush=True)
    if mca:
        model = Model(mca, mca.replace("llvm-mca", "llvm-mc"))
        for item, executed in zip(found, blocks, strict=True):
            item.cycles = {cpu: model.cycles(executed, cpu) for cpu in CPUS}
    checked = bars(found, arguments.peers)
    # One reason for each engine: it is the same for all that it leaves out.
    left_out: dict[str, str] = {}
    for (engine, work), why in unsupported.items():
        left_out.setdefault(
            engine if all((engine, w["name"]) in unsupported for w in WORKS) else f"{engine}, {work}", why
        )
    data: dict[str, Any] = {
        "cpu": arguments.cpu,
        "covered": COVERED,
        "heading": heading(arguments, versions, mca),
        "versions": versions,
        "commit": report.commit(),
        "left_out": left_out,
        "rows": [vars(item) for item in found],
        "bars": checked,
    }
    text = text_of(data, found)
    print(text)
    if arguments.output:
        stem = arguments.output / f"model-{arguments.cpu}"
        written = report.write(stem, text, data, panels_of(found), f"One thread, {arguments.cpu} under emulation")
        print("\nwritten to " + ", ".join(map(str, written)))
    if arguments.json:
        arguments.json.write_text(json.dumps(data, indent=1, default=vars) + "\n")
    return int(not all(bar.passed for bar in checked))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
