"""What encoders and heads compute, and which weights that takes: data, not one class per model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from torch_ext.ops import ACTIVATIONS

__all__ = ["DTYPES", "Dtype", "EncoderSpec", "HeadSpec", "check_dtype", "check_weights", "is_matrix", "is_table"]

Dtype = Literal["bf16", "fp32"]

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """What an encoder computes, apart from its weights.

    Attributes:
        architecture: where it comes from: ``bert``, ``roberta``, ``distilbert`` ...
        hidden_size: H.
        num_layers: number of transformer layers.
        num_heads: attention heads per layer; divides H.
        intermediate_size: width of the feed-forward part.
        activation: of the feed-forward part; one of :data:`torch_ext.ops.ACTIVATIONS`.
        max_positions: the longest sequence, in tokens.
        position_offset: row of the position table that the first token takes.
        layer_norm_eps: added to variances.
        vocab_size: rows of the word table.
        type_vocab_size: rows of the token type table; 0 without one.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    max_positions: int
    position_offset: int
    layer_norm_eps: float
    vocab_size: int
    type_vocab_size: int

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"EncoderSpec: expected {name} of at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"EncoderSpec: num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}")
        _check_activation(self.activation)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every weight."""
        hidden, wide = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.word": (self.vocab_size, hidden),
            "embeddings.position": (self.max_positions + self.position_offset, hidden),
        }
        if self.type_vocab_size:
            shapes["embeddings.token_type"] = (self.type_vocab_size, hidden)
        shapes.update(_norm_shapes("embeddings.norm", hidden))
        for index in range(self.num_layers):
            prefix = f"layers.{index}"
            shapes.update(_linear_shapes(f"{prefix}.attention.qkv", 3 * hidden, hidden))
            shapes.update(_linear_shapes(f"{prefix}.attention.out", hidden, hidden))
            shapes.update(_norm_shapes(f"{prefix}.attention.norm", hidden))
            shapes.update(_linear_shapes(f"{prefix}.ffn.up", wide, hidden))
            shapes.update(_linear_shapes(f"{prefix}.ffn.down", hidden, wide))
            shapes.update(_norm_shapes(f"{prefix}.ffn.norm", hidden))
        return shapes


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """What a task head computes: ``out(norm(activation(dense(hidden))))``.

    Attributes:
        task: ``text-classification`` or ``fill-mask``.
        hidden_size: H.
        activation: after the dense layer; one of :data:`torch_ext.ops.ACTIVATIONS`.
        norm: whether a layer norm follows.
        layer_norm_eps: added to its variances.
        num_outputs: labels, or the size of the vocabulary.
    """

    task: str
    hidden_size: int
    activation: str
    norm: bool
    layer_norm_eps: float
    num_outputs: int

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.task not in ("text-classification", "fill-mask"):
            raise ValueError(f"HeadSpec: unknown task {self.task!r}; known: 'text-classification', 'fill-mask'")
        _check_activation(self.activation)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every weight."""
        shapes = _linear_shapes("head.dense", self.hidden_size, self.hidden_size)
        if self.norm:
            shapes.update(_norm_shapes("head.norm", self.hidden_size))
        shapes.update(_linear_shapes("head.out", self.num_outputs, self.hidden_size))
        return shapes


def _check_fields(spec: EncoderSpec | HeadSpec) -> None:
    """Raise unless every field has the type that it is declared with (a file may hold anything)."""
    types: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if not isinstance(value, types[str(field.type)]) or (isinstance(value, bool) and field.type != "bool"):
            raise ValueError(f"{type(spec).__name__}: expected {field.name} of type {field.type}, got {value!r}")


def _check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")


def _linear_shapes(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm_shapes(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def check_dtype(dtype: str) -> Dtype:
    """The dtype, if it is known.

    Raises:
        ValueError: it is not.
    """
    if dtype == "bf16":
        return "bf16"
    if dtype == "fp32":
        return "fp32"
    raise ValueError(f"unknown dtype {dtype!r}; known: 'bf16', 'fp32'")


def check_weights(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    """Check that exactly the named tensors are there, with their shapes, floating-point and on the CPU.

    Raises:
        ValueError: a name, shape, dtype or device is wrong.
    """
    missing, extra = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(
            f"weights do not fit the specification: missing {missing or 'none'}, unexpected {extra or 'none'}"
        )
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"expected {name} {list(shape)}, got {list(tensor.shape)}")
        if tensor.device.type != "cpu" or tensor.dtype not in DTYPES.values():
            raise ValueError(f"expected {name} of fp32 or bf16 on the CPU, got {tensor.dtype} on {tensor.device}")


def is_matrix(name: str) -> bool:
    """Whether a weight is that of a linear layer."""
    return name.endswith(".weight") and not name.endswith("norm.weight")


def is_table(name: str) -> bool:
    """Whether a weight is a table of embeddings."""
    return name in ("embeddings.word", "embeddings.position", "embeddings.token_type")
