"""What :class:`torch.utils.flop_counter.FlopCounterMode` counts for our ops: products and sums, as for PyTorch's own.

Like PyTorch's formulas, these leave out what is done element by element. PyTorch's module of formulas takes time to
import, seconds where it brings triton along; :mod:`torch_ext.ops` adds ours once somebody imports it.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["register"]

_ops = torch.ops.torch_ext

# EncoderHeader of csrc/packing/packed_encoder.h, up to causal; the size of all of it; and which sections after it are
# the first layer's tables of relative positions.
_HEADER = struct.Struct("=8sIIQ12IfBBBBi5IffB")
_HEADER_BYTES = 136
_SECTION = struct.Struct("=QQ")
_POSITION_TABLES = (12 + 14, 12 + 15)


def _has_data(tensor: Tensor) -> bool:
    """Whether its values can be read: those of fake and meta tensors cannot."""
    return type(tensor) is Tensor and not tensor.is_meta


def _pairs(
    cu_seqlens: Tensor, tokens: int, window: int | None = None, causal: bool = False, attended: Tensor | None = None
) -> int:
    """Pairs of tokens that see each other; without data, as if all were one sequence."""
    bounds = cu_seqlens.tolist() if _has_data(cu_seqlens) else [0, tokens]
    total = 0
    if attended is not None and _has_data(attended) and _has_data(cu_seqlens):
        for (begin, end), keys in zip(itertools.pairwise(bounds), attended.tolist(), strict=True):
            length = end - begin
            reach = length if window is None else window
            # By key, the tokens that see it.
            for key in range(keys):
                total += min(length, key + reach + 1) - (key if causal else max(0, key - reach))
        return total
    for begin, end in itertools.pairwise(bounds):
        length = end - begin
        reach = length if window is None else min(window, length)
        # All of them, less two triangles of those too far away.
        total += length**2 - max(0, length - reach - 1) * max(0, length - reach)
    return (total + tokens) // 2 if causal else total


def _linear(x: Sequence[int], packed: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(x) * packed[0]


def _matmul(a: Sequence[int], b: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * prod(out_shape) * a[-1]


def _addmm(bias: Sequence[int], a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(a) * b[1]


def _varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    scale: float | None = None,
    window: int | None = None,
    relative_bias: Tensor | None = None,
    position_keys: Tensor | None = None,
    position_queries: Tensor | None = None,
    position_reach: int = 0,
    causal: bool = False,
    attended: Tensor | None = None,
    **_: Any,
) -> int:
    products = 2 + (position_keys is not None) + (position_queries is not None)
    return 2 * products * _pairs(cu_seqlens, qkv.shape[0], window, causal, attended) * (qkv.shape[1] // 3)


def _encoder_forward(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    packed: Tensor,
    fp32: bool = False,
    attended: Tensor | None = None,
    **_: Any,
) -> int:
    if not _has_data(packed):
        return 0  # Its sizes are in its data.
    data = packed.flatten()
    fields = _HEADER.unpack(bytes(data[: _HEADER.size].tolist()))
    hidden, layers, heads, wide, embedded = fields[4:9]
    window, global_every = fields[13:15]
    gated, (kv_heads, head_size, global_first), causal = fields[19], fields[24:27], bool(fields[29])
    places = [_HEADER_BYTES + index * _SECTION.size for index in _POSITION_TABLES]
    tables = [_SECTION.unpack(bytes(data[place : place + _SECTION.size].tolist()))[1] for place in places]
    products = 2 + sum(size > 0 for size in tables)
    context = heads * head_size
    tokens = input_ids.shape[0]
    weights = layers * (2 * (context + kv_heads * head_size) * hidden + (3 if gated else 2) * hidden * wide)
    if embedded != hidden:
        weights += embedded * hidden
    local = sum(bool(window and index % global_every != global_first) for index in range(layers))
    pairs = (layers - local) * _pairs(cu_seqlens, tokens, None, causal, attended)
    pairs += local * _pairs(cu_seqlens, tokens, window, causal, attended)
    return int(2 * tokens * weights + 2 * products * pairs * context)


def register(counter: ModuleType) -> None:
    """Adds the formulas to those of PyTorch's module, once."""
    if _ops.linear in counter.flop_registry:
        return
    add = counter.register_flop_formula
    # These get shapes ...
    add(_ops.linear)(_linear)
    add([_ops.matmul, _ops.bmm])(_matmul)
    add(_ops.addmm)(_addmm)
    # ... and these the tensors, whose values they need.
    add(_ops.varlen_attention, get_raw=True)(_varlen_attention)
    add(_ops.encoder_forward, get_raw=True)(_encoder_forward)
