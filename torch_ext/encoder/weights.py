"""Weights of encoders and heads as tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_ext.encoder.spec import EncoderSpec, HeadSpec, is_matrix, scale_name

__all__ = ["FP32", "TABLE_DTYPES", "LazyWeights", "check_weights"]

TABLE_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}
"""By the dtype of an encoder, that of its tables and its hidden state."""


FP32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""For new tensors, whatever ``torch.set_default_dtype`` and ``set_default_device`` say."""


class LazyWeights(Mapping[str, Tensor]):
    """Weights that are made when they are looked up, so that they need not be in memory together."""

    @abstractmethod
    def outline(self, name: str) -> Tensor:
        """A tensor with the shape and the dtype of a weight, but without its values and its memory."""

    @abstractmethod
    def make(self, name: str, dtype: torch.dtype, passing: bool = False) -> Tensor:
        """A weight, contiguous.

        Args:
            name: of the weight.
            dtype: of the result.
            passing: the result is used up before the next one like it is made, which may take its memory.
        """

    def __getitem__(self, name: str) -> Tensor:
        return self.make(name, self.outline(name).dtype)

    def outlines(self) -> dict[str, Tensor]:
        """All outlines by name."""
        return {name: self.outline(name) for name in self}


def check_weights(spec: EncoderSpec | HeadSpec, weights: Mapping[str, Tensor]) -> None:
    """Check that the tensors of a specification are there, and no others, with their shapes, on the CPU.

    All are fp32 or bf16. Matrices may be i8 instead, and have fp32 scales ``[N]`` beside them then.

    Raises:
        ValueError: a name, shape, dtype or device is wrong.
    """
    shapes = spec.shapes()
    shapes.update({name: shape for name, shape in spec.optional_shapes().items() if name in weights})
    quantized = {name for name in shapes if is_matrix(name) and name in weights and weights[name].dtype == torch.int8}
    shapes = {**shapes, **{scale_name(name): shapes[name][:1] for name in quantized}}
    missing, extra = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(
            f"weights do not fit the specification: missing {missing or 'none'}, unexpected {extra or 'none'}"
        )
    scales = {scale_name(name) for name in quantized}
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"expected {name} {list(shape)}, got {list(tensor.shape)}")
        allowed = (torch.float32,) if name in scales else (torch.float32, torch.bfloat16)
        if tensor.device.type != "cpu" or (tensor.dtype not in allowed and name not in quantized):
            expected = "fp32" if name in scales else "fp32 or bf16"
            raise ValueError(f"expected {name} of {expected} on the CPU, got {tensor.dtype} on {tensor.device}")
