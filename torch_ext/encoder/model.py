"""Encoder: a batch of texts is one ``[total_tokens, hidden]`` matrix, without padding."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_ext.encoder import files
from torch_ext.encoder.balance import balance, random_texts
from torch_ext.encoder.head import Head
from torch_ext.encoder.huggingface.models import encoder_in_folder, read_encoder
from torch_ext.encoder.packing import LAYER_PARTS, pack_encoder
from torch_ext.encoder.positions import relative_bias_table, rotary_table
from torch_ext.encoder.reference import LayerWeights, Reference
from torch_ext.encoder.spec import Dtype, EncoderSpec, is_matrix
from torch_ext.encoder.weighted import Inference
from torch_ext.quantize import dequantize_weight

__all__ = ["Encoder", "Head", "LayerWeights"]

_encoder_forward = torch.ops.torch_ext.encoder_forward.default
_unpack_int8 = torch.ops.torch_ext.unpack_linear_weight_int8.default


class _View(NamedTuple):
    """A part of a packed encoder."""

    offset_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Encoder(Reference):
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
        self._correct_shifts(weights)
        self._packed, self._tensors = pack_encoder(
            spec, self._tensors, self._relative_bias, self._rotary, self._rotary_local
        )
        self._layers = tuple(self._layer_weights(f"layers.{index}") for index in range(spec.num_layers))

    def _correct_shifts(self, weights: Mapping[str, Tensor]) -> None:
        """Take what is added after activations out again by the weights that were quantized here, not those given."""
        for index in range(self.spec.num_layers):
            shift, name = weights.get(f"layers.{index}.ffn.shift"), f"layers.{index}.ffn.down"
            given = weights[f"{name}.weight"]
            if shift is not None and given.dtype != torch.int8 and self._is_int8(f"{name}.weight"):
                lost = given.detach().float() - dequantize_weight(*_unpack_int8(self._tensors[f"{name}.weight"]))
                self._tensors[f"{name}.bias"] += lost @ shift.detach().float()

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
    def from_transformers(
        cls,
        model: nn.Module,
        dtype: Dtype = "bf16",
        keep_bf16: str | Iterable[str] = (),
        *,
        adapter: str | None = None,
    ) -> Encoder:
        """Take the encoder out of a Hugging Face model.

        Args:
            model: of an architecture in :data:`torch_ext.encoder.ARCHITECTURES`, such as ``BertModel``, or a model
                with a head on top of one (the head is left behind; see :class:`Head`), fp32, bf16, fp16 or fp64 on the
                CPU. One that :func:`torch_ext.optimize` has been over will do, too, and so does what ``torch.compile``
                returned. Of a model of sentence-transformers the transformer is taken, without what follows it, such as
                its pooling; one with several is refused. Only its weights and configuration are read: code that was
                put into it is not run, and there is a warning of forward hooks.
            dtype: ``"bf16"``, ``"fp32"`` or ``"int8"``.
            keep_bf16: linear layers of an int8 encoder to leave in bf16: names, or ``fnmatch`` patterns of names, such
                as ``"layers.0.ffn.down"``; ``"layers.0"`` means all in that layer. The layers of a model are named by
                :attr:`linear_names`; which to keep, :func:`torch_ext.sensitivity.choose_layers` measures.
            adapter: of a model with LoRA adapters inside (Jina v3), the one that is merged into the weights, such as
                ``"retrieval.query"``; None: none of them.

        Returns:
            The encoder, with its own copy of the weights.

        Raises:
            TypeError: ``model`` has no transformers configuration.
            ValueError: the architecture, or an option of it, is not supported; the message says what is. Or the model
                has adapters of peft, parametrizations or pruned weights, ``keep_bf16`` names no linear layer, or the
                model has no such ``adapter``.
        """
        spec, weights = read_encoder(model, adapter)
        return cls(spec, cls.balanced(spec, weights) if dtype == "int8" else weights, dtype, keep_bf16)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        dtype: Dtype = "bf16",
        keep_bf16: str | Iterable[str] = (),
        *,
        adapter: str | None = None,
    ) -> Encoder:
        """Take the encoder out of a folder that ``save_pretrained`` wrote, without the transformers package.

        Args:
            folder: with ``config.json`` and safetensors, as for :meth:`torch_ext.runtime.Encoder.from_pretrained`.
            dtype: as for :meth:`from_transformers`.
            keep_bf16: likewise.
            adapter: likewise.

        Returns:
            The encoder, equal to that of :meth:`from_transformers` for the model in the folder.

        Raises:
            FileNotFoundError: there is no such folder, or a file of it is missing.
            ValueError: the architecture is not supported, or a file is damaged or does not fit; or as for
                :meth:`from_transformers`.
        """
        spec, weights = encoder_in_folder(folder, adapter)
        return cls(spec, cls.balanced(spec, weights) if dtype == "int8" else weights, dtype, keep_bf16)

    @classmethod
    def balanced(cls, spec: EncoderSpec, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
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
        with Inference():
            return balance(spec, weights, lambda observe: exact.run_reference(*random_texts(spec), observe=observe))

    @property
    def linear_names(self) -> tuple[str, ...]:
        """The names of all linear layers, from the embeddings up."""
        return tuple(name.removesuffix(".weight") for name in self.spec.shapes() if is_matrix(name))

    def __call__(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None = None,
        attended: Tensor | None = None,
    ) -> Tensor:
        """Run a batch of texts.

        Args:
            input_ids: i64 ``[T]``, the tokens of all texts, one text after the other, special tokens included. A
                padding token within a text is a token like any other, but with ``spec.padding_id`` (RoBERTa, XLM-R,
                CamemBERT, MPNet) it is not counted in positions, as in transformers.
            cu_seqlens: i32 ``[B + 1]``; starts at 0, ends at T; text ``b`` is tokens ``cu_seqlens[b]`` to
                ``cu_seqlens[b + 1]``, at least one and at most ``spec.max_positions``.
            token_type_ids: i64 ``[T]``, or None for type 0 everywhere.
            attended: i32 ``[B]``: of each text the first tokens that others attend to, at least one. Those behind them
                have hidden states, too, but change no other's, as in a ColBERT's query that is filled up. None: all.

        Returns:
            The last hidden state, ``[T, H]``, fp32 if ``dtype`` is, else bf16. It never requires grad.

        Raises:
            TypeError: an argument has the wrong dtype.
            ValueError: a shape or an entry of ``cu_seqlens`` is wrong, or a text is empty or too long.
            RuntimeError: an id or an entry of ``attended`` is out of range.
        """
        if torch.compiler.is_compiling():
            return self._run(input_ids, cu_seqlens, token_type_ids, attended)
        self._check(input_ids, cu_seqlens, token_type_ids, attended)
        with Inference():
            return self._run(input_ids, cu_seqlens, token_type_ids, attended)

    def _run(
        self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None, attended: Tensor | None
    ) -> Tensor:
        types = token_type_ids if self.spec.type_vocab_size else None
        result: Tensor = _encoder_forward(input_ids, cu_seqlens, types, self._packed, self.dtype == "fp32", attended)
        return result

    def _check(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None,
        attended: Tensor | None = None,
    ) -> None:
        spec = self.spec
        for name, tensor, dtype in (
            ("input_ids", input_ids, torch.int64),
            ("cu_seqlens", cu_seqlens, torch.int32),
            ("token_type_ids", token_type_ids, torch.int64),
            ("attended", attended, torch.int32),
        ):
            if tensor is None and name in ("token_type_ids", "attended"):
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
            if tensor.layout is not torch.strided:
                raise ValueError(f"Encoder: expected {name} as a dense tensor, got {tensor.layout}")
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

    def save(self, path: str | os.PathLike[str], head: Head | None = None) -> None:
        """Write one safetensors file: weights unpacked, so that any CPU can load it, and the specification as metadata.

        The file appears under its name only when it is complete.

        Args:
            path: the file; replaced if it exists.
            head: a task head to go with it.

        Raises:
            ValueError: ``head`` does not fit the encoder.
            TypeError: ``head`` is no Head.
            OSError: the file cannot be written.
        """
        weights = self.weights()
        metadata = {"encoder": json.dumps(dataclasses.asdict(self.spec))}
        if head is not None:
            if not isinstance(head, Head):
                raise TypeError(f"Encoder.save: expected a torch_ext.Head, got {type(head).__name__}")
            kind = "bf16" if self.dtype == "int8" else self.dtype
            if not head.spec.fits(self.spec.hidden_size) or head.dtype != kind:
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
            return cls(spec, cls.balanced(spec, weights), dtype)
        return cls(spec, weights, dtype, kept)

    def __repr__(self) -> str:
        spec = self.spec
        kept = f" ({len(self.kept_bf16)} of {len(self.linear_names)} linear layers in bf16)" if self.kept_bf16 else ""
        return (
            f"Encoder({spec.architecture}, dtype={self.dtype}{kept}, hidden_size={spec.hidden_size}, "
            f"num_layers={spec.num_layers}, num_heads={spec.num_heads}, max_positions={spec.max_positions})"
        )
