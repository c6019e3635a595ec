"""What this machine is: its CPU's name, and the CPUs and memory that the process may use.

Standard library only: programs that must not import torch use it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["Machine", "name_cpu"]

# Arm's register MIDR_EL1 has an implementer and a part number for each kind of core. The kernel prints both in
# /proc/cpuinfo, and no name. Source: arch/arm64/include/asm/cputype.h of Linux, and the list of util-linux's lscpu.
_ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse N1 (Graviton2, Ampere Altra)",
    (0x41, 0xD40): "Neoverse V1 (Graviton3)",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse N2 (Yitian 710)",
    (0x41, 0xD4A): "Neoverse E1",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse V2 (Graviton4, Axion C4A, Grace)",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD83): "Neoverse V3AE",
    (0x41, 0xD84): "Neoverse V3 (Graviton5)",
    (0x41, 0xD85): "Cortex-X925",
    (0x41, 0xD87): "Cortex-A725",
    (0x41, 0xD8E): "Neoverse N3 (Axion N4A)",
    (0x46, 0x001): "A64FX",
    (0x48, 0xD01): "Kunpeng 920",
    (0x4E, 0x004): "Carmel",
    (0x6D, 0xD49): "Cobalt 100 (Neoverse N2)",
    (0xC0, 0xAC3): "AmpereOne",
    (0xC0, 0xAC4): "AmpereOne",
    (0xC0, 0xAC5): "AmpereOne",
}

_ARM_IMPLEMENTERS = {
    0x42: "Broadcom",
    0x43: "Cavium",
    0x46: "Fujitsu",
    0x48: "HiSilicon",
    0x4E: "NVIDIA",
    0x50: "APM",
    0x51: "Qualcomm",
    0x53: "Samsung",
    0x56: "Marvell",
    0x61: "Apple",
    0x6D: "Microsoft",
    0x70: "Phytium",
    0xC0: "Ampere",
}
"""Those whose names say more than the number; virtual machines on a Mac show Apple's cores with part 0x000."""


def _arm_cores(cpuinfo: str) -> list[tuple[int, int]]:
    """Implementer and part of each CPU in /proc/cpuinfo, in its order; kernels print one block for each CPU."""
    cores: list[tuple[int, int]] = []
    implementer: int | None = None
    for match in re.finditer(r"^CPU (implementer|part)\s*:\s*(?:0x)?([0-9a-f]{1,3})\s*$", cpuinfo, re.MULTILINE | re.I):
        number = int(match[2], 16)
        if match[1].lower() == "implementer":
            implementer = number
        elif implementer is not None:
            cores.append((implementer, number))
            implementer = None
    return cores


def _arm_core_name(implementer: int, part: int) -> str:
    numbers = f"implementer {implementer:#04x} part {part:#05x}"
    vendor = _ARM_IMPLEMENTERS.get(implementer)
    return _ARM_CORES.get((implementer, part)) or (f"{vendor} {numbers}" if vendor else numbers)


def name_cpu(cpuinfo: str, midr: str = "") -> str | None:
    """Name of the CPU, from what the kernel says about it.

    Args:
        cpuinfo: Content of /proc/cpuinfo. On aarch64 it has numbers in place of a name; cores of several kinds are all
            named, with how many there are.
        midr: Content of ``/sys/devices/system/cpu/cpu0/regs/identification/midr_el1``, for an aarch64 whose
            /proc/cpuinfo says nothing, as in some sandboxes.

    Returns:
        Such as ``AMD EPYC 7571``, ``Neoverse V1 (Graviton3)`` or ``4x Cortex-A55 + 4x Cortex-A76``; a core without a
        known name by its numbers, ``implementer 0x41 part 0xd99``; None where nothing is known.
    """
    cores = _arm_cores(cpuinfo)
    if not cores and re.fullmatch(r"0x[0-9a-f]+", midr):
        register = int(midr, 16)
        cores = [(register >> 24 & 0xFF, register >> 4 & 0xFFF)]
    match = re.search(r"^(?:model name|Processor)[ \t]*:[ \t]*(\S.*)$", cpuinfo, re.MULTILINE)
    model = match[1].strip() if match else None
    # Kernels that print both: "ARMv8 Processor rev 1 (v8l)", for 32-bit programs, is no name.
    if cores and (model is None or "Processor rev" in model or all(core in _ARM_CORES for core in cores)):
        kinds = Counter(_arm_core_name(*core) for core in cores)
        return next(iter(kinds)) if len(kinds) == 1 else " + ".join(f"{n}x {kind}" for kind, n in kinds.items())
    return model


@dataclasses.dataclass(frozen=True)
class _CgroupMount:
    """A mounted hierarchy of control groups.

    Attributes:
        version: 1 or 2.
        controllers: Of version 1: ``cpu``, ``memory`` ...
        root: Path of the group that is mounted, as /proc/self/cgroup spells paths.
        point: Where it is mounted.
    """

    version: int
    controllers: frozenset[str]
    root: tuple[str, ...]
    point: str


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def _unescape(field: str) -> str:
    """A field of mountinfo: blanks and backslashes in it are octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _cgroup_mounts(mountinfo: str) -> Iterator[_CgroupMount]:
    """The hierarchies that /proc/self/mountinfo lists."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        controllers = frozenset(kind[2].split(",")) if version == 1 else frozenset()
        yield _CgroupMount(version, controllers, _parts(_unescape(fields[3])), _unescape(fields[4]).rstrip("/"))


