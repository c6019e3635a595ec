"""The forward pass of an encoder, op by op: what :func:`torch_ext.encoder_forward` computes, written to be read."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from torch_ext.encoder.balance import Observe
from torch_ext.encoder.spec import EncoderSpec
from torch_ext.encoder.weighted import Weighted
from torch_ext.encoder.weights import TABLE_DTYPES

__all__ = ["LayerWeights", "Reference"]

_embed_layer_norm = torch.ops.torch_ext.embed_layer_norm.default
_varlen_attention = torch.ops.torch_ext.varlen_attention.default
_add_rms_norm = torch.ops.torch_ext.add_rms_norm.default
_rotary_embedding = torch.ops.torch_ext.rotary_embedding.default
_gate = torch.ops.torch_ext.gate.default


class LayerWeights(NamedTuple):
    """One layer's weights as the ops read them: matrices packed in bf16, int8 or fp32, the rest fp32.

    The norm of attention is None where the specification leaves it out, factors of residuals where they are 1. Tables
    of relative positions have the dtype of the hidden state; None: attention has no such part.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    attention_norm_weight: Tensor | None
    attention_norm_bias: Tensor | None
    attention_residual_scale: Tensor | None
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    ffn_norm_weight: Tensor
    ffn_norm_bias: Tensor
    ffn_residual_scale: Tensor | None
    position_keys: Tensor | None
    position_queries: Tensor | None
    query_norm_weight: Tensor | None
    key_norm_weight: Tensor | None
    attention_post_norm_weight: Tensor | None
    ffn_post_norm_weight: Tensor | None
    ffn_shift: Tensor | None


