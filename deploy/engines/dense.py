"""Linear stages behind the pooling, for engines that have numpy anyway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import DENSE_FILE, BundleError
from ..tasks.task import Described
from .pooling import Floats

__all__ = ["open_dense"]


def _gelu(x: Floats) -> Any:
    from math import erf

    return x * 0.5 * (1 + np.vectorize(erf, otypes=[np.float32])(x / np.sqrt(np.float32(2))))


_ACTIVATIONS: dict[str, Callable[[Floats], Any]] = {
    "none": lambda x: x,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": _gelu,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "leaky_relu": lambda x: np.maximum(x, np.float32(0.01) * x),
}


def open_dense(model: Described) -> Callable[[Floats], Floats]:
    """What the stages of a bundle make of pooled vectors, f32 [texts, hidden] to [texts, width].

    Args:
        model: The manifest.

    Raises:
        BundleError: Their file is missing, or does not fit.
    """
    if not model.dense:
        return lambda vectors: vectors
    path = Path(model.root) / DENSE_FILE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stages = [
                (arrays[f"weight{place}"], arrays[f"bias{place}"], _ACTIVATIONS[stage.activation])
                for place, stage in enumerate(model.dense)
            ]
    except (OSError, KeyError, ValueError) as error:
        raise BundleError(f"{path}: the linear stages behind the pooling cannot be read: {error}") from error

    def project(vectors: Floats) -> Floats:
        for weight, bias, activation in stages:
            with np.errstate(over="ignore", invalid="ignore"):
                vectors = np.asarray(activation(vectors @ weight.T + bias), np.float32)
        return vectors

    return project
