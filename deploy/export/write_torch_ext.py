"""The variants of torch_ext: an encoder, and the head of the task, in one file of safetensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.bundle import VARIANTS
from deploy.engines.batch import Ids
from deploy.export.accuracy import Verification
from deploy.export.dense import DenseStage, head_of
from deploy.export.errors import NotSupportedError, first_line
from deploy.export.int8 import BoundMissed, choose_encoder
from deploy.export.verify import refuse
from deploy.tasks import Task

if TYPE_CHECKING:
    from torch_ext.sensitivity import Report

__all__ = ["Quantized", "write_encoder", "write_int8_encoder"]


@dataclass(frozen=True)
class Quantized:
    """What was measured to choose the layers in int8.

    Attributes:
        report: The measurement.
        layers: Number of linear layers.
    """

    report: Report
    layers: int

    def __str__(self) -> str:
        """Such as `3 of 24 linear layers in bf16`."""
        return f"{len(self.report.kept)} of {self.layers} linear layers in bf16"


def write_encoder(name: str, path: Path, model: Any, task: Task, stages: Sequence[DenseStage] = ()) -> None:
    """Writes a variant that is not quantized.

    Args:
        name: Name of the variant.
        path: File to write.
        model: The model in transformers.
        task: What it is for.
        stages: Linear stages behind the pooling.

    Raises:
        NotSupportedError: torch_ext does not run the model.
        OSError: The file cannot be written.
    """
    from torch_ext import Head
    from torch_ext.encoder.files import save_unpacked
    from torch_ext.encoder.huggingface.models import read_encoder

    dtype: Any = VARIANTS[name].dtype
    with _told_as_export_error(name):
        spec, weights = read_encoder(model)
        linear = head_of(stages, dtype)
        head = Head.from_transformers(model, dtype=dtype) if task.needs.head else linear
        save_unpacked(path, spec, weights, dtype, head)


def write_int8_encoder(
    name: str,
    path: Path,
    model: Any,
    verification: Verification,
    bounds: Mapping[str, float],
    accuracy: float | None,
    names: Sequence[str],
    stages: Sequence[DenseStage] = (),
    calibration: Sequence[Ids] = (),
) -> Quantized:
    """Writes the int8 variant; layers that it would damage too much stay in bf16, see `int8.choose_encoder`.

    Args:
        name: Name of the variant.
        path: File to write.
        model: The model in transformers.
        verification: The texts, and what transformers answered to them.
        bounds: Bounds of the variant.
        accuracy: What `--accuracy` asks for.
        names: All variants that are written.
        stages: Linear stages behind the pooling.
        calibration: Texts to round the weights for.

    Raises:
        NotSupportedError: torch_ext does not run the model.
        ExportError: All layers in bf16 miss a bound.
        OSError: The file cannot be written.
    """
    with _told_as_export_error(name):
        try:
            linear = head_of(stages, "int8")
            encoder, head, report = choose_encoder(model, verification, bounds, accuracy, linear, calibration)
        except BoundMissed as missed:
            refuse(name, missed.result, names, " even with all layers in bf16")
            raise AssertionError("a result that missed its bound is refused") from missed
        encoder.save(str(path), head=head)
        return Quantized(report, len(encoder.linear_names))


@contextlib.contextmanager
def _told_as_export_error(name: str) -> Iterator[None]:
    """Turns what torch_ext says of a model that it does not run into a `NotSupportedError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        left = ",".join(other for other in VARIANTS if VARIANTS[other].engine != "torch_ext")
        raise NotSupportedError(f"{name}: {first_line(error)}; leave it out with --variants {left}") from error
