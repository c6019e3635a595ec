"""Linear stages behind the pooling, out of the folders that sentence-transformers keeps its Dense modules in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch_ext.encoder.huggingface.safetensors import StoredTensor, find_weights, map_weights, parse_object
from torch_ext.encoder.spec import HeadSpec

__all__ = ["check_config", "read_stages"]


def read_stages(
    stages: Sequence[tuple[str | os.PathLike[str], str]], hidden_size: int
) -> tuple[HeadSpec, dict[str, list[StoredTensor]]]:
    """One or two stages as the head of an encoder.

    Args:
        stages: their folders, and their activations.
        hidden_size: of the encoder; the first stage may take several poolings side by side.

    Returns:
        What the head computes, and its mapped weights by the names of ``HeadSpec.shapes()``; a bias that is missing is
        zero.

    Raises:
        FileNotFoundError: a folder has no weights.
        ValueError: there are more than two, a file is damaged or a pickle, or a weight is missing or does not fit.
    """
    if not 1 <= len(stages) <= 2:
        raise ValueError(f"expected 1 or 2 linear stages behind the pooling, got {len(stages)}")
    tensors: dict[str, list[StoredTensor]] = {}
    width = hidden_size
    widths: list[int] = []
    for (folder, _), part in zip(stages, ("head.dense", "head.out")[-len(stages) :], strict=True):
        path = find_weights(Path(folder))
        stored = map_weights(path)
        weight = stored.get("linear.weight")
        shape = () if weight is None else weight.shape
        if len(shape) == 2 and not widths and shape[1] > 0 and shape[1] % hidden_size == 0:
            hidden_size = width = shape[1]
        if weight is None or len(shape) != 2 or shape[1] != width:
            found = "none" if weight is None else list(shape)
            raise ValueError(f"{path}: expected linear.weight [outputs, {width}], got {found}")
        check_config(path, shape, "linear.bias" in stored)
        width = weight.shape[0]
        widths.append(width)
        zeros = StoredTensor("F32", (width,), memoryview(bytes(4 * width)))
        tensors[f"{part}.weight"] = [weight]
        tensors[f"{part}.bias"] = [stored.get("linear.bias", zeros)]
    two = len(stages) == 2
    spec = HeadSpec(
        task="feature-extraction",
        hidden_size=hidden_size,
        activation=stages[0][1] if two else "none",
        norm=False,
        layer_norm_eps=0.0,
        num_outputs=width,
        dense=two,
        dense_size=widths[0] if two and widths[0] != hidden_size else 0,
        out_activation=stages[-1][1],
    )
    return spec, tensors


def check_config(weights: Path, shape: tuple[int, ...], bias: bool) -> None:
    """Checks that a stage's configuration, which readers take its width from, is that of its weights.

    Args:
        weights: file of the weights, beside ``config.json``.
        shape: of the weight: outputs, inputs.
        bias: whether there is one.

    Raises:
        ValueError: it is not, or is damaged.
    """
    path = weights.parent / "config.json"
    config = parse_object(path.read_bytes(), str(path)) if path.is_file() else {}
    found = {"out_features": shape[0], "in_features": shape[1], "bias": bias}
    for name, value in found.items():
        if name in config and config[name] != value:
            raise ValueError(f"{path}: expected {name}={value}, as {weights.name} has it, got {config[name]!r:.40}")
