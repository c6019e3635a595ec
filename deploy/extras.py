"""What to install where a package is missing, and which Python to call. Standard library only."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

__all__ = ["how_to_install", "is_ours", "missing", "other_python", "python_command"]

_ROOT = Path(__file__).resolve().parent.parent
_OURS = ("deploy", "loadtest", "torch_ext")


def how_to_install(extra: str) -> str:
    """The command for an extra, or several with commas between them; run in the checkout.

    The package is on no index: without the wheel's path pip would fail, or take another package of that name.
    """
    return f'make wheel, then pip install "$(echo dist/torch_ext-*.whl)[{extra}]"'


def is_ours(error: ModuleNotFoundError) -> bool:
    """Whether a module of this project is missing, which no extra brings."""
    return error.name is None or error.name.partition(".")[0] in _OURS


def missing(error: ModuleNotFoundError, extra: str) -> str:
    """What to do about a package that is not there.

    Args:
        error: The failed import.
        extra: The extra that has the package.
    """
    return f"the package {error.name} is missing; install the extra: {how_to_install(extra)}{other_python()}"


def other_python() -> str:
    """The end of such a message if `make` has set up another environment in the checkout, which has all packages."""
    environment = _ROOT / ".venv"
    set_up = any((environment / stamp).exists() for stamp in (".demo", ".dev"))
    if not set_up or os.path.realpath(sys.prefix) == os.path.realpath(environment):
        return ""
    return ", or run .venv/bin/python in place of python: make has set it up"


def python_command() -> str:
    """What to type in a shell for the Python that runs this program."""
    found = shutil.which("python")
    if found is not None and os.path.abspath(found) == os.path.abspath(sys.executable):
        return "python"
    inside = os.path.relpath(sys.executable)
    return sys.executable if inside.startswith(os.pardir) or os.sep not in inside else inside
