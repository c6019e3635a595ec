"""How many threads the engine may use."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

__all__ = ["available_cpus"]


def available_cpus() -> int:
    """CPUs of this process: affinity and the container's CPU quota, rounded down, at least 1.

    torch_ext's doctor knows. Its file is loaded without the package around it, which imports torch: OpenMP's variables
    have to be set before that, and ONNX variants do not need torch at all.

    Raises:
        ModuleNotFoundError: torch_ext is not installed.
    """
    package = importlib.util.find_spec("torch_ext")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("torch_ext is not installed", name="torch_ext")
    name = "_torch_ext_doctor"
    spec = importlib.util.spec_from_file_location(name, Path(package.origin).with_name("doctor.py"))
    assert spec is not None
    assert spec.loader is not None
    doctor = importlib.util.module_from_spec(spec)
    sys.modules[name] = doctor
    spec.loader.exec_module(doctor)
    return int(doctor.Machine().usable_cpus())
