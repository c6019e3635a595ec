"""BERT, RoBERTa and DistilBERT without padding: a batch of texts is one ``[total_tokens, hidden]`` matrix.

Built from a specification (:class:`EncoderSpec`) and named weights, not from one class per model. Neither importing
this module nor loading a saved encoder needs the transformers package.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ext.ops import ACTIVATIONS

__all__ = ["ARCHITECTURES", "Dtype", "Encoder", "EncoderSpec", "Head", "HeadSpec"]

Dtype = Literal["bf16", "fp32"]

FORMAT = "torch-ext-encoder"
_UNLIKELY_ROWS = 1023  # no engine that prefers some numbers of rows prefers this one
FORMAT_VERSION = 1

_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

_embed_layer_norm = torch.ops.torch_ext.embed_layer_norm.default
_linear = torch.ops.torch_ext.linear.default
_varlen_attention = torch.ops.torch_ext.varlen_attention.default
_add_layer_norm = torch.ops.torch_ext.add_layer_norm.default
_preferred_rows = torch.ops.torch_ext._preferred_rows.default
_pack = torch.ops.torch_ext.pack_linear_weight.default
_unpack = torch.ops.torch_ext.unpack_linear_weight.default

_ACTIVATION_OF_HIDDEN_ACT = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

_ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

Spec = TypeVar("Spec", "EncoderSpec", "HeadSpec")


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


class Encoder:
    """A BERT-family encoder that computes on tokens only, never on padding.

    Made by :meth:`from_transformers` or :meth:`load`, and immutable: threads may share it. The weights in use are
    packed for this kind of CPU; what is saved or pickled is unpacked.

    Attributes:
        spec: what it computes.
        dtype: ``"bf16"`` or ``"fp32"``, of weights, products and the hidden state.
    """

    spec: EncoderSpec
    dtype: Dtype

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, Tensor], dtype: Dtype = "bf16") -> None:
        """Pack weights.

        Args:
            spec: what to compute.
            weights: fp32 or bf16 tensors with the names and shapes of ``spec.shapes()``; they are copied.
            dtype: ``"bf16"`` or ``"fp32"``.

        Raises:
            ValueError: ``dtype`` is not known, or a name, shape or dtype is wrong.
        """
        self.spec = spec
        self.dtype = _check_dtype(dtype)
        _check_weights(spec.shapes(), weights)
        table = _DTYPES[dtype]

        def copy(name: str, kind: torch.dtype = torch.float32) -> Tensor:
            return weights[name].detach().to(kind, copy=True).contiguous()

        pack = _pack_or_copy(dtype)
        self._word = copy("embeddings.word", table)
        self._position = copy("embeddings.position", table)
        self._token_type = copy("embeddings.token_type", table) if spec.type_vocab_size else None
        self._norm = (copy("embeddings.norm.weight"), copy("embeddings.norm.bias"))
        self._layers = []
        for index in range(spec.num_layers):
            layer: list[Tensor] = []
            for part in ("attention.qkv", "attention.out", "attention.norm", "ffn.up", "ffn.down", "ffn.norm"):
                weight = f"layers.{index}.{part}.weight"
                layer.append(copy(weight) if part.endswith("norm") else pack(weights[weight]))
                layer.append(copy(f"layers.{index}.{part}.bias"))
            self._layers.append(tuple(layer))
        self._run = self._run_bf16 if dtype == "bf16" else self._run_fp32
        # Where a product of a new size costs as much as a batch, and only there: see onednn_preferred_rows in csrc.
        self._fills_up = dtype == "bf16" and _preferred_rows(_UNLIKELY_ROWS) != _UNLIKELY_ROWS

    @classmethod
    def from_transformers(cls, model: nn.Module, dtype: Dtype = "bf16") -> Encoder:
        """Take the encoder out of a Hugging Face model.

        Args:
            model: ``BertModel``, ``RobertaModel`` or ``DistilBertModel``, or a model with a head on top of one (the
                head is left behind; see :class:`Head`), fp32 or bf16 on the CPU. One that :func:`torch_ext.optimize`
                has been over will do, too.
            dtype: ``"bf16"`` or ``"fp32"``.

        Returns:
            The encoder, with its own copy of the weights.

        Raises:
            TypeError: ``model`` has no transformers configuration.
            ValueError: the architecture, or an option of it, is not supported; the message says what is.
        """
        spec, weights = _read_encoder(model)
        return cls(spec, weights, dtype)

    def __call__(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Run a batch of texts.

        Args:
            input_ids: i64 ``[T]``, the tokens of all texts, one text after the other, special tokens included.
            cu_seqlens: i32 ``[B + 1]``; starts at 0, ends at T; text ``b`` is tokens ``cu_seqlens[b]`` to
                ``cu_seqlens[b + 1]``, at least one and at most ``spec.max_positions``.
            token_type_ids: i64 ``[T]``, or None for type 0 everywhere.

        Returns:
            The last hidden state, ``[T, H]``, bf16 or fp32 as ``dtype`` says. It never requires grad.

        Raises:
            TypeError: an argument has the wrong dtype.
            ValueError: a shape or an entry of ``cu_seqlens`` is wrong, or a text is empty or too long.
            RuntimeError: an id is out of range.
        """
        if torch.compiler.is_compiling():
            return self._run(input_ids, cu_seqlens, token_type_ids)
        self._check(input_ids, cu_seqlens, token_type_ids)
        with _Inference():
            tokens = input_ids.shape[0]
            rows = _preferred_rows(tokens) if self._fills_up else tokens
            if rows != tokens:
                filled = self._fill_up(rows - tokens, input_ids, cu_seqlens, token_type_ids)
                return self._run(*filled)[:tokens]
            return self._run(input_ids, cu_seqlens, token_type_ids)

    def _fill_up(
        self, count: int, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append texts of `count` tokens in all, whose results nobody reads, to batches of a costly new size."""
        tokens, longest = input_ids.shape[0], self.spec.max_positions
        filler = input_ids.new_zeros(count)
        bounds = [*range(tokens + longest, tokens + count, longest), tokens + count]
        return (
            torch.cat((input_ids, filler)),
            torch.cat((cu_seqlens, torch.tensor(bounds, dtype=torch.int32))),
            None if token_type_ids is None else torch.cat((token_type_ids, filler)),
        )

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
            if self._token_type is None and tokens and int(token_type_ids.max()) > 0:
                raise ValueError(f"Encoder: {spec.architecture} has no token types: leave token_type_ids out")

    def _embed(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None) -> Tensor:
        spec = self.spec
        result: Tensor = _embed_layer_norm(
            input_ids,
            cu_seqlens,
            token_type_ids if self._token_type is not None else None,
            self._word,
            self._position,
            self._token_type,
            *self._norm,
            spec.layer_norm_eps,
            spec.position_offset,
        )
        return result

    def _run_bf16(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None) -> Tensor:
        linear, attention, norm = _linear, _varlen_attention, _add_layer_norm
        eps, heads, activation = self.spec.layer_norm_eps, self.spec.num_heads, self.spec.activation
        hidden = self._embed(input_ids, cu_seqlens, token_type_ids)
        for w_qkv, b_qkv, w_out, b_out, g_att, b_att, w_up, b_up, w_down, b_down, g_ffn, b_ffn in self._layers:
            qkv = linear(hidden, w_qkv, b_qkv)
            # The residual is added in the norm, which reads it from the cache, on every instruction set in one pass.
            hidden = norm(linear(attention(qkv, cu_seqlens, heads), w_out, b_out), hidden, g_att, b_att, eps)
            hidden = norm(linear(linear(hidden, w_up, b_up, activation), w_down, b_down), hidden, g_ffn, b_ffn, eps)
        return hidden

    def _run_fp32(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None) -> Tensor:
        linear, attention, norm = F.linear, _varlen_attention, _add_layer_norm
        eps, heads = self.spec.layer_norm_eps, self.spec.num_heads
        activation = _ACTIVATION_FUNCTIONS[self.spec.activation]
        hidden = self._embed(input_ids, cu_seqlens, token_type_ids)
        for w_qkv, b_qkv, w_out, b_out, g_att, b_att, w_up, b_up, w_down, b_down, g_ffn, b_ffn in self._layers:
            qkv = linear(hidden, w_qkv, b_qkv)
            hidden = norm(linear(attention(qkv, cu_seqlens, heads), w_out, b_out), hidden, g_att, b_att, eps)
            wide = activation(linear(hidden, w_up, b_up))
            hidden = norm(linear(wide, w_down, b_down), hidden, g_ffn, b_ffn, eps)
        return hidden

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, unpacked: matrices and tables in ``dtype``, biases and norms fp32."""
        result = {
            "embeddings.word": self._word,
            "embeddings.position": self._position,
            "embeddings.norm.weight": self._norm[0],
            "embeddings.norm.bias": self._norm[1],
        }
        if self._token_type is not None:
            result["embeddings.token_type"] = self._token_type
        unpack = _unpack_or_pass(self.dtype)
        for index, layer in enumerate(self._layers):
            parts = iter(layer)
            for part in ("attention.qkv", "attention.out", "attention.norm", "ffn.up", "ffn.down", "ffn.norm"):
                weight, bias = next(parts), next(parts)
                name = f"layers.{index}.{part}"
                result[f"{name}.weight"] = weight if part.endswith("norm") else unpack(weight)
                result[f"{name}.bias"] = bias
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
            if head.spec.hidden_size != self.spec.hidden_size or head.dtype != self.dtype:
                raise ValueError(
                    f"Encoder.save: expected a head of hidden_size={self.spec.hidden_size}, {self.dtype}, got "
                    f"{head.spec.hidden_size}, {head.dtype}"
                )
            weights.update(head.weights())
            metadata["head"] = json.dumps(dataclasses.asdict(head.spec))
        _write(Path(path), weights, {**metadata, "dtype": self.dtype})

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: Dtype = "bf16") -> Encoder:
        """Read what :meth:`save` wrote, and pack it for this CPU.

        Args:
            path: the file.
            dtype: ``"bf16"`` or ``"fp32"``; a bf16 file cannot be loaded as fp32.

        Returns:
            The encoder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of another format or version, or holds bf16 where fp32 is asked for.
        """
        spec, weights = _read(Path(path), "encoder", EncoderSpec, dtype)
        return cls(spec, weights, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "dtype": self.dtype, "weights": self.weights()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["spec"], state["weights"], state["dtype"])  # type: ignore[misc]

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"Encoder({spec.architecture}, dtype={self.dtype}, hidden_size={spec.hidden_size}, "
            f"num_layers={spec.num_layers}, num_heads={spec.num_heads}, max_positions={spec.max_positions})"
        )


