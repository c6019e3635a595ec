"""Encoders and heads out of models of the transformers package, and folders as tensors.

Looks at a model's attributes only: the package is not needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.encoder.huggingface.adapters import find_adapted, number_of
from torch_ext.encoder.huggingface.architecture import Architecture
from torch_ext.encoder.huggingface.describe import (
    Part,
    Plan,
    Projected,
    Rows,
    Shifted,
    describe_encoder,
    describe_head,
    head_layers,
)
from torch_ext.encoder.huggingface.folder import AUTO, FolderModel, read_folder
from torch_ext.encoder.huggingface.projection import project_all
from torch_ext.encoder.huggingface.safetensors import StoredTensor
from torch_ext.encoder.huggingface.table import ARCHITECTURES, HEAD_CLASSES, find_architecture, text_config
from torch_ext.encoder.spec import EncoderSpec, HeadSpec
from torch_ext.encoder.weights import FP32, LazyWeights

__all__ = ["encoder_in_folder", "head_in_folder", "read_encoder", "read_head"]

_PIECE_BYTES = 1 << 22
"""Of a weight in a file, converted at a time."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_REPARAMETRIZED = re.compile(r"\.(lora_\w+|base_layer|parametrizations|weight_(orig|mask|g|v|u))(\.|$)")
"""In the names of weights, what adapters of peft, parametrizations and pruning leave there."""


def _inner(model: nn.Module) -> nn.Module:
    """The model behind what ``torch.compile`` returned, and in a model of sentence-transformers; others as they are.

    Raises:
        ValueError: there are several, such as one for queries and one for documents.
    """
    model = _compiled(model)
    inner = getattr(model, "transformers_model", None)
    if not isinstance(inner, nn.Module):
        return model
    # Modules of sentence-transformers have the configuration of the model inside them; models have their names, too.
    models = {id(part) for part in model.modules() if isinstance(getattr(part, "base_model_prefix", None), str)}
    if models - {id(part) for part in inner.modules()}:
        raise ValueError(f"{type(model).__name__} has several models of transformers: pass one of them")
    return _compiled(inner)