@dataclasses.dataclass(frozen=True)
class Machine:
    """The system as its files and environment show it.

    Attributes:
        root: where ``/proc`` and ``/sys`` are.
        environ: environment variables.
        affinity: number of CPUs that the process may run on.
        architecture: as ``uname -m`` says.
        page_bytes: size of a memory page.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
    affinity: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))
    architecture: str = dataclasses.field(default_factory=platform.machine)
    page_bytes: int = dataclasses.field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE"))

    def read(self, path: str) -> str | None:
        """The contents of a file below ``root``, stripped, or None if it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return None

    def _cgroup_directories(self, controller: str) -> list[tuple[int, str]]:
        """Version and directory of each control group that limits the process: its own and all ancestors.

        /proc/self/cgroup names the group in each hierarchy; /proc/self/mountinfo tells where the hierarchy, or a part
        of it, is mounted. A container sees the part from its own group on, under the host's path or under ``/``.
        """
        mounts = list(_cgroup_mounts(self.read("/proc/self/mountinfo") or ""))
        directories: list[tuple[int, str]] = []
        for line in (self.read("/proc/self/cgroup") or "").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if number == "0" and not controllers:
                version, usual = 2, ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            elif controller in controllers.split(","):
                version, usual = 1, [f"/sys/fs/cgroup/{controllers}", f"/sys/fs/cgroup/{controller}"]
            else:
                continue
            places = [
                (mount.root, mount.point)
                for mount in mounts
                if mount.version == version and (version == 2 or controller in mount.controllers)
            ] or [((), point) for point in usual]
            group = _parts(path)
            for root, point in places:
                if group[: len(root)] == root:
                    below = group[len(root) :]
                else:
                    # A path of another namespace: whatever of it is mounted here.
                    below = group
                below = tuple(part for part in below if part != "..")
                directories += [(version, "/".join([point, *below[:count]])) for count in range(len(below), -1, -1)]
        return list(dict.fromkeys(directories))

    def cpu_quota(self) -> float | None:
        """How many CPUs' time the control groups (v1 or v2) allow at the tightest level; None without limit."""
        quotas = []
        for version, directory in self._cgroup_directories("cpu"):
            if version == 2:
                fields = (self.read(f"{directory}/cpu.max") or "").split()
            else:
                fields = [self.read(f"{directory}/cpu.cfs_{part}_us") or "" for part in ("quota", "period")]
            if len(fields) == 2 and all(field.isdecimal() and int(field) > 0 for field in fields):
                quotas.append(int(fields[0]) / int(fields[1]))
        return min(quotas, default=None)

    def _memory_limits(self) -> list[tuple[int, int | None]]:
        """Limit and use in bytes of each control group that has a limit; the use is None where it cannot be read."""
        limits = []
        for version, directory in self._cgroup_directories("memory"):
            names = ("memory.max", "memory.current")
            if version == 1:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            limit, used = (self.read(f"{directory}/{name}") or "" for name in names)
            if limit.isdecimal() and int(limit) < 1 << 60:  # v1 writes a huge number for "none".
                limits.append((int(limit), int(used) if used.isdecimal() else None))
        return limits

    def memory_limit_bytes(self) -> int | None:
        """What the control groups allow, the tightest of all levels; None without limit."""
        return min((limit for limit, _ in self._memory_limits()), default=None)

    def _meminfo_bytes(self, name: str) -> int | None:
        match = re.search(rf"^{name}:\s+(\d+) kB", self.read("/proc/meminfo") or "", re.MULTILINE)
        return int(match[1]) * 1024 if match else None

    def memory_bytes(self) -> int | None:
        """The machine's memory."""
        return self._meminfo_bytes("MemTotal")

    def available_memory_bytes(self) -> int | None:
        """Memory that can be had without swapping, within the limits of all control groups; None if unknown."""
        available = [max(0, limit - used) for limit, used in self._memory_limits() if used is not None]
        if (free := self._meminfo_bytes("MemAvailable")) is not None:
            available.append(free)
        return min(available, default=None)

    def usable_cpus(self) -> int:
        """How many threads can run at once: affinity (cpuset) and quota, rounded down, at least 1."""
        quota = self.cpu_quota()
        return max(1, min(self.affinity, math.floor(quota) if quota is not None else self.affinity))

    def cpu_name(self) -> str:
        """The name of the CPU."""
        midr = self.read("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1") or ""
        return name_cpu(self.read("/proc/cpuinfo") or "", midr) or f"unknown {self.architecture} CPU"

    def emulated_on(self) -> str | None:
        """The architecture that really computes if this process is emulated (QEMU user mode), else None."""
        ours = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}
        own = ours.get(self.architecture)
        # uname is translated by the emulator; these files are the host kernel's.
        kernel = self.read("/proc/sys/kernel/arch")
        if own and kernel in ours and ours[kernel] != own:
            return kernel
        modalias = self.read("/sys/devices/system/cpu/modalias") or ""
        if own == "arm" and "type:x86" in modalias:
            return "x86_64"
        if own == "arm" and re.search(r"^vendor_id\s*:", self.read("/proc/cpuinfo") or "", re.MULTILINE):
            return "x86_64"
        return None
