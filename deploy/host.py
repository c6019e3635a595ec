"""The machine that this process runs on, as torch_ext sees it; torch is not imported for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_ext.machine import Machine

__all__ = ["host", "name_cpu"]


def host() -> Machine:
    """This machine: its CPU's name, and the CPUs and memory that the process may use.

    Raises:
        ModuleNotFoundError: torch_ext is not installed.
    """
    from torch_ext.machine import Machine

    return Machine()


def name_cpu(cpuinfo: str) -> str | None:
    """Name of the CPU that a /proc/cpuinfo describes; None if it does not.

    Args:
        cpuinfo: Content of the file.

    Raises:
        ModuleNotFoundError: torch_ext is not installed.
    """
    from torch_ext import machine

    return machine.name_cpu(cpuinfo)