class Head:
    """The task head of a model: classification of texts, or tokens for a mask.

    Made by :meth:`from_transformers` or :meth:`load`, and immutable.

    Attributes:
        spec: what it computes.
        dtype: ``"bf16"`` or ``"fp32"``, of weights and products.
    """

    spec: HeadSpec
    dtype: Dtype

    def __init__(self, spec: HeadSpec, weights: Mapping[str, Tensor], dtype: Dtype = "bf16") -> None:
        """Pack weights.

        Args:
            spec: what to compute.
            weights: fp32 or bf16 tensors with the names and shapes of ``spec.shapes()``; they are copied.
            dtype: ``"bf16"`` or ``"fp32"``.

        Raises:
            ValueError: ``dtype`` is not known, or a name, shape or dtype is wrong.
        """
        self.spec = spec
        self.dtype = _check_dtype(dtype)
        _check_weights(spec.shapes(), weights)
        pack = _pack_or_copy(dtype)
        self._tensors = {
            name: pack(tensor)
            if name in ("head.dense.weight", "head.out.weight")
            else tensor.detach().to(torch.float32, copy=True).contiguous()
            for name, tensor in weights.items()
        }

    @classmethod
    def from_transformers(cls, model: nn.Module, dtype: Dtype = "bf16") -> Head:
        """Take the head of a Hugging Face model; for BERT classifiers, its pooler belongs to it.

        Args:
            model: ``*ForSequenceClassification`` or ``*ForMaskedLM`` of BERT, RoBERTa or DistilBERT, on the CPU.
            dtype: ``"bf16"`` or ``"fp32"``.

        Returns:
            The head, with its own copy of the weights.

        Raises:
            TypeError: ``model`` has no transformers configuration.
            ValueError: the model has no head that is supported.
        """
        spec, weights = _read_head(model)
        return cls(spec, weights, dtype)

    def __call__(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Compute logits for some of the tokens.

        Args:
            hidden: bf16 or fp32 ``[T, H]``, from the encoder.
            rows: i64 or i32 ``[R]``, rows of ``hidden``: for classification the first token of each text,
                ``cu_seqlens[:-1]``; for fill-mask the mask tokens.

        Returns:
            fp32 ``[R, num_outputs]``. It never requires grad.

        Raises:
            ValueError: a shape does not fit, or a row is out of range.
            TypeError: a dtype is wrong.
        """
        if torch.compiler.is_compiling():
            return self._run(hidden, rows)
        if hidden.dim() != 2 or hidden.shape[1] != self.spec.hidden_size:
            raise ValueError(f"Head: expected hidden [T, {self.spec.hidden_size}], got {list(hidden.shape)}")
        if hidden.dtype not in _DTYPES.values():
            raise TypeError(f"Head: expected hidden of fp32 or bf16, got {hidden.dtype}")
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
            return self._run(hidden, rows)

    def _run(self, hidden: Tensor, rows: Tensor) -> Tensor:
        tensors, spec = self._tensors, self.spec
        w_dense, b_dense = tensors["head.dense.weight"], tensors["head.dense.bias"]
        w_out, b_out = tensors["head.out.weight"], tensors["head.out.bias"]
        x = hidden.index_select(0, rows)
        if self.dtype == "bf16":
            x = _linear(x, w_dense, b_dense, spec.activation, torch.float32)
        else:
            x = _ACTIVATION_FUNCTIONS[spec.activation](F.linear(x.float(), w_dense, b_dense))
        if spec.norm:
            x = _add_layer_norm(x, None, tensors["head.norm.weight"], tensors["head.norm.bias"], spec.layer_norm_eps)
        if self.dtype == "bf16":
            result: Tensor = _linear(x, w_out, b_out, "none", torch.float32)
            return result
        return F.linear(x, w_out, b_out)

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, unpacked: matrices in ``dtype``, the rest fp32."""
        unpack = _unpack_or_pass(self.dtype)
        return {
            name: unpack(tensor) if name in ("head.dense.weight", "head.out.weight") else tensor
            for name, tensor in self._tensors.items()
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: Dtype = "bf16") -> Head | None:
        """Read the head that :meth:`Encoder.save` wrote beside an encoder.

        Args:
            path: the file.
            dtype: ``"bf16"`` or ``"fp32"``; a bf16 file cannot be loaded as fp32.

        Returns:
            The head, or None if the file has none.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of another format or version, or holds bf16 where fp32 is asked for.
        """
        if "head" not in _open(Path(path))[0]:
            return None
        spec, weights = _read(Path(path), "head", HeadSpec, dtype)
        return cls(spec, weights, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "dtype": self.dtype, "weights": self.weights()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["spec"], state["weights"], state["dtype"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Head({self.spec.task}, dtype={self.dtype}, num_outputs={self.spec.num_outputs})"


def _check_dtype(dtype: str) -> Dtype:
    if dtype == "bf16":
        return "bf16"
    if dtype == "fp32":
        return "fp32"
    raise ValueError(f"unknown dtype {dtype!r}; known: 'bf16', 'fp32'")


def _check_weights(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    """Raise unless exactly the named tensors are there, with their shapes, floating-point and on the CPU."""
    missing, extra = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(
            f"weights do not fit the specification: missing {missing or 'none'}, unexpected {extra or 'none'}"
        )
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"expected {name} {list(shape)}, got {list(tensor.shape)}")
        if tensor.device.type != "cpu" or tensor.dtype not in _DTYPES.values():
            raise ValueError(f"expected {name} of fp32 or bf16 on the CPU, got {tensor.dtype} on {tensor.device}")


def _pack_or_copy(dtype: Dtype) -> Callable[[Tensor], Tensor]:
    """What turns a weight into what linear layers of this dtype read."""
    if dtype == "bf16":
        return lambda weight: _pack(weight.detach().contiguous())
    return lambda weight: weight.detach().to(torch.float32, copy=True).contiguous()


def _unpack_or_pass(dtype: Dtype) -> Callable[[Tensor], Tensor]:
    """The way back."""
    return _unpack if dtype == "bf16" else lambda weight: weight


# Reading Hugging Face models, by their configuration and the names of their weights.


@dataclasses.dataclass(frozen=True)
class _Names:
    """Where an architecture keeps its weights (``{}`` is the layer), and what its configuration calls things."""

    layer: str
    qkv: tuple[str, str, str]
    out: str
    attention_norm: str
    up: str
    down: str
    ffn_norm: str
    token_types: bool = True
    hidden_size: str = "hidden_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    intermediate_size: str = "intermediate_size"
    activation: str = "hidden_act"
    layer_norm_eps: str | None = "layer_norm_eps"
    offset_positions: bool = False


_BERT = _Names(
    layer="encoder.layer.{}",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    ffn_norm="output.LayerNorm",
)
_ROBERTA = dataclasses.replace(_BERT, offset_positions=True)
_DISTILBERT = _Names(
    layer="transformer.layer.{}",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    ffn_norm="output_layer_norm",
    token_types=False,
    hidden_size="dim",
    num_layers="n_layers",
    num_heads="n_heads",
    intermediate_size="hidden_dim",
    activation="activation",
    layer_norm_eps=None,
)

_NAMES = {"bert": _BERT, "roberta": _ROBERTA, "xlm-roberta": _ROBERTA, "camembert": _ROBERTA, "distilbert": _DISTILBERT}

ARCHITECTURES: tuple[str, ...] = tuple(_NAMES)

# DistilBERT's configuration does not say; its code does.
_DISTILBERT_EPS = 1e-12

# Buffers, and what belongs to heads.
_IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.weight", "pooler.dense.bias")


def _read_config(model: nn.Module) -> tuple[Any, _Names]:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or not isinstance(model_type, str):
        raise TypeError(
            f"expected a Hugging Face model (an nn.Module with config.model_type), got {type(model).__name__}"
        )
    if model_type not in _NAMES:
        raise ValueError(
            f"unsupported architecture {model_type!r}; supported: {', '.join(_NAMES)}. Another model still gains from "
            "torch_ext.optimize(model)"
        )
    for name, wanted in (
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("position_embedding_type", "absolute"),
    ):
        value = getattr(config, name, wanted)
        if value != wanted:
            raise ValueError(f"unsupported configuration: expected {name}={wanted!r}, got {value!r}")
    return config, _NAMES[model_type]


def _activation(config: Any, name: str) -> str:
    value = getattr(config, name)
    if value not in _ACTIVATION_OF_HIDDEN_ACT:
        raise ValueError(f"unsupported activation {value!r}; supported: {', '.join(_ACTIVATION_OF_HIDDEN_ACT)}")
    return _ACTIVATION_OF_HIDDEN_ACT[value]


def _read_encoder(model: nn.Module) -> tuple[EncoderSpec, dict[str, Tensor]]:
    config, names = _read_config(model)
    base = getattr(model, str(getattr(model, "base_model_prefix", "")) or "", model)
    source: dict[str, Tensor] = dict(base.state_dict())
    layers = int(getattr(config, names.num_layers))
    taken: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in source:
            raise ValueError(f"{type(model).__name__} has no {name}: is it a plain {config.model_type} encoder?")
        taken.add(name)
        return source[name]

    offset = 0
    if names.offset_positions:
        offset = int(config.pad_token_id) + 1
    position = take("embeddings.position_embeddings.weight")
    weights = {
        "embeddings.word": take("embeddings.word_embeddings.weight"),
        "embeddings.position": position,
        "embeddings.norm.weight": take("embeddings.LayerNorm.weight"),
        "embeddings.norm.bias": take("embeddings.LayerNorm.bias"),
    }
    type_vocab_size = 0
    if names.token_types:
        weights["embeddings.token_type"] = take("embeddings.token_type_embeddings.weight")
        type_vocab_size = weights["embeddings.token_type"].shape[0]
    for index in range(layers):
        prefix = names.layer.format(index)
        for kind in ("weight", "bias"):
            weights[f"layers.{index}.attention.qkv.{kind}"] = torch.cat(
                [take(f"{prefix}.{part}.{kind}") for part in names.qkv]
            )
            for part, name in (
                ("attention.out", names.out),
                ("attention.norm", names.attention_norm),
                ("ffn.up", names.up),
                ("ffn.down", names.down),
                ("ffn.norm", names.ffn_norm),
            ):
                weights[f"layers.{index}.{part}.{kind}"] = take(f"{prefix}.{name}.{kind}")
    left = sorted(source.keys() - taken - set(_IGNORED))
    if left:
        raise ValueError(
            f"{type(model).__name__} has weights that a plain {config.model_type} encoder has not (adapters?): "
            f"{', '.join(left[:5])}{' ...' if len(left) > 5 else ''}"
        )
    spec = EncoderSpec(
        architecture=config.model_type,
        hidden_size=int(getattr(config, names.hidden_size)),
        num_layers=layers,
        num_heads=int(getattr(config, names.num_heads)),
        intermediate_size=int(getattr(config, names.intermediate_size)),
        activation=_activation(config, names.activation),
        max_positions=position.shape[0] - offset,
        position_offset=offset,
        layer_norm_eps=float(getattr(config, names.layer_norm_eps)) if names.layer_norm_eps else _DISTILBERT_EPS,
        vocab_size=weights["embeddings.word"].shape[0],
        type_vocab_size=type_vocab_size,
    )
    return spec, weights


# Per kind of head: task, dense layer, norm, output layer, activation ("config": the encoder's).
_HEADS: tuple[tuple[str, str, str | None, str, str], ...] = (
    ("text-classification", "{base}.pooler.dense", None, "classifier", "tanh"),
    ("text-classification", "classifier.dense", None, "classifier.out_proj", "tanh"),
    ("text-classification", "pre_classifier", None, "classifier", "relu"),
    (
        "fill-mask",
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        "config",
    ),
    ("fill-mask", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "gelu"),
    ("fill-mask", "vocab_transform", "vocab_layer_norm", "vocab_projector", "config"),
)


def _read_head(model: nn.Module) -> tuple[HeadSpec, dict[str, Tensor]]:
    config, names = _read_config(model)
    base = str(getattr(model, "base_model_prefix", ""))
    source: dict[str, Tensor] = dict(model.state_dict())
    for task, dense, norm, out, activation in _HEADS:
        parts = {"dense": dense.format(base=base), "out": out}
        if norm is not None:
            parts["norm"] = norm
        keys = {f"head.{part}.{kind}": f"{name}.{kind}" for part, name in parts.items() for kind in ("weight", "bias")}
        others = [key for key in source if not key.startswith(f"{base}.") and key not in keys.values()]
        # RoBERTa and BERT list the output bias twice; anything else is a head of another kind.
        if any(key not in source for key in keys.values()) or set(others) - {"lm_head.bias", "cls.predictions.bias"}:
            continue
        weights = {name: source[key] for name, key in keys.items()}
        eps = float(getattr(config, names.layer_norm_eps)) if names.layer_norm_eps else _DISTILBERT_EPS
        return (
            HeadSpec(
                task=task,
                hidden_size=int(getattr(config, names.hidden_size)),
                activation=_activation(config, names.activation) if activation == "config" else activation,
                norm=norm is not None,
                layer_norm_eps=eps,
                num_outputs=weights["head.out.weight"].shape[0],
            ),
            weights,
        )
    raise ValueError(
        f"{type(model).__name__} has no supported head; supported: *ForSequenceClassification and *ForMaskedLM of "
        f"{', '.join(_NAMES)}"
    )


# Files.


def _write(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write beside ``path``, then rename."""
    from safetensors.torch import save_file

    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        save_file(weights, name, {"format": FORMAT, "format_version": str(FORMAT_VERSION), **metadata})
        # mkstemp makes files that nobody else can read.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _open(path: Path) -> tuple[dict[str, str], Any]:
    """The metadata of a file, checked for format and version, and the open file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no encoder file {path}")
    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or is not a safetensors file: {error}") from error
    metadata: dict[str, str] = file.metadata() or {}  # type: ignore[no-untyped-call]
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by torch_ext.Encoder.save(): its metadata has no format {FORMAT!r}")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')}, this torch_ext reads {FORMAT_VERSION}: "
            "export the model again, or update torch-ext"
        )
    return metadata, file


def _read(path: Path, part: str, spec_type: type[Spec], dtype: str) -> tuple[Spec, dict[str, Tensor]]:
    """The specification and weights of the encoder or head in a file."""
    _check_dtype(dtype)
    metadata, file = _open(path)
    if dtype == "fp32" and metadata.get("dtype") != "fp32":
        raise ValueError(
            f"{path} holds {metadata.get('dtype')} weights, fp32 was asked for: load the fp32 file instead"
        )
    try:
        fields = json.loads(metadata[part])
        spec = spec_type(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no valid specification of the {part}: {error}") from error
    names: list[str] = file.keys()
    weights = {name: file.get_tensor(name) for name in names if name.startswith("head.") == (part == "head")}
    try:
        _check_weights(spec.shapes(), weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return spec, weights
