"""The machine that this process runs on, as torch_ext sees it, without an import of torch."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_ext.machine import Machine

__all__ = ["host", "name_cpu"]


@functools.cache
def _module() -> ModuleType:
    """`torch_ext.machine`, loaded without the package around it.

    The package imports torch, before which OpenMP's variables have to be set, and which ONNX variants do not need.

    Raises:
        ModuleNotFoundError: torch_ext is not installed.
    """
    package = importlib.util.find_spec("torch_ext")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("torch_ext is not installed", name="torch_ext")
    name = "_torch_ext_machine"
    spec = importlib.util.spec_from_file_location(name, Path(package.origin).with_name("machine.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there.
    spec.loader.exec_module(module)
    return module


def host() -> Machine:
    """This machine: its CPU's name, and the CPUs and memory that the process may use.

    Raises:
        ModuleNotFoundError: torch_ext is not installed.
    """
    machine: Machine = _module().Machine()
    return machine


def name_cpu(cpuinfo: str) -> str | None:
    """Name of the CPU that a /proc/cpuinfo describes; None if it does not.

    Args:
        cpuinfo: Content of the file.

    Raises:
        ModuleNotFoundError: torch_ext is not installed.
    """
    name: str | None = _module().name_cpu(cpuinfo)
    return name