class Reference(Weighted[EncoderSpec]):
    """An encoder that runs one op after the other.

    Attributes:
        _layers: weights by layer.
        _rotary: fp32 ``[max_positions, head_dim]``, or None.
        _rotary_local: the same for local layers, or None.
        _relative_bias: fp32 ``[num_heads, 2 * max_distance + 1]``, or None.
    """

    _layers: tuple[LayerWeights, ...]
    _rotary: Tensor | None
    _rotary_local: Tensor | None
    _relative_bias: Tensor | None

    def run_reference(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None = None,
        observe: Observe | None = None,
        attended: Tensor | None = None,
    ) -> Tensor:
        """The encoder, op by op: what it computes, written to be read. Calls run it as one op, ``encoder_forward``.

        Args:
            input_ids: as when the encoder is called, which checks its arguments first.
            cu_seqlens: likewise.
            token_type_ids: likewise.
            observe: is told the name and input of every linear layer that reads a norm or an activation.
            attended: as when the encoder is called.

        Returns:
            The last hidden state, ``[T, H]``.
        """
        observe = observe or (lambda name, x: None)
        if not self.spec.embedding_norm:
            return self._run_stream(input_ids, cu_seqlens, token_type_ids, observe, attended)
        hidden = self._embed(input_ids, cu_seqlens, token_type_ids, observe)
        for index, w in enumerate(self._layers):
            attention_norm = w.attention_norm_weight, w.attention_norm_bias
            ffn_norm = w.ffn_norm_weight, w.ffn_norm_bias
            if self.spec.norm_first:
                normed = self._norm(hidden, None, *attention_norm)
                observe(f"layers.{index}.attention.qkv", normed)
                context = self._attend(index, normed, cu_seqlens, attended)
                hidden = self._linear(context, w.out_weight, w.out_bias, residual=hidden)
                normed = self._norm(hidden, None, *ffn_norm)
                observe(f"layers.{index}.ffn.up", normed)
                wide = self._widen(w, normed)
                observe(f"layers.{index}.ffn.down", wide)
                hidden = self._linear(wide, w.down_weight, w.down_bias, residual=hidden)
            else:
                # The residual is added in the norm, which reads it from the cache, on every instruction set in one
                # pass.
                observe(f"layers.{index}.attention.qkv", hidden)
                context = self._linear(self._attend(index, hidden, cu_seqlens, attended), w.out_weight, w.out_bias)
                hidden = self._norm(context, hidden, *attention_norm, w.attention_residual_scale)
                observe(f"layers.{index}.ffn.up", hidden)
                wide = self._widen(w, hidden)
                observe(f"layers.{index}.ffn.down", wide)
                narrow = self._linear(wide, w.down_weight, w.down_bias)
                hidden = self._norm(narrow, hidden, *ffn_norm, w.ffn_residual_scale)
        if self.spec.norm_first:
            hidden = self._norm(hidden, None, self._tensors["final_norm.weight"], self._tensors["final_norm.bias"])
        return hidden

    def _run_stream(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None,
        observe: Observe,
        attended: Tensor | None,
    ) -> Tensor:
        """The reference of encoders without a norm of the embeddings: what layers add is summed in fp32."""

        def norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            eps = self.spec.layer_norm_eps
            normed = _add_rms_norm(x, None, weight, eps) if bias is None else self._norm(x, None, weight, bias)
            return normed.to(TABLE_DTYPES[self.dtype])

        def added(x: Tensor, weight: Tensor, bias: Tensor, post_norm: Tensor | None) -> Tensor:
            if post_norm is None:
                return self._linear(x, weight, bias, out_dtype=torch.float32, residual=stream)
            return stream + norm(self._linear(x, weight, bias), post_norm, None).float()

        stream = self._embed_stream(input_ids, cu_seqlens, token_type_ids)
        for index, w in enumerate(self._layers):
            if w.attention_norm_weight is None:
                raise AssertionError("a layer without a norm before its attention")
            normed = norm(stream, w.attention_norm_weight, w.attention_norm_bias)
            observe(f"layers.{index}.attention.qkv", normed)
            context = self._attend(index, normed, cu_seqlens, attended)
            stream = added(context, w.out_weight, w.out_bias, w.attention_post_norm_weight)
            normed = norm(stream, w.ffn_norm_weight, w.ffn_norm_bias)
            observe(f"layers.{index}.ffn.up", normed)
            wide = self._widen(w, normed)
            observe(f"layers.{index}.ffn.down", wide)
            stream = added(wide, w.down_weight, w.down_bias, w.ffn_post_norm_weight)
        return norm(stream, self._tensors["final_norm.weight"], self._tensors.get("final_norm.bias"))

    def _embed_stream(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """The sum of the tables, in fp32."""
        spec, tensors = self.spec, self._tensors
        stream = tensors["embeddings.word"][input_ids].float() * spec.embedding_scale
        if spec.dropped_id >= 0:
            kept = (input_ids != spec.dropped_id).float()
            texts = torch.split(kept, cu_seqlens.diff().tolist())
            share = torch.cat([text / text.mean().clamp_min(0.5 / len(text)) for text in texts])
            stream = stream * share.unsqueeze(1)
        if spec.absolute_positions:
            rows = []
            for begin, end in itertools.pairwise(cu_seqlens.tolist()):
                counted = (input_ids[begin:end] != spec.padding_id).long()
                rows.append((counted.cumsum(0) * counted - 1) + spec.position_offset)
            stream = stream + tensors["embeddings.position"][torch.cat(rows)].float()
        if spec.type_vocab_size:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            stream = stream + tensors["embeddings.token_type"][types].float()
        return stream

    def _spread_heads(self, w: LayerWeights, qkv: Tensor) -> Tensor:
        """Queries, keys and values as if each query had keys and values of its own; with the norms of heads."""
        spec = self.spec
        size, more = spec.size_of_heads, spec.num_heads // spec.kv_heads
        sizes = [heads * size for heads in (spec.num_heads, spec.kv_heads, spec.kv_heads)]
        parts = list(torch.split(qkv, sizes, 1))
        for index, weight in enumerate((w.query_norm_weight, w.key_norm_weight)):
            if weight is not None:
                heads = parts[index].reshape(-1, size)
                parts[index] = _add_rms_norm(heads, None, weight, spec.layer_norm_eps).view(parts[index].shape)
        tokens = qkv.shape[0]
        spread = [part.reshape(tokens, -1, size).repeat_interleave(more, 1).flatten(1) for part in parts[1:]]
        return torch.cat([parts[0], *spread], 1)

    def _attend(self, index: int, x: Tensor, cu_seqlens: Tensor, attended: Tensor | None) -> Tensor:
        """Attention of a layer, without its last linear layer."""
        spec, w = self.spec, self._layers[index]
        local = spec.is_local(index)
        qkv = self._linear(x, w.qkv_weight, w.qkv_bias)
        if spec.head_norms or spec.num_kv_heads:
            qkv = self._spread_heads(w, qkv)
        rotary = self._rotary_local if local else self._rotary
        if rotary is not None:
            qkv = _rotary_embedding(qkv, cu_seqlens, spec.num_heads, rotary)
        window = spec.window if local else None
        result: Tensor = _varlen_attention(
            qkv,
            cu_seqlens,
            spec.num_heads,
            spec.attention_scale or None,
            window,
            self._relative_bias,
            w.position_keys,
            w.position_queries,
            spec.position_reach,
            spec.causal,
            attended,
        )
        return result

    def _widen(self, w: LayerWeights, x: Tensor) -> Tensor:
        """The feed-forward part of a layer, without its last linear layer."""
        if not self.spec.gated_ffn:
            shift = None if w.ffn_shift is None else w.ffn_shift.expand(len(x), -1)
            return self._linear(x, w.up_weight, w.up_bias, self.spec.activation, residual=shift)
        result: Tensor = _gate(self._linear(x, w.up_weight, w.up_bias), self.spec.activation)
        return result

    def _embed(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None, observe: Observe) -> Tensor:
        spec, tensors = self.spec, self._tensors
        result: Tensor = _embed_layer_norm(
            input_ids,
            cu_seqlens,
            token_type_ids if spec.type_vocab_size else None,
            tensors["embeddings.word"],
            tensors.get("embeddings.position"),
            tensors.get("embeddings.token_type"),
            tensors["embeddings.norm.weight"],
            tensors["embeddings.norm.bias"],
            spec.layer_norm_eps,
            spec.position_offset,
            spec.padding_id,
        )
        if spec.embedding_size:
            observe("embeddings.projection", result)
            weight, bias = tensors["embeddings.projection.weight"], tensors["embeddings.projection.bias"]
            result = self._linear(result, weight, bias)
        return result
