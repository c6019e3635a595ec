"""When ``torch.ops.torch_ext.*`` are registered: once both torch and torch_ext are imported."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from types import ModuleType

__all__ = ["register_ops"]


def register_ops(torch: ModuleType) -> None:
    """Import :mod:`torch_ext.ops`, for those who call ``torch.ops.torch_ext.*`` only.

    Called at the end of an import of torch, which must not fail: an error is a warning here, and is raised at the first
    use of a name of torch_ext.

    Args:
        torch: just imported.
    """
    if "torch_ext.ops" in sys.modules:
        return  # It is what imports torch, or was there before.
    try:
        importlib.import_module("torch_ext.ops")
    except Exception as error:
        with contextlib.suppress(RuntimeWarning):  # Raised where warnings are errors.
            warnings.warn(f"torch.ops.torch_ext has no ops: {error}", RuntimeWarning, stacklevel=2)
