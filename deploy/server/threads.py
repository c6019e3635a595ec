"""How many threads the engine may use."""

from __future__ import annotations

from ..host import host

__all__ = ["available_cpus"]


def available_cpus() -> int:
    """CPUs of this process: affinity and the CPU quotas of its control groups, rounded down, at least 1.

    Raises:
        ModuleNotFoundError: torch_ext is not installed.
    """
    return host().usable_cpus()
