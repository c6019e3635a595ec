"""A whole encoder as one packed object, for :func:`torch_ext.encoder_forward`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import torch_ext.ops  # noqa: F401 - registers the ops
from torch_ext.encoder.spec import EncoderSpec
from torch_ext.encoder.weights import FP32

__all__ = ["LAYER_PARTS", "pack_encoder"]

# In the order of csrc/packing/packed_encoder.h.
_ENCODER = (
    "embeddings.word",
    "embeddings.position",
    "embeddings.token_type",
    "embeddings.norm.weight",
    "embeddings.norm.bias",
    "embeddings.projection.weight",
    "embeddings.projection.bias",
    "final_norm.weight",
    "final_norm.bias",
)
LAYER_PARTS = (
    *(f"attention.{part}.{kind}" for part in ("qkv", "out", "norm") for kind in ("weight", "bias")),
    "attention.residual_scale",
    *(f"ffn.{part}.{kind}" for part in ("up", "down", "norm") for kind in ("weight", "bias")),
    "ffn.residual_scale",
    "attention.position_keys",
    "attention.position_queries",
    "attention.query_norm.weight",
    "attention.key_norm.weight",
    "attention.post_norm.weight",
    "ffn.post_norm.weight",
    "ffn.shift",
)

_NONE = torch.empty(0, **FP32)


def pack_encoder(
    spec: EncoderSpec,
    tensors: Mapping[str, Tensor],
    relative_bias: Tensor | None,
    rotary: Tensor | None,
    rotary_local: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Put all that a forward pass reads into one tensor.

    Args:
        spec: what the encoder computes.
        tensors: by the names of ``spec.shapes()``: matrices packed, tables bf16 (fp32 in an fp32 encoder), the rest
            fp32. The large ones lose their content, so that weights are in memory once: take the views.
        relative_bias: fp32 ``[num_heads, 2 * R + 1]``, or None.
        rotary: fp32 ``[max_positions, head_dim]``, or None.
        rotary_local: the same for local layers, or None.

    Returns:
        The packed encoder, u8 ``[H, bytes]``, and views of its parts by the names of ``tensors``, so that nothing
        needs to be kept twice.
    """
    layers = [f"layers.{index}.{part}" for index in range(spec.num_layers) for part in LAYER_PARTS]
    derived = (relative_bias, rotary, rotary_local)
    parts: list[tuple[str | None, Tensor]] = [(name, tensors.get(name, _NONE)) for name in _ENCODER]
    parts += [(None, _NONE if tensor is None else tensor) for tensor in derived]
    parts += [(name, tensors.get(name, _NONE)) for name in layers]
    packed: Tensor = torch.ops.torch_ext._pack_encoder(
        [tensor for _, tensor in parts],
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        intermediate_size=spec.intermediate_size,
        activation=spec.activation,
        layer_norm_eps=spec.layer_norm_eps,
        max_positions=spec.max_positions,
        position_offset=spec.position_offset,
        padding_id=spec.padding_id,
        window=spec.window,
        global_every=spec.global_every,
        norm_first=spec.norm_first,
        gated_ffn=spec.gated_ffn,
        position_span=spec.position_span,
        position_reach=spec.position_reach,
        num_kv_heads=spec.kv_heads,
        head_size=spec.size_of_heads,
        global_first=spec.global_first,
        attention_scale=spec.attention_scale,
        embedding_scale=spec.embedding_scale,
        causal=spec.causal,
        rms_norm=spec.rms_norm,
        embedding_norm=spec.embedding_norm,
        dropped_id=spec.dropped_id,
    )
    flat = packed.view(-1)
    views = dict(tensors)
    sections = torch.ops.torch_ext._encoder_sections(packed).tolist()
    for (name, tensor), (offset, size) in zip(parts, sections, strict=True):
        if name is not None and size:
            views[name] = flat[offset : offset + size].view(tensor.dtype).view(tensor.shape)
    return packed, views
