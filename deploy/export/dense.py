"""Linear stages behind the pooling, as sentence-transformers' Dense modules hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deploy.bundle import DENSE_FILE, Dense
from deploy.export.errors import ExportError, first_line, pickle_refused, refused_pickle
from deploy.folder.sentence import DenseModule

if TYPE_CHECKING:
    from torch_ext import Head

__all__ = ["DenseStage", "head_of", "read_stages", "write_stages"]

Floats = npt.NDArray[np.float32]


class DenseStage(NamedTuple):
    """A linear stage.

    Attributes:
        weight: f32 [outputs, inputs].
        bias: f32 [outputs].
        activation: As `torch_ext` names it.
    """

    weight: Floats
    bias: Floats
    activation: str

    def described(self) -> Dense:
        """What the manifest says of it."""
        return Dense(len(self.bias), self.activation)


def read_stages(modules: Sequence[DenseModule], width: int) -> list[DenseStage]:
    """The stages of a model's modules; those without an activation between them become one.

    Args:
        modules: What the model's files say.
        width: Of the pooled vectors.

    Raises:
        ExportError: A file is missing, damaged, holds code, or does not fit.
    """
    stages: list[DenseStage] = []
    for module in modules:
        stage = _read(module)
        outputs, inputs = stage.weight.shape
        if inputs != width:
            raise ExportError(f"{module.folder}: expected weights [outputs, {width}], got [{outputs}, {inputs}]")
        width = outputs
        if stages and stages[-1].activation == "none":
            before = stages.pop()
            weight = stage.weight.astype(np.float64) @ before.weight
            bias = stage.weight.astype(np.float64) @ before.bias + stage.bias
            stage = DenseStage(weight.astype(np.float32), bias.astype(np.float32), stage.activation)
        stages.append(stage)
    if len(stages) > 2:
        raise ExportError(
            f"{modules[0].folder}: expected at most 2 Dense modules with an activation between them, got {len(stages)}"
        )
    return stages


def _read(module: DenseModule) -> DenseStage:
    import torch
    from safetensors.torch import load_file

    from torch_ext.encoder.huggingface.stages import check_config

    safe, pickled = module.folder / "model.safetensors", module.folder / "pytorch_model.bin"
    try:
        if safe.is_file():
            tensors = load_file(safe)
        else:
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
        weight = tensors["linear.weight"].float()
        bias = tensors["linear.bias"].float() if "linear.bias" in tensors else torch.zeros(len(weight))
    except Exception as error:  # Pickle's and safetensors' share no base class.
        if not safe.is_file() and pickle_refused(error):
            raise refused_pickle(pickled) from error
        raise ExportError(f"{module.folder}: weights of a Dense module cannot be read: {first_line(error)}") from error
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ExportError(
            f"{module.folder}: expected weights of a linear layer, got {list(weight.shape)} and {list(bias.shape)}"
        )
    try:
        check_config(safe if safe.is_file() else pickled, tuple(weight.shape), "linear.bias" in tensors)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if not (bool(torch.isfinite(weight).all()) and bool(torch.isfinite(bias).all())):
        raise ExportError(f"{module.folder}: expected finite weights of a Dense module, got NaN or infinity")
    return DenseStage(weight.numpy(), bias.numpy(), module.activation)


def write_stages(folder: Path, stages: Sequence[DenseStage]) -> None:
    """Writes them for engines that compute them with numpy."""
    arrays = {
        f"{name}{place}": getattr(stage, name) for place, stage in enumerate(stages) for name in ("weight", "bias")
    }
    if arrays:
        np.savez(folder / DENSE_FILE, **arrays)


def head_of(stages: Sequence[DenseStage], dtype: Any) -> Head | None:
    """The stages as the head of an encoder; None where there are none."""
    if not stages:
        return None
    import torch

    from torch_ext import Head, HeadSpec

    last = stages[-1]
    hidden_size = stages[0].weight.shape[1]
    first = stages[0] if len(stages) == 2 else None
    width = hidden_size if first is None else len(first.bias)
    spec = HeadSpec(
        task="feature-extraction",
        hidden_size=hidden_size,
        activation="none" if first is None else first.activation,
        norm=False,
        layer_norm_eps=0.0,
        num_outputs=len(last.bias),
        dense=first is not None,
        dense_size=0 if width == hidden_size else width,
        out_activation=last.activation,
    )
    named = {"head.out": last} if first is None else {"head.dense": first, "head.out": last}
    weights = {}
    for name, stage in named.items():
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.tensor(stage.weight), torch.tensor(stage.bias)
    return Head(spec, weights, dtype)
