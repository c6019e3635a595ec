"""Weights of packed layers: which tensors may be packed, and how."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import torch_ext.ops  # noqa: F401 - registers the ops
from torch_ext.quantize import quantize_weight

__all__ = ["FLOATS", "PackedDtype", "as_bias", "check_dtype", "check_tensors", "pack_as", "state_of"]

_pack = torch.ops.torch_ext.pack_linear_weight.default
_pack_int8 = torch.ops.torch_ext.pack_linear_weight_int8.default
_fingerprint = torch.ops.torch_ext._weight_fingerprint.default

# What the op takes, and what a layer can be made of.
FLOATS = (torch.float32, torch.bfloat16)
_WEIGHT_DTYPES = (*FLOATS, torch.float16)

PackedDtype = Literal["bf16", "int8"]
_DTYPES: tuple[str, ...] = ("bf16", "int8")


def check_dtype(what: str, dtype: str) -> None:
    """Raise ValueError unless ``dtype`` is one that linear layers are packed in."""
    if dtype not in _DTYPES:
        raise ValueError(f"{what}: unknown dtype {dtype!r}; known: {', '.join(map(repr, _DTYPES))}")


def pack_as(dtype: PackedDtype, weight: Tensor) -> Tensor:
    """Pack ``[N, K]`` of any floating-point dtype."""
    weight = weight if weight.dtype in FLOATS else weight.float()
    packed: Tensor = _pack_int8(*quantize_weight(weight)) if dtype == "int8" else _pack(weight.contiguous())
    return packed


def as_bias(bias: Tensor) -> Tensor:
    """An fp32 copy."""
    return bias.detach().to(torch.float32, copy=True).contiguous()


def state_of(parameter: Tensor) -> tuple[object, ...]:
    """What changes when a parameter is written to: its memory, version, and some of its elements.

    The elements are for writes through ``parameter.data``, which have no version.
    """
    version = 0 if parameter.is_inference() else parameter._version
    bits = 0
    if parameter.is_contiguous() and parameter.numel() and parameter.element_size() > 1:
        bits = _fingerprint(parameter.detach().view(parameter.shape[0], -1).view(torch.bfloat16))
    return parameter.data_ptr(), version, parameter.dtype, bits


def check_tensors(what: str, *tensors: Tensor | None) -> None:
    """Raise unless all are fp32, bf16 or fp16 on the CPU."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{what}: expected tensors on the CPU, got {tensor.device}: "
                + ("load the weights first" if tensor.device.type == "meta" else "call model.cpu() first")
            )
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise TypeError(f"{what}: expected fp32, bf16 or fp16, got {tensor.dtype}: call model.float() first")
