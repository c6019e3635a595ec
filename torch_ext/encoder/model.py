"""Encoder and Head: a batch of texts is one ``[total_tokens, hidden]`` matrix, without padding."""

from __future__ import annotations

import copyreg
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import torch_ext.ops  # noqa: F401 - registers the ops
from torch_ext.encoder import files
from torch_ext.encoder.balance import Observe, balance, random_texts
from torch_ext.encoder.huggingface.models import encoder_in_folder, head_in_folder, read_encoder, read_head
from torch_ext.encoder.packing import LAYER_PARTS, pack_encoder
from torch_ext.encoder.positions import relative_bias_table, rotary_table
from torch_ext.encoder.spec import Dtype, EncoderSpec, HeadSpec, check_dtype, is_matrix, is_table, scale_name
from torch_ext.encoder.weights import TABLE_DTYPES, check_weights
from torch_ext.patterns import select
from torch_ext.quantize import check_inputs, quantize_weight

__all__ = ["Encoder", "Head", "LayerWeights"]

Spec = TypeVar("Spec", EncoderSpec, HeadSpec)

_embed_layer_norm = torch.ops.torch_ext.embed_layer_norm.default
_linear = torch.ops.torch_ext.linear.default
_varlen_attention = torch.ops.torch_ext.varlen_attention.default
_add_layer_norm = torch.ops.torch_ext.add_layer_norm.default
_add_rms_norm = torch.ops.torch_ext.add_rms_norm.default
_rotary_embedding = torch.ops.torch_ext.rotary_embedding.default
_gate = torch.ops.torch_ext.gate.default
_pool = torch.ops.torch_ext.pool.default
_encoder_forward = torch.ops.torch_ext.encoder_forward.default
_pack = torch.ops.torch_ext.pack_linear_weight.default
_unpack = torch.ops.torch_ext.unpack_linear_weight.default
_pack_fp32 = torch.ops.torch_ext._pack_linear_weight_fp32.default
_unpack_fp32 = torch.ops.torch_ext._unpack_linear_weight_fp32.default
_pack_int8 = torch.ops.torch_ext.pack_linear_weight_int8.default
_unpack_int8 = torch.ops.torch_ext.unpack_linear_weight_int8.default


class _Inference:
    """Gradients off, and below autograd's dispatch keys: each call of an op saves torch's fallback for them.

    Unlike ``torch.inference_mode()`` it yields ordinary tensors, which may take part in autograd later (someone trains
    a head of their own on them).
    """

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._below = torch._C._AutoDispatchBelowAutograd()
        self._below.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        self._below.__exit__(*error)
        torch._C._set_grad_enabled(self._grad)


