"""What this machine is, for the labels on measured speeds."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

__all__ = ["available_memory_bytes", "cpu_name", "usable_cpus"]


def cpu_name() -> str:
    """The CPU as the kernel names it, or its architecture where it does not (ARM)."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and the quota of its container rounded down."""
    count = len(os.sched_getaffinity(0))
    quota = math.inf
    for path, split in (("/sys/fs/cgroup/cpu.max", True), ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", False)):
        try:
            words = Path(path).read_text(encoding="ascii").split()
            period = int(
                words[1] if split else Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text(encoding="ascii")
            )
            if words[0] not in {"max", "-1"}:
                quota = int(words[0]) / period
            break
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
    return max(1, min(count, math.floor(quota) if math.isfinite(quota) else count))


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping, within the limit of the container; None where it is not told."""
    available: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most = Path(limit).read_text(encoding="ascii").strip()
            if most != "max":
                available.append(int(most) - int(Path(used).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return min(available, default=None)
