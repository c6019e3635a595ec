"""What this machine is, for the labels on what was measured."""

from __future__ import annotations

import contextlib
import platform
import re

from deploy.bundle import Machine
from deploy.host import host, name_cpu

__all__ = ["available_memory_bytes", "cpu_name", "machine", "usable_cpus", "versions"]

_INSTRUCTION_SETS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16", "svei8mm"),
)
"""Those that kernels for bf16 and int8 ask for, as /proc/cpuinfo spells them: x86-64, then aarch64."""


def cpu_name(cpuinfo: str | None = None) -> str:
    """Name of the CPU: the kernel's, on aarch64 the core's by its numbers; "unknown" where there is neither.

    Args:
        cpuinfo: Content of /proc/cpuinfo; None asks this machine.
    """
    if cpuinfo is None:
        return host().cpu_name()
    return name_cpu(cpuinfo) or f"unknown {platform.machine()} CPU"


def machine(cpuinfo: str | None = None) -> Machine:
    """This machine, for a manifest.

    Args:
        cpuinfo: Content of /proc/cpuinfo; None asks this machine.
    """
    text = (host().read("/proc/cpuinfo") or "") if cpuinfo is None else cpuinfo
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    words = set(found[1].split()) if found else set()
    return Machine(cpu_name(cpuinfo), platform.machine(), tuple(name for name in _INSTRUCTION_SETS if name in words))


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and the quotas of its control groups rounded down."""
    return host().usable_cpus()


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping, within the limits of all control groups; None if unknown."""
    return host().available_memory_bytes()


def versions() -> dict[str, str]:
    """Versions of what runs variants, by package; `none` for one that is not installed."""
    import importlib.metadata  # Takes 15 ms, which a start that nobody asks for it need not spend.

    result = {"torch_ext": "none", "torch": "none", "onnxruntime": "none"}
    for name in ("torch", "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[name] = importlib.metadata.version(name)
    with contextlib.suppress(ModuleNotFoundError):
        import torch_ext  # In a checkout it is not installed, so that the line above would not find it.

        result["torch_ext"] = torch_ext.__version__
    return result
