"""The table of ``make demo``: a row per variant, what it was measured with, and who else used the machine meanwhile."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle import Manifest
from deploy.machine import cpu_name

BASELINE = "transformers fp32"
NOISE = 0.05
"""Served speeds of the same variant on a quiet machine differ by as much."""
BUSY = 0.1
"""Share of the CPUs above which a note says that other programs lowered the speeds."""
TOO_BUSY = 0.25
"""Share of the CPUs above which they made a speed too low to compare it."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: Variant of the bundle, or `BASELINE`.
        size_bytes: Of its weights.
        accuracy: Against transformers in fp32, in words.
        load: What the load test measured.
        chosen: Whether the server took this variant by itself.
        others: Share of the CPUs that other programs used meanwhile.
    """

    name: str
    size_bytes: int
    accuracy: str
    load: dict[str, Any]
    chosen: bool = False
    others: float = 0.0


class Neighbours:
    """Measures how much of the CPUs others use within a block: on a busy machine, speeds are not what it can do.

    Attributes:
        share: Between 0 and 1, of all CPUs; set when the block ends.
    """

    share = 0.0

    def __enter__(self) -> Neighbours:
        """Starts."""
        self._before = self._read()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends. Processes started within have ended by now, or they count as others."""
        busy_s, own_s, wall_s = (after - before for after, before in zip(self._read(), self._before, strict=True))
        self.share = max(0.0, busy_s - own_s) / (wall_s * (os.cpu_count() or 1))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """CPU seconds of all, CPU seconds of this process and the children it waited for, and time."""
        cpu, *numbers = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        assert cpu == "cpu"
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, numbers[:8])
        ticks = user + nice + system + irq + softirq + steal
        own_s = sum(os.times()[:4])
        return ticks / os.sysconf("SC_CLK_TCK"), own_s, time.monotonic()


def machine(threads: int) -> str:
    """One paragraph on what the numbers were measured with."""
    packages = ("torch", "transformers", "onnxruntime", "locust")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{cpu_name()} ({platform.machine()}), {os.cpu_count()} cores, {threads} threads for each server, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {versions}"
    )


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as text with aligned columns. Gains are those of speeds that other programs did not lower."""
    lines = [("variant", "size", "accuracy against fp32", "texts/s", "gain", "p50", "p95")]
    baseline = next((row.load["texts_per_s"] for row in rows if row.name == BASELINE and row.others <= TOO_BUSY), None)
    for row in rows:
        speed, latency = row.load["texts_per_s"], row.load["latency_ms"]
        lines.append(
            (
                f"{row.name} *" if row.chosen else row.name,
                f"{row.size_bytes / 1e6:.1f} MB",
                row.accuracy,
                f"{speed:.1f}",
                f"{speed / baseline:.1f}x" if baseline and row.others <= TOO_BUSY else "-",
                f"{latency['p50']:.0f} ms",
                f"{latency['p95']:.0f} ms",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = (0, 2)
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def faster_than_chosen(rows: Sequence[Row]) -> str:
    """Name of the fastest row, if it is another one than the server took, beyond noise; else an empty text."""
    best = max(rows, key=lambda row: float(row.load["texts_per_s"]))
    speed = next((row.load["texts_per_s"] for row in rows if row.chosen), math.inf)
    return best.name if best.load["texts_per_s"] * (1 - NOISE) > speed else ""


def accuracy_of(manifest: Manifest, name: str) -> str:
    """What the export measured of a variant."""
    accuracy = manifest.variants[name].accuracy
    return f"{accuracy.metric} {accuracy.mean:.6f} (min {accuracy.min:.6f})"


def weights_bytes(model: Path) -> int:
    """Size of a model folder's weights."""
    safetensors = list(model.glob("*.safetensors"))
    return sum(path.stat().st_size for path in safetensors or model.glob("*.bin"))
