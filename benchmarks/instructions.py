"""Executed instructions of single calls on an emulated Neoverse N2, compared with the project's bars.

Counts, not times: emulation says nothing of speed. One thread, bias included, the third repetition of each call::

    python benchmarks/instructions.py --tools ../shared/tools/icount --root ARM64_ROOT --site DIR[:DIR]

ARM64_ROOT holds an aarch64 Python 3.11; DIRs hold its packages (torch 2.10.0) and torch_ext (an unpacked wheel). Needs
the aarch64 cross compiler for the markers. Exit code 1 if a count is above its bar.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = [
    {"name": "linear 32x768x768", "kind": "linear", "shape": [32, 768, 768], "activation": "none", "bar": 2.4e6,
     "pytorch_bf16": 3.94e6},
    {"name": "linear 128x768x3072 + GELU", "kind": "linear", "shape": [128, 768, 3072], "activation": "gelu",
     "bar": 33e6, "pytorch_bf16": 47.8e6},
    {"name": "linear 1x768x768", "kind": "linear", "shape": [1, 768, 768], "activation": "none", "bar": None,
     "pytorch_bf16": None},
    {"name": "MiniLM-L6, 16 tokens", "kind": "encoder", "tokens": 16, "bar": 30e6, "pytorch_bf16": 69.1e6},
    {"name": "linear 128x768x3072", "kind": "linear", "shape": [128, 768, 3072], "activation": "none", "bar": None,
     "pytorch_bf16": 39.1e6},
    {"name": "MiniLM-L6, 128 tokens", "kind": "encoder", "tokens": 128, "bar": None, "pytorch_bf16": 272e6},
]  # fmt: skip
REGIONS = 4  # marker pairs that the plugin knows

MARKERS = "".join(f'void marker_{n}(void) {{ __asm__ volatile("hint #{n}"); }}\n' for n in range(120, 128))
REGION_LINE = re.compile(r"^region(\d+) calls=1 (.*)$", re.MULTILINE)


def count(args: argparse.Namespace, cases: list[dict], folder: Path) -> list[dict[str, int]]:
    """Runs up to four cases under the emulator; returns the counts by class of each."""
    source, library, out = folder / "markers.c", folder / "markers.so", folder / "counts.txt"
    source.write_text(MARKERS)
    subprocess.run([args.cc, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    tools, root = args.tools.resolve(), args.root.resolve()
    environment = {
        "PYTHONHOME": f"{root}/usr",
        "PYTHONPATH": args.site,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    command = [tools / "qemu-aarch64", "-cpu", args.cpu, "-plugin", f"{tools}/insn_classes.so,out={out}", "-L", root]
    for name, value in environment.items():
        command += ["-E", f"{name}={value}"]
    target = Path(__file__).with_name("instructions_target.py")
    command += [root / "usr/bin/python3.11", target, library, json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"instructions: the emulated run failed with exit code {run.returncode}:\n{run.stderr[-2000:]}")
    regions = dict(REGION_LINE.findall(out.read_text()))
    return [
        {key: int(value) for key, value in (pair.split("=") for pair in regions[str(i)].split())}
        for i in range(len(cases))
    ]


def main() -> int:
    """Counts all cases and prints them beside their bars; returns the exit code."""
    parser = argparse.ArgumentParser(description="Executed instructions of single calls on an emulated aarch64 CPU.")
    parser.add_argument("--tools", type=Path, required=True, help="folder with qemu-aarch64 and insn_classes.so")
    parser.add_argument("--root", type=Path, required=True, help="aarch64 root with Python 3.11")
    parser.add_argument("--site", required=True, help="folders with torch and torch_ext for it, separated by colons")
    parser.add_argument("--cpu", default="neoverse-n2", help="the emulator's CPU (default: neoverse-n2)")
    parser.add_argument("--cc", default="aarch64-linux-gnu-gcc", help="compiler of the markers")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    args = parser.parse_args()
    for path in (args.tools / "qemu-aarch64", args.tools / "insn_classes.so", args.root / "usr/bin/python3.11"):
        if not path.exists():
            parser.error(f"{path} is not there")

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(CASES), REGIONS):
            results += count(args, CASES[start : start + REGIONS], Path(folder))
    missed = []
    print(f"Executed instructions in millions, one thread, {args.cpu} under emulation (counts, not times)")
    print(f"{'call':<28}{'ours':>9}{'BFMMLA':>9}{'bar':>9}{'PyTorch 2.10 bf16':>20}")
    for case, counts in zip(CASES, results, strict=True):
        total, bar = counts["total"], case["bar"]
        shown = [f"{value / 1e6:.2f}" if value else "-" for value in (bar, case["pytorch_bf16"])]
        share = f"{counts['bfmmla'] / total:.0%}"
        print(f"{case['name']:<28}{total / 1e6:>9.2f}{share:>9}{shown[0]:>9}{shown[1]:>20}")
        if bar and total > bar:
            missed.append(case["name"])
    if args.json:
        rows = [{**case, "counts": counts} for case, counts in zip(CASES, results, strict=True)]
        args.json.write_text(json.dumps({"cpu": args.cpu, "rows": rows}, indent=2) + "\n")
    if missed:
        print("above the bar: " + ", ".join(missed), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
