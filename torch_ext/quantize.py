"""Weights of linear layers as int8."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "MAX_INT8_INPUTS",
    "MAX_ROW_OUTLIERS",
    "check_inputs",
    "dequantize_weight",
    "exact_scale",
    "quantize_weight",
    "round_rows",
    "row_limits",
]

MAX_INT8_INPUTS = (2**31 - 1) // 127**2
"""The widest input of an int8 layer, K: sums of as many products fit into 32 bits whatever the numbers are."""

MAX_ROW_OUTLIERS = 4
"""Numbers of a row of inputs that are multiplied in fp32, at most: ``kMaxRowOutliers`` of the kernels."""


def check_inputs(what: str, inputs: int) -> None:
    """Raise unless sums of products over an input of this width fit into 32 bits.

    Args:
        what: whose input it is; begins the message of the error.
        inputs: K.

    Raises:
        ValueError: they might not.
    """
    if inputs > MAX_INT8_INPUTS:
        raise ValueError(
            f"{what}: expected a weight [N, K] with K at most {MAX_INT8_INPUTS} for int8, got K={inputs}, whose sums "
            "may not fit into 32 bits: leave this layer in bf16"
        )


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the rows of a weight, each by its largest magnitude, symmetrically.

    Scales are rounded up to 16 significant bits, so that ``scale * q`` is exact in fp32 for every ``q``: quantizing
    what :func:`dequantize_weight` gives in fp32 gives the same ``q`` and scales again.

    Args:
        weight: fp32 or bf16 ``[N, K]``, finite, on the CPU, with K at most :data:`MAX_INT8_INPUTS`.

    Returns:
        ``q``, i8 ``[N, K]`` from -127 to 127, and ``scale``, fp32 ``[N]``; row ``j`` of the weight is about
        ``scale[j] * q[j]``.

    Raises:
        ValueError: a number is not finite, or K is too large.
    """
    check_inputs("quantize_weight", weight.shape[1])
    wide = weight.detach().to(torch.float32)
    largest = wide.abs().amax(dim=1)
    if not bool(torch.isfinite(largest).all()):
        row = int((~torch.isfinite(largest)).nonzero()[0])
        raise ValueError(f"cannot quantize a weight to int8: row {row} holds a number that is not finite")
    scale = exact_scale(largest / 127)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    quantized = (wide * inverse[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return quantized, scale


def exact_scale(step: Tensor) -> Tensor:
    """Steps rounded up to 16 significant bits, so that products with numbers of int8 are exact in fp32.

    Args:
        step: fp32 ``[N]``, not negative.

    Returns:
        fp32 ``[N]``; 0 for steps so small that their reciprocals would not be finite.
    """
    mantissa, exponent = torch.frexp(step)
    scale = torch.ldexp(torch.ceil(mantissa * 2.0**16) / 2.0**16, exponent)
    return torch.where(step * 127 < 4e-37, 0.0, scale)


def dequantize_weight(quantized: Tensor, scale: Tensor) -> Tensor:
    """The weight that ``quantized`` and ``scale`` stand for.

    Args:
        quantized: i8 ``[N, K]``.
        scale: fp32 ``[N]``.

    Returns:
        fp32 ``[N, K]``.
    """
    return quantized.to(torch.float32) * scale[:, None]


def row_limits(x: Tensor) -> tuple[Tensor, Tensor]:
    """What the rows of an int8 layer's input are quantized by.

    That is a row's largest magnitude, unless at most :data:`MAX_ROW_OUTLIERS` numbers are above half of it. Those are
    outliers, which are multiplied in fp32, and the row is quantized by the largest of the others.

    Args:
        x: fp32 ``[T, K]``, finite.

    Returns:
        The magnitudes, fp32 ``[T]``, and their places, i64 ``[T]``; 0 and the last place where only outliers are left.
    """
    top, at = x.abs().topk(min(MAX_ROW_OUTLIERS + 1, x.shape[1]), 1)
    above = (top > top[:, :1] / 2).sum(1, keepdim=True)
    first = torch.where(above <= MAX_ROW_OUTLIERS, above, 0)
    left = first < top.shape[1]
    first = first.clamp_max(top.shape[1] - 1)
    return torch.where(left, top.gather(1, first), 0.0)[:, 0], at.gather(1, first)[:, 0]


def round_rows(x: Tensor) -> Tensor:
    """The numbers that an int8 layer multiplies instead of its input, outliers as they are.

    Args:
        x: fp32 ``[T, K]``, finite.

    Returns:
        fp32 ``[T, K]``.
    """
    limit = row_limits(x)[0][:, None]
    step = (limit / 127).clamp_min(1e-30)
    return torch.where(x.abs() > limit, x, (x / step).round_().mul_(step))
