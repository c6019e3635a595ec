"""The library behind ``torch.ops.torch_ext.*``."""

from __future__ import annotations

from pathlib import Path

__all__ = ["LIBRARY", "TORCH", "is_too_old", "load_library", "needs_torch"]

_OLDEST_TORCH = (2, 10)
"""Major and minor version: what ``setup.py`` builds the library for, and ``pyproject.toml`` asks for."""

TORCH = f"torch>={_OLDEST_TORCH[0]}.{_OLDEST_TORCH[1]}"
"""The torch that the ops need, as pip takes it."""


def is_too_old(version: str) -> bool:
    """Whether a version of torch, such as ``2.9.1+cpu``, is older than the ops need."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < _OLDEST_TORCH


LIBRARY = Path(__file__).resolve().parent / "_C.abi3.so"


def needs_torch(name: str) -> ImportError:
    """The error where torch is not installed.

    Args:
        name: what needs it, as the user wrote it.
    """
    return ImportError(f"{name} needs {TORCH}, which is not installed: pip install 'torch-ext[torch]'", name="torch")


def load_library() -> None:
    """Define ``torch.ops.torch_ext.*``; :mod:`torch_ext.ops` adds what torch.compile needs of them.

    Raises:
        ImportError: torch is missing or too old, the library was not built, or it does not load; says what to do.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise needs_torch("torch.ops.torch_ext") from error
    if is_too_old(torch.__version__):
        raise ImportError(f"torch_ext needs {TORCH}, found {torch.__version__}: pip install -U torch")
    if not LIBRARY.is_file():
        raise ImportError(
            f"torch_ext: {LIBRARY} is missing: the package was not built for this environment. Install a wheel, or "
            "in a checkout run pip install --no-build-isolation -e . (python setup.py build_ext --inplace builds only "
            "the library)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        text = str(error)
        if "static TLS block" in text:
            hint = "start Python with LD_PRELOAD set to the library named above"
        elif "wrong ELF class" in text or "cannot open shared object" in text or "invalid ELF header" in text:
            hint = "it was built for another architecture or system: reinstall torch-ext for this one"
        else:
            hint = (
                "rebuild it against the torch that is installed: pip install --no-build-isolation --force-reinstall ."
            )
        raise ImportError(f"torch_ext: cannot load {LIBRARY}: {text}; {hint}") from error