class _Weighted(Generic[Spec]):
    """A specification and its weights, in the form that the ops read."""

    spec: Spec
    dtype: Dtype
    kept_bf16: tuple[str, ...]

    def __init__(
        self,
        spec: Spec,
        weights: Mapping[str, Tensor],
        dtype: Dtype = "bf16",
        keep_bf16: str | Iterable[str] = (),
    ) -> None:
        """Pack weights.

        Args:
            spec: what to compute.
            weights: fp32 or bf16 tensors with the names and shapes of ``spec.shapes()``; they are copied. For an int8
                encoder matrices may be quantized already: i8, with fp32 ``NAME.weight_scale`` ``[N]`` beside them.
            dtype: ``"bf16"``, ``"fp32"`` or ``"int8"``.
            keep_bf16: linear layers of an int8 encoder to leave in bf16: names, or ``fnmatch`` patterns of names, such
                as ``"layers.0.ffn.down"``; ``"layers.0"`` means all in that layer.

        Raises:
            ValueError: ``dtype`` is not known, a name, shape or dtype is wrong, ``keep_bf16`` names no linear layer, or
                one that is quantized already, or a layer has too many inputs for int8
                (:data:`torch_ext.quantize.MAX_INT8_INPUTS`).
        """
        self.spec = spec
        self.dtype = check_dtype(dtype)
        check_weights(spec, weights)
        self.kept_bf16 = self._select_kept(weights, keep_bf16)
        self._tensors = {
            name: self._convert(name, tensor.detach(), weights.get(scale_name(name)))
            for name, tensor in weights.items()
            if name in spec.shapes() or name in spec.optional_shapes()
        }

    def _select_kept(self, weights: Mapping[str, Tensor], keep_bf16: str | Iterable[str]) -> tuple[str, ...]:
        """The names of the linear layers that ``keep_bf16`` means, checked."""
        kind = type(self).__name__
        layers = [name.removesuffix(".weight") for name in self.spec.shapes() if is_matrix(name)]
        kept = select(f"{kind}: keep_bf16", layers, keep_bf16)
        quantized = {name for name in layers if weights[f"{name}.weight"].dtype == torch.int8}
        if kept and self.dtype != "int8":
            raise ValueError(f"{kind}: keep_bf16 means nothing with dtype={self.dtype!r}, only with 'int8'")
        if quantized and self.dtype != "int8":
            raise ValueError(f"{kind}: expected fp32 or bf16 weights for dtype={self.dtype!r}, got int8 ones")
        if quantized.intersection(kept):
            names = ", ".join(sorted(quantized.intersection(kept)))
            raise ValueError(f"{kind}: cannot keep {names} in bf16, being quantized already: start from other weights")
        if self.dtype == "int8":
            for name in layers:
                if name not in kept:
                    check_inputs(f"{kind}: {name}", self.spec.shapes()[f"{name}.weight"][1])
        return kept

    def _is_int8(self, name: str) -> bool:
        """Whether a weight is, or becomes, a packed matrix of int8."""
        return self.dtype == "int8" and is_matrix(name) and name.removesuffix(".weight") not in self.kept_bf16

    def _convert(self, name: str, tensor: Tensor, scale: Tensor | None) -> Tensor:
        if self._is_int8(name):
            quantized, scale = (tensor, scale) if scale is not None else quantize_weight(tensor)
            packed: Tensor = _pack_int8(quantized.contiguous(), scale.detach())
            return packed
        if is_matrix(name):
            return (_pack_fp32 if self.dtype == "fp32" else _pack)(tensor.contiguous())  # type: ignore[no-any-return]
        kind = TABLE_DTYPES[self.dtype] if is_table(name) else torch.float32
        return tensor.to(kind, copy=True).contiguous()

    def _linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        activation: str = "none",
        out_dtype: torch.dtype | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``activation(x @ weight.T + bias) + residual``, with a weight as :meth:`_convert` leaves it."""
        if self.dtype == "fp32":
            x = x.float()
        result: Tensor = _linear(x, weight, bias, activation, out_dtype, residual)
        return result

    def _norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual_scale: Tensor | None = None,
    ) -> Tensor:
        """The layer norm of ``x + residual_scale * residual``; ``x`` where there is no norm."""
        if weight is None:
            return x
        result: Tensor = _add_layer_norm(x, residual, weight, bias, self.spec.layer_norm_eps, residual_scale)
        return result

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, unpacked, as the constructor takes them.

        Returns:
            Matrices and tables in ``dtype``, the rest fp32. With int8: matrices i8 ``NAME.weight`` with fp32
            ``NAME.weight_scale`` ``[N]``, but bf16 in layers that are kept so; tables bf16.
        """
        result: dict[str, Tensor] = {}
        for name, tensor in self._tensors.items():
            if self._is_int8(name):
                result[name], result[scale_name(name)] = _unpack_int8(tensor)
            elif is_matrix(name):
                result[name] = _unpack_fp32(tensor) if self.dtype == "fp32" else _unpack(tensor)
            else:
                result[name] = tensor
        return result

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ForkingPickler.register(cls, _reduce_for_process)

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "dtype": self.dtype, "weights": self.weights(), "keep_bf16": self.kept_bf16}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "packed" in state:
            self._unflatten(state["packed"])
            return
        self.__init__(state["spec"], state["weights"], state["dtype"], state.get("keep_bf16", ()))  # type: ignore[misc]

    def _flatten(self) -> dict[str, Any]:
        """The attributes as they are, each tensor that is a view of another one described instead."""
        return dict(self.__dict__)

    def _unflatten(self, attributes: dict[str, Any]) -> None:
        """Take over what :meth:`_flatten` returned."""
        self.__dict__.update(attributes)


