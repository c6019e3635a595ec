"""What this machine is, for the labels on what was measured."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path

from deploy.bundle import Machine

__all__ = ["available_memory_bytes", "cpu_name", "machine", "usable_cpus"]

# Arm's part numbers of server cores (MIDR_EL1); the kernel gives no names on aarch64.
_ARM_CORES = {
    "0xd08": "Cortex-A72",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd49": "Neoverse N2",
    "0xd4f": "Neoverse V2",
    "0xd83": "Neoverse V3AE",
    "0xd84": "Neoverse V3",
    "0xd8e": "Neoverse N3",
}

_INSTRUCTION_SETS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16", "svei8mm"),
)
"""Those that kernels for bf16 and int8 ask for, as /proc/cpuinfo spells them: x86-64, then aarch64."""


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_name(cpuinfo: str | None = None) -> str:
    """Name of the CPU: the kernel's, or by its part number on aarch64, or its architecture where neither is known.

    Args:
        cpuinfo: Content of /proc/cpuinfo; None reads it.
    """
    if cpuinfo is None:
        cpuinfo = _cpuinfo()
    if match := re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE):
        return match[1].strip()
    implementer = re.search(r"^CPU implementer\s*:\s*(\w+)", cpuinfo, re.MULTILINE)
    part = re.search(r"^CPU part\s*:\s*(\w+)", cpuinfo, re.MULTILINE)
    if implementer and part:
        known = _ARM_CORES.get(part[1]) if implementer[1] == "0x41" else None
        return known or f"{platform.machine()} (implementer {implementer[1]}, part {part[1]})"
    return platform.machine()


def machine(cpuinfo: str | None = None) -> Machine:
    """This machine, for a manifest.

    Args:
        cpuinfo: Content of /proc/cpuinfo; None reads it.
    """
    if cpuinfo is None:
        cpuinfo = _cpuinfo()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    words = set(found[1].split()) if found else set()
    return Machine(cpu_name(cpuinfo), platform.machine(), tuple(name for name in _INSTRUCTION_SETS if name in words))


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
