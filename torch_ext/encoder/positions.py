"""Tables of relative and rotary positions, which a specification determines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_ext.encoder.spec import EncoderSpec
from torch_ext.encoder.weights import FP32

__all__ = ["relative_bias_table", "relative_buckets", "rotary_table"]


def rotary_table(spec: EncoderSpec, theta: float) -> Tensor:
    """Cosines and sines of all positions' angles, as :func:`torch_ext.rotary_embedding` takes them.

    Args:
        spec: gives the number of positions, the size of heads, D, and ``rotary_factor``.
        theta: pair ``i`` of a head turns by ``theta ** (-2 i / D) * rotary_factor`` per position.

    Returns:
        fp32 ``[max_positions, D]``. Angles are rounded to fp32, as models were trained with.
    """
    size, factor = spec.size_of_heads, spec.rotary_factor
    table: Tensor = torch.ops.torch_ext._rotary_table(torch.empty(0, **FP32), spec.max_positions, size, theta, factor)
    return table


def relative_buckets(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance: one for each small one, then wider and wider ones.

    Args:
        distances: i64, position of the key minus position of the query.
        buckets: number of them; keys at or before the query take the first half, those after it the second.
        max_distance: from here on all distances share a half's last bucket.

    Returns:
        i64, of the same shape, from 0 to ``buckets - 1``; written to be read, csrc/positions.cpp fills the tables.
    """
    half = buckets // 2
    single = half // 2  # Distances that have a bucket of their own.
    size = distances.abs()
    # The logarithm is fp32's: at the edge of a bucket its rounding decides, and models were trained with it.
    ratio = torch.log(size.clamp_min(1).float() / single) / math.log(max_distance / single)
    wide = (single + (ratio * (half - single)).long()).clamp_max(half - 1)
    return torch.where(size < single, size, wide) + half * (distances > 0)


def relative_bias_table(spec: EncoderSpec, bias: Tensor) -> Tensor:
    """The bias of scores by distance, as :func:`torch_ext.varlen_attention` takes it.

    Args:
        spec: gives the buckets.
        bias: fp32 ``[relative_attention_buckets, num_heads]``.

    Returns:
        fp32 ``[num_heads, 2 * max_distance + 1]``; column ``max_distance + d`` is for keys ``d`` behind the query.
    """
    table: Tensor = torch.ops.torch_ext._relative_bias_table(bias, spec.relative_attention_max_distance)
    return table
