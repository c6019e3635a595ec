"""What can go wrong in an export, said in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

from deploy.folder.errors import FolderError, chain, first_line, is_disk_full

__all__ = [
    "ExportError",
    "Interrupted",
    "NotSupportedError",
    "first_line",
    "is_disk_full",
    "pickle_refused",
    "refused_pickle",
]


class ExportError(FolderError):
    """The export cannot go on; the message says what was expected, what was found, and what to do."""


class NotSupportedError(ExportError):
    """torch_ext does not run the model; ONNX Runtime may."""


def pickle_refused(error: BaseException) -> bool:
    """Whether a pickle was not read because it holds more than weights, which may be code."""
    return any(
        isinstance(item, pickle.UnpicklingError) or "Weights only load failed" in str(item) for item in chain(error)
    )


def refused_pickle(path: Path) -> ExportError:
    """The error of weights in a pickle that was not read; see `pickle_refused`."""
    return ExportError(
        f"{path}: a pickle that is damaged or holds more than weights, which may be code: refused, nothing of it was "
        "run; save the model again in safetensors"
    )


class Interrupted(BaseException):
    """A signal asked the export to stop.

    Attributes:
        signal: Its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