def _compiled(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


@contextlib.contextmanager
def _plain(model: nn.Module, read: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
    """Warn of code that an Encoder does not run; and where weights do not fit since others are added, say so.

    Args:
        model: all of it.
        read: what is taken out of it, by name.
    """
    try:
        yield
    except ValueError as error:
        found = next((name for name in model.state_dict() if _REPARAMETRIZED.search(f".{name}")), None)
        if found is None:
            raise
        raise ValueError(
            f"{type(model).__name__} has adapters, parametrizations or pruned weights ({found}): make plain weights of "
            "them first, by merge_and_unload() of peft, remove_parametrizations() or prune.remove() of torch.nn.utils"
        ) from error
    for name, module in read:
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
            what = name or type(module).__name__
            warnings.warn(f"torch_ext: {what} has a forward hook, which an Encoder or Head does not call", stacklevel=5)


def _read_config(model: nn.Module) -> tuple[Any, Architecture]:
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not isinstance(getattr(config, "model_type", None), str):
        raise TypeError(
            f"expected a Hugging Face model (an nn.Module with config.model_type), got {type(model).__name__}"
        )
    own = text_config(config)
    return own, find_architecture(own)


def _gather(plan: Plan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plan; encoders are made of fp32 and bf16."""
    projections = {part for parts in plan.values() for part in parts if isinstance(part, Projected)}
    projected = project_all(projections, {name: _as_stored(weights[name]) for name in _names(projections)})

    def gather(source: Part) -> Tensor:
        if isinstance(source, int):
            return torch.zeros(source, **FP32)
        if isinstance(source, Rows):
            return weights[source.name][source.begin : source.end]
        if isinstance(source, Shifted):
            return weights[source.name].float() + source.by
        return _as_tensor(projected[source]) if isinstance(source, Projected) else weights[source]

    gathered: dict[str, Tensor] = {}
    for name, sources in plan.items():
        parts = [gather(source) for source in sources]
        wide = [part.float() if part.dtype in (torch.float16, torch.float64) else part for part in parts]
        gathered[name] = wide[0] if len(wide) == 1 else torch.cat(wide)
    return gathered


def _names(projections: Iterable[Projected]) -> set[str]:
    return {name for part in projections for name in part if isinstance(name, str)}


def _as_stored(tensor: Tensor) -> StoredTensor:
    """A weight as files have it, in fp32."""
    tensor = tensor.detach().float().contiguous()
    data = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return StoredTensor("F32", tuple(tensor.shape), memoryview(bytes(data)))


def _own_weights(model: nn.Module, config: Any, adapter: str | None) -> dict[str, Tensor]:
    """The weights of a model, under the names that they have without adapters, one of which is merged into them."""
    weights: dict[str, Tensor] = dict(model.state_dict())
    adapted = find_adapted(weights)
    index = number_of(config, adapter, bool(adapted))
    for name, parts in adapted.items():
        original, a, b = (weights.pop(part) for part in parts)
        weights[name] = original
        if index is not None:
            a, b = a[index].float(), b[index].float()
            first, second = (b, a) if b.shape[0] == original.shape[0] and a.shape[1] == original.shape[1] else (a, b)
            weights[name] = original.float() + first @ second * (config.lora_alpha / first.shape[1])
    return weights


def read_encoder(model: nn.Module, adapter: str | None = None) -> tuple[EncoderSpec, dict[str, Tensor]]:
    """The specification and weights of a model's encoder.

    Args:
        model: of the transformers package.
        adapter: of a model with LoRA adapters, the one that is merged into the weights; None: none of them.

    Raises:
        TypeError: ``model`` has no transformers configuration.
        ValueError: the architecture, or an option of it, is not supported; the message says what is.
    """
    model = _inner(model)
    config, architecture = _read_config(model)
    base = getattr(model, str(getattr(model, "base_model_prefix", "")) or "", model)
    if architecture.beside:
        base = getattr(base, architecture.base, base)
    weights = _own_weights(base, config, adapter)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    with _plain(model, base.named_modules()):
        spec, plan = describe_encoder(config, architecture.named_as(weights), shapes, type(model).__name__)
    return spec, _gather(plan, weights)


def read_head(model: nn.Module) -> tuple[HeadSpec, dict[str, Tensor]]:
    """The specification and weights of a model's head.

    Raises:
        TypeError: ``model`` has no transformers configuration.
        ValueError: the model has no head that is supported.
    """
    model = _inner(model)
    config, architecture = _read_config(model)
    # The class tells heads apart whose weights have the same names: those for texts and for tokens, say.
    ends = (suffix for base in type(model).__mro__ for suffix in HEAD_CLASSES if base.__name__.endswith(suffix))
    task = architecture.head_classes.get(type(model).__name__) or HEAD_CLASSES.get(next(ends, ""), "")
    weights: dict[str, Tensor] = dict(model.state_dict())
    base = str(getattr(model, "base_model_prefix", ""))
    if architecture.beside:
        base, inner = architecture.base, hasattr(model, architecture.base)
        weights = weights if inner else {f"{base}.{name}": tensor for name, tensor in weights.items()}
    if task in architecture.heads:
        names = architecture.heads[task]
        if names.bias in weights:
            weights.setdefault(f"{names.out}.bias", weights[names.bias])
    own = [(name, module) for name, module in model.named_modules() if name.split(".")[0] != base]
    with _plain(model, own):
        if not _has_head(architecture, task, weights, base):
            raise ValueError(
                f"{type(model).__name__} has no supported head; supported: "
                f"{', '.join(f'*{name}' for name in HEAD_CLASSES)} of {', '.join(ARCHITECTURES)}"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        spec, plan = describe_head(config, architecture, task, shapes, type(model).__name__, base)
    return spec, _gather(plan, weights)


def _has_head(architecture: Architecture, task: str, weights: Mapping[str, Tensor], base: str) -> bool:
    """Whether a model has the weights of a head, and no others outside of its encoder."""
    if task not in architecture.heads:
        return False
    names = architecture.heads[task]
    layers = head_layers(names, base).values()
    known = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    needed = {f"{name}.weight" for name in layers} if architecture.optional_biases else known
    inner = (f"{base}.", *architecture.beside)
    others = (name for name in weights if not name.startswith(inner) and name not in known)
    return needed <= weights.keys() and all(name == names.bias for name in others)


def encoder_in_folder(folder: str | os.PathLike[str], adapter: str | None = None) -> tuple[EncoderSpec, LazyWeights]:
    """The specification and weights of a folder's encoder; see :func:`read_folder`."""
    model = read_folder(folder, None, adapter)
    return model.spec, _FolderWeights(model, model.spec)


def head_in_folder(folder: str | os.PathLike[str], task: str = AUTO) -> tuple[HeadSpec, LazyWeights]:
    """The specification and weights of a folder's head; see :func:`read_folder`.

    Raises:
        ValueError: also where it has none.
    """
    model = read_folder(folder, task)
    if model.head is None:
        raise ValueError(f"{folder}: no supported head; supported: {', '.join(dict.fromkeys(HEAD_CLASSES.values()))}")
    return model.head, _FolderWeights(model, model.head)


class _FolderWeights(LazyWeights):
    """Weights in mapped files. What was read of them does not stay in memory."""

    def __init__(self, model: FolderModel, spec: EncoderSpec | HeadSpec) -> None:
        self._shapes = spec.shapes()
        self._parts = {name: model.tensors[name] for name in self._shapes}
        self._passing = torch.empty(0, **FP32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def outline(self, name: str) -> Tensor:
        kinds = {part.dtype for part in self._parts[name]}
        kind = torch.bfloat16 if kinds == {"BF16"} else torch.float32
        return torch.zeros((), dtype=kind, device="cpu").expand(self._shapes[name])

    def make(self, name: str, dtype: torch.dtype, passing: bool = False) -> Tensor:
        shape = self._shapes[name]
        if not passing:
            result = torch.empty(shape, dtype=dtype, device="cpu")
        else:
            # Blocks that come and go among blocks that stay leave as many holes in the heap.
            size = math.prod(shape)
            if self._passing.dtype != dtype or self._passing.numel() < size:
                self._passing = torch.empty(size, dtype=dtype, device="cpu")
            result = self._passing[:size].view(shape)
        flat, filled = result.view(-1), 0
        for part in self._parts[name]:
            for start in range(0, len(part.data), _PIECE_BYTES):
                # What is mapped cannot be written to, and torch warns of that: a copy of a piece at a time.
                piece = torch.frombuffer(bytearray(part.data[start : start + _PIECE_BYTES]), dtype=_DTYPES[part.dtype])
                flat[filled : filled + piece.numel()] = piece
                filled += piece.numel()
                part.forget()
        return result


def _as_tensor(part: StoredTensor) -> Tensor:
    tensor = torch.frombuffer(bytearray(part.data), dtype=_DTYPES[part.dtype]).view(part.shape)
    return tensor.float() if part.dtype == "F16" else tensor