def _reduce_for_process(weighted: _Weighted[Any]) -> tuple[Any, ...]:
    """How an object is sent to another process on this machine: packed, as it is, in shared memory.

    The tensors in what spawn and forkserver send must live until the process has started, since the new process gets
    their file descriptors, and no two may share memory, since a descriptor may be sent once. What ``__getstate__``
    unpacks would not do.
    """
    return copyreg.__newobj__, (type(weighted),), {"packed": weighted._flatten()}  # type: ignore[attr-defined]


class _View(NamedTuple):
    """A part of a packed encoder."""

    offset_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


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


class Encoder(_Weighted[EncoderSpec]):
    """A BERT-family encoder that computes on tokens only, never on padding.

    Made by :meth:`from_transformers`, :meth:`from_pretrained` or :meth:`load`, and immutable: threads may share it. The
    weights in use are packed for this kind of CPU; what is saved or pickled is unpacked. A process that is
    started by spawn or forkserver gets the packed weights, in shared memory.

    Attributes:
        spec: what it computes.
        dtype: ``"bf16"`` or ``"fp32"``, of weights, products and the hidden state; ``"int8"``, of the weights and
            products of linear layers, while all else is as with ``"bf16"``.
        kept_bf16: names of the linear layers of an int8 encoder that stayed in bf16.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights: Mapping[str, Tensor],
        dtype: Dtype = "bf16",
        keep_bf16: str | Iterable[str] = (),
    ) -> None:
        super().__init__(spec, weights, dtype, keep_bf16)
        # What follows from the specification and is used in every call: angles [max_positions, head_dim], biases of
        # scores [num_heads, 2 * max_distance + 1].
        self._rotary = rotary_table(spec, spec.rotary_theta) if spec.rotary_theta else None
        self._rotary_local = self._rotary
        if self._rotary is not None and spec.rotary_theta_local and spec.window:
            self._rotary_local = rotary_table(spec, spec.rotary_theta_local)
        self._relative_bias = None
        if spec.relative_attention_buckets:
            self._relative_bias = relative_bias_table(spec, self._tensors["relative_attention_bias"])
        self._packed, self._tensors = pack_encoder(
            spec, self._tensors, self._relative_bias, self._rotary, self._rotary_local
        )
        self._layers = tuple(self._layer_weights(f"layers.{index}") for index in range(spec.num_layers))

    def _flatten(self) -> dict[str, Any]:
        attributes = super()._flatten()
        del attributes["_layers"]
        begin, size = self._packed.data_ptr(), self._packed.nbytes
        attributes["_tensors"] = {
            name: _View(tensor.data_ptr() - begin, tensor.dtype, tuple(tensor.shape))
            if tensor.nbytes and begin <= tensor.data_ptr() < begin + size
            else tensor
            for name, tensor in self._tensors.items()
        }
        return attributes

    def _unflatten(self, attributes: dict[str, Any]) -> None:
        super()._unflatten(attributes)
        flat = self._packed.view(-1)
        parts: dict[str, Tensor | _View] = dict(self._tensors)
        for name, part in parts.items():
            if isinstance(part, _View):
                end = part.offset_bytes + math.prod(part.shape) * part.dtype.itemsize
                self._tensors[name] = flat[part.offset_bytes : end].view(part.dtype).view(part.shape)
        self._layers = tuple(self._layer_weights(f"layers.{index}") for index in range(self.spec.num_layers))

    def _layer_weights(self, prefix: str) -> LayerWeights:
        return LayerWeights(*(self._tensors.get(f"{prefix}.{name}") for name in LAYER_PARTS))  # type: ignore[arg-type]

    @classmethod
    def from_transformers(cls, model: nn.Module, dtype: Dtype = "bf16", keep_bf16: str | Iterable[str] = ()) -> Encoder:
        """Take the encoder out of a Hugging Face model.

        Args:
            model: of an architecture in :data:`torch_ext.encoder.ARCHITECTURES`, such as ``BertModel``, or a model
                with a head on top of one (the head is left behind; see :class:`Head`), fp32, bf16, fp16 or fp64 on the
                CPU. One that :func:`torch_ext.optimize` has been over will do, too.
            dtype: ``"bf16"``, ``"fp32"`` or ``"int8"``.
            keep_bf16: linear layers of an int8 encoder to leave in bf16: names, or ``fnmatch`` patterns of names, such
                as ``"layers.0.ffn.down"``; ``"layers.0"`` means all in that layer. The layers of a model are named by
                :attr:`linear_names`; which to keep, :func:`torch_ext.sensitivity.choose_layers` measures.

        Returns:
            The encoder, with its own copy of the weights.

        Raises:
            TypeError: ``model`` has no transformers configuration.
            ValueError: the architecture, or an option of it, is not supported; the message says what is. Or
                ``keep_bf16`` names no linear layer.
        """
        spec, weights = read_encoder(model)
        return cls(spec, cls.balanced(spec, weights) if dtype == "int8" else weights, dtype, keep_bf16)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], dtype: Dtype = "bf16", keep_bf16: str | Iterable[str] = ()
    ) -> Encoder:
        """Take the encoder out of a folder that ``save_pretrained`` wrote, without the transformers package.

        Args:
            folder: with ``config.json`` and safetensors, as for :meth:`torch_ext.runtime.Encoder.from_pretrained`.
            dtype: as for :meth:`from_transformers`.
            keep_bf16: likewise.

        Returns:
            The encoder, equal to that of :meth:`from_transformers` for the model in the folder.

        Raises:
            FileNotFoundError: there is no such folder, or a file of it is missing.
            ValueError: the architecture is not supported, or a file is damaged or does not fit; or as for
                :meth:`from_transformers`.
        """
        spec, weights = encoder_in_folder(folder)
        return cls(spec, cls.balanced(spec, weights) if dtype == "int8" else weights, dtype, keep_bf16)

    @classmethod
    def balanced(cls, spec: EncoderSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the same encoder that suit int8: the channels that its linear layers read have similar ranges.

        The channels are seen on some texts of random tokens, which the encoder is run on in fp32.
        :meth:`from_transformers` does this, and so does :meth:`load` where it quantizes.

        Args:
            spec: what the encoder computes.
            weights: fp32 or bf16, by the names of ``spec.shapes()``, as they were trained.

        Returns:
            Weights for the constructor, with any dtype; see :mod:`torch_ext.encoder.balance`.

        Raises:
            ValueError: a name, shape or dtype is wrong.
        """
        exact = cls(spec, weights, "fp32")
        with _Inference():
            return balance(spec, weights, lambda observe: exact.run_reference(*random_texts(spec), observe=observe))

    @property
    def linear_names(self) -> tuple[str, ...]:
        """The names of all linear layers, from the embeddings up."""
        return tuple(name.removesuffix(".weight") for name in self.spec.shapes() if is_matrix(name))

    def __call__(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Run a batch of texts.

        Args:
            input_ids: i64 ``[T]``, the tokens of all texts, one text after the other, special tokens included. A
                padding token within a text is a token like any other, but with ``spec.padding_id`` (RoBERTa, XLM-R,
                CamemBERT, MPNet) it is not counted in positions, as in transformers.
            cu_seqlens: i32 ``[B + 1]``; starts at 0, ends at T; text ``b`` is tokens ``cu_seqlens[b]`` to
                ``cu_seqlens[b + 1]``, at least one and at most ``spec.max_positions``.
            token_type_ids: i64 ``[T]``, or None for type 0 everywhere.

        Returns:
            The last hidden state, ``[T, H]``, fp32 if ``dtype`` is, else bf16. It never requires grad.

        Raises:
            TypeError: an argument has the wrong dtype.
            ValueError: a shape or an entry of ``cu_seqlens`` is wrong, or a text is empty or too long.
            RuntimeError: an id is out of range.
        """
        if torch.compiler.is_compiling():
            return self._run(input_ids, cu_seqlens, token_type_ids)
        self._check(input_ids, cu_seqlens, token_type_ids)
        with _Inference():
            return self._run(input_ids, cu_seqlens, token_type_ids)

    def _run(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None) -> Tensor:
        types = token_type_ids if self.spec.type_vocab_size else None
        result: Tensor = _encoder_forward(input_ids, cu_seqlens, types, self._packed, self.dtype == "fp32")
        return result

    def _check(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None) -> None:
        spec = self.spec
        for name, tensor, dtype in (
            ("input_ids", input_ids, torch.int64),
            ("cu_seqlens", cu_seqlens, torch.int32),
            ("token_type_ids", token_type_ids, torch.int64),
        ):
            if tensor is None and name == "token_type_ids":
                continue
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"Encoder: expected {name} of {dtype}, got {got}")
            if tensor.dim() != 1:
                raise ValueError(
                    f"Encoder: expected {name} with 1 dimension, got {list(tensor.shape)}: texts are concatenated "
                    "without padding, and cu_seqlens says where each begins"
                )
            if tensor.device.type != "cpu":
                raise ValueError(f"Encoder: expected {name} on the CPU, got {tensor.device}")
        bounds = cu_seqlens.tolist()
        tokens = input_ids.shape[0]
        if len(bounds) < 2:
            raise ValueError("Encoder: expected at least one text (cu_seqlens [B + 1]), got an empty batch")
        if bounds[0] != 0 or bounds[-1] != tokens:
            raise ValueError(
                f"Encoder: expected cu_seqlens from 0 to {tokens} (tokens), got {bounds[0]} to {bounds[-1]}"
            )
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        if min(lengths) < 1:
            index = next(index for index, length in enumerate(lengths) if length < 1)
            raise ValueError(
                f"Encoder: expected cu_seqlens to rise, got {bounds[index]} then {bounds[index + 1]}: text {index} "
                "has no tokens"
            )
        if max(lengths) > spec.max_positions:
            raise ValueError(
                f"Encoder: text {lengths.index(max(lengths))} has {max(lengths)} tokens, the model takes at most "
                f"{spec.max_positions}: truncate it"
            )
        if token_type_ids is not None:
            if token_type_ids.shape[0] != tokens:
                raise ValueError(f"Encoder: expected token_type_ids [{tokens}], got {list(token_type_ids.shape)}")
            if not spec.type_vocab_size and bool(token_type_ids.any()):
                raise ValueError(f"Encoder: {spec.architecture} has no token types: leave token_type_ids out")

    def run_reference(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """The encoder, op by op: what it computes, written to be read. Calls run it as one op, ``encoder_forward``.

        Args:
            input_ids: as when the encoder is called, which checks its arguments first.
            cu_seqlens: likewise.
            token_type_ids: likewise.
            observe: is told the name and input of every linear layer that reads a norm.

        Returns:
            The last hidden state, ``[T, H]``.
        """
        observe = observe or (lambda name, x: None)
        if not self.spec.embedding_norm:
            return self._run_stream(input_ids, cu_seqlens, token_type_ids, observe)
        hidden = self._embed(input_ids, cu_seqlens, token_type_ids, observe)
        for index, w in enumerate(self._layers):
            attention_norm = w.attention_norm_weight, w.attention_norm_bias
            ffn_norm = w.ffn_norm_weight, w.ffn_norm_bias
            if self.spec.norm_first:
                normed = self._norm(hidden, None, *attention_norm)
                observe(f"layers.{index}.attention.qkv", normed)
                attended = self._attend(index, normed, cu_seqlens)
                hidden = self._linear(attended, w.out_weight, w.out_bias, residual=hidden)
                normed = self._norm(hidden, None, *ffn_norm)
                observe(f"layers.{index}.ffn.up", normed)
                hidden = self._linear(self._widen(w, normed), w.down_weight, w.down_bias, residual=hidden)
            else:
                # The residual is added in the norm, which reads it from the cache, on every instruction set in one
                # pass.
                observe(f"layers.{index}.attention.qkv", hidden)
                attended = self._linear(self._attend(index, hidden, cu_seqlens), w.out_weight, w.out_bias)
                hidden = self._norm(attended, hidden, *attention_norm, w.attention_residual_scale)
                observe(f"layers.{index}.ffn.up", hidden)
                narrow = self._linear(self._widen(w, hidden), w.down_weight, w.down_bias)
                hidden = self._norm(narrow, hidden, *ffn_norm, w.ffn_residual_scale)
        if self.spec.norm_first:
            hidden = self._norm(hidden, None, self._tensors["final_norm.weight"], self._tensors["final_norm.bias"])
        return hidden

    def _run_stream(
        self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None, observe: Observe
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
            attended = self._attend(index, normed, cu_seqlens)
            stream = added(attended, w.out_weight, w.out_bias, w.attention_post_norm_weight)
            normed = norm(stream, w.ffn_norm_weight, w.ffn_norm_bias)
            observe(f"layers.{index}.ffn.up", normed)
            stream = added(self._widen(w, normed), w.down_weight, w.down_bias, w.ffn_post_norm_weight)
        return norm(stream, self._tensors["final_norm.weight"], self._tensors.get("final_norm.bias"))

    def _embed_stream(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """The sum of the tables, in fp32."""
        spec, tensors = self.spec, self._tensors
        stream = tensors["embeddings.word"][input_ids].float() * spec.embedding_scale
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

    def _attend(self, index: int, x: Tensor, cu_seqlens: Tensor) -> Tensor:
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
        )
        return result

    def _widen(self, w: LayerWeights, x: Tensor) -> Tensor:
        """The feed-forward part of a layer, without its last linear layer."""
        if not self.spec.gated_ffn:
            return self._linear(x, w.up_weight, w.up_bias, self.spec.activation)
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

    def save(self, path: str | os.PathLike[str], head: Head | None = None) -> None:
        """Write one safetensors file: weights unpacked, so that any CPU can load it, and the specification as metadata.

        The file appears under its name only when it is complete.

        Args:
            path: the file; replaced if it exists.
            head: a task head to go with it.

        Raises:
            ValueError: ``head`` does not fit the encoder.
            OSError: the file cannot be written.
        """
        weights = self.weights()
        metadata = {"encoder": json.dumps(dataclasses.asdict(self.spec))}
        if head is not None:
            kind = "bf16" if self.dtype == "int8" else self.dtype
            if head.spec.hidden_size != self.spec.hidden_size or head.dtype != kind:
                raise ValueError(
                    f"Encoder.save: expected a head of hidden_size={self.spec.hidden_size}, {kind}, got "
                    f"{head.spec.hidden_size}, {head.dtype}"
                )
            weights.update(head.weights())
            metadata["head"] = json.dumps(dataclasses.asdict(head.spec))
        files.write(Path(path), weights, {**metadata, "dtype": self.dtype})

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: Dtype = "bf16") -> Encoder:
        """Read what :meth:`save` wrote, and pack it for this CPU.

        Args:
            path: the file.
            dtype: ``"bf16"``, ``"fp32"`` or ``"int8"``. A file can be loaded as what it was saved as, or as less: a
                bf16 or fp32 file is quantized when it is loaded as int8. An int8 file keeps the layers in bf16 that it
                was saved with.

        Returns:
            The encoder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of another format or version, or holds less than what is asked for.
        """
        path = Path(path)
        spec, weights = files.read(path, "encoder", EncoderSpec, dtype)
        kept: list[str] = []
        if files.stored_dtype(path) == "int8":
            matrices = (name for name, tensor in weights.items() if is_matrix(name) and tensor.dtype != torch.int8)
            kept = [name.removesuffix(".weight") for name in matrices]
        elif dtype == "int8":
            weights = cls.balanced(spec, weights)
        return cls(spec, weights, dtype, kept)

    def __repr__(self) -> str:
        spec = self.spec
        kept = f" ({len(self.kept_bf16)} of {len(self.linear_names)} linear layers in bf16)" if self.kept_bf16 else ""
        return (
            f"Encoder({spec.architecture}, dtype={self.dtype}{kept}, hidden_size={spec.hidden_size}, "
            f"num_layers={spec.num_layers}, num_heads={spec.num_heads}, max_positions={spec.max_positions})"
        )


class Head(_Weighted[HeadSpec]):
    """The task head of a model: classification of texts or tokens, answers, tokens for a mask, or a linear stage.

    Made by :meth:`from_transformers` or :meth:`load`, and immutable.

    Beside an int8 encoder it stays in bf16, and that is what ``dtype="int8"`` means here: it runs on a few rows of a
    batch, one for each text or mask, so that int8 would hardly save time, and nothing after it (no norm, no pooling)
    would even out the error that int8 puts into its logits.

    Attributes:
        spec: what it computes.
        dtype: ``"bf16"`` or ``"fp32"``, of weights and products.
    """

    def __init__(
        self,
        spec: HeadSpec,
        weights: Mapping[str, Tensor],
        dtype: Dtype = "bf16",
        keep_bf16: str | Iterable[str] = (),
    ) -> None:
        super().__init__(spec, weights, "bf16" if dtype == "int8" else dtype, keep_bf16)

    @classmethod
    def from_transformers(cls, model: nn.Module, dtype: Dtype = "bf16") -> Head:
        """Take the head of a Hugging Face model; for BERT classifiers, its pooler belongs to it.

        Args:
            model: ``*ForSequenceClassification``, ``*ForTokenClassification``, ``*ForQuestionAnswering`` or
                ``*ForMaskedLM`` of an architecture in :data:`torch_ext.encoder.ARCHITECTURES`, on the CPU.
            dtype: ``"bf16"`` or ``"fp32"``; ``"int8"`` is taken for bf16.

        Returns:
            The head, with its own copy of the weights.

        Raises:
            TypeError: ``model`` has no transformers configuration.
            ValueError: the model has no head that is supported.
        """
        spec, weights = read_head(model)
        return cls(spec, weights, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], dtype: Dtype = "bf16", task: str = "auto") -> Head:
        """Take the head out of a folder that ``save_pretrained`` wrote, without the transformers package.

        Args:
            folder: with ``config.json`` and safetensors.
            dtype: ``"bf16"`` or ``"fp32"``; ``"int8"`` is taken for bf16.
            task: ``"text-classification"``, ``"token-classification"``, ``"question-answering"`` or ``"fill-mask"``;
                ``"auto"``: the one that ``config.json`` names.

        Returns:
            The head, equal to that of :meth:`from_transformers` for the model in the folder.

        Raises:
            FileNotFoundError: there is no such folder, or a file of it is missing.
            ValueError: there is no such head, or a file is damaged or does not fit.
        """
        spec, weights = head_in_folder(folder, task)
        return cls(spec, weights, dtype)

    def __call__(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Compute logits for some of the tokens, or for all.

        Args:
            hidden: bf16 or fp32 ``[T, H]``, from the encoder.
            rows: i64 or i32 ``[R]``, rows of ``hidden``: for fill-mask the mask tokens, for a classifier of texts
                that pools by ``cls`` their first tokens, ``cu_seqlens[:-1]``. None, for token classification and
                question answering: all.

        Returns:
            fp32 ``[R, num_outputs]``. It never requires grad.

        Raises:
            ValueError: a shape does not fit, or a row is out of range.
            TypeError: a dtype is wrong.
        """
        if torch.compiler.is_compiling():
            return self._run(hidden if rows is None else hidden.index_select(0, rows))
        self._check_hidden(hidden)
        if rows is not None:
            if rows.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"Head: expected rows of int64 or int32, got {rows.dtype}")
            if rows.dim() != 1:
                raise ValueError(f"Head: expected rows with 1 dimension, got {list(rows.shape)}")
            if rows.shape[0]:
                low, high = rows.aminmax()
                if int(low) < 0 or int(high) >= hidden.shape[0]:
                    wrong = int(low) if int(low) < 0 else int(high)
                    raise ValueError(f"Head: expected rows from 0 to {hidden.shape[0] - 1}, got {wrong}")
        with _Inference():
            return self._run(hidden if rows is None else hidden.index_select(0, rows))

    def classify(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Compute logits of whole texts, pooled as ``spec.pooling`` says.

        Args:
            hidden: bf16 or fp32 ``[T, H]``, from the encoder.
            cu_seqlens: i32 ``[B + 1]``, as the encoder took it.

        Returns:
            fp32 ``[B, num_outputs]``. It never requires grad.

        Raises:
            ValueError: the head classifies no texts, or a shape does not fit.
            TypeError: a dtype is wrong.
            RuntimeError: ``cu_seqlens`` does not fit, or a text is empty.
        """
        if self.spec.task != "text-classification":
            raise ValueError(
                f"Head.classify: expected a head for text-classification, this one is for {self.spec.task}"
            )
        if torch.compiler.is_compiling():
            return self._run(_pool(hidden, cu_seqlens, self.spec.pooling, False))
        self._check_hidden(hidden)
        with _Inference():
            return self._run(_pool(hidden, cu_seqlens, self.spec.pooling, False))

    def _check_hidden(self, hidden: Tensor) -> None:
        if hidden.dim() != 2 or hidden.shape[1] != self.spec.hidden_size:
            raise ValueError(f"Head: expected hidden [T, {self.spec.hidden_size}], got {list(hidden.shape)}")
        if hidden.dtype not in TABLE_DTYPES.values():
            raise TypeError(f"Head: expected hidden of fp32 or bf16, got {hidden.dtype}")

    def _run(self, x: Tensor) -> Tensor:
        tensors, spec = self._tensors, self.spec
        if spec.dense:
            weight, bias = tensors["head.dense.weight"], tensors["head.dense.bias"]
            x = self._linear(x, weight, bias, spec.activation, torch.float32)
        if spec.norm:
            x = self._norm(x, None, tensors["head.norm.weight"], tensors["head.norm.bias"])
        weight, bias = tensors["head.out.weight"], tensors["head.out.bias"]
        return self._linear(x, weight, bias, spec.out_activation, torch.float32)

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: Dtype = "bf16") -> Head | None:
        """Read the head that :meth:`Encoder.save` wrote beside an encoder.

        Args:
            path: the file.
            dtype: ``"bf16"`` or ``"fp32"``; a bf16 or int8 file cannot be loaded as fp32. ``"int8"`` is taken for bf16.

        Returns:
            The head, or None if the file has none.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of another format or version, or holds bf16 where fp32 is asked for.
        """
        if not files.has_part(Path(path), "head"):
            return None
        spec, weights = files.read(Path(path), "head", HeadSpec, dtype)
        return cls(spec, weights, dtype)

    def __repr__(self) -> str:
        return f"Head({self.spec.task}, dtype={self.dtype}, num_outputs={self.spec.num_outputs})"
