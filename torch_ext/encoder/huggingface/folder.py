"""Encoders and heads out of a folder that ``save_pretrained`` wrote, without torch and without transformers."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch_ext.encoder.huggingface.adapters import merge
from torch_ext.encoder.huggingface.architecture import Architecture
from torch_ext.encoder.huggingface.describe import (
    Plan,
    Projected,
    Rows,
    Shifted,
    describe_encoder,
    describe_head,
    head_layers,
)
from torch_ext.encoder.huggingface.projection import project_all
from torch_ext.encoder.huggingface.safetensors import (
    StoredTensor,
    find_weights,
    map_weights,
    parse_object,
)
from torch_ext.encoder.huggingface.stages import read_stages
from torch_ext.encoder.huggingface.table import HEAD_CLASSES, find_architecture, text_values
from torch_ext.encoder.spec import EncoderSpec, HeadSpec

__all__ = ["AUTO", "FolderModel", "head_task", "layers_left_out", "read_config", "read_folder"]

AUTO = "auto"
"""The head that ``config.json`` names, if the weights have it."""

_FLOATS = ("F32", "F16", "BF16")


class FolderModel(NamedTuple):
    """What a folder holds.

    Attributes:
        spec: what its encoder computes.
        head: what its head computes, or None.
        tensors: mapped weights by the names of ``EncoderSpec.shapes()`` and ``HeadSpec.shapes()``: one or several
            parts, which follow one another along the first dimension.
    """

    spec: EncoderSpec
    head: HeadSpec | None
    tensors: dict[str, list[StoredTensor]]


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``config.json``.

    Raises:
        FileNotFoundError: there is no such folder, or it is not one of a model.
        ValueError: the file is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        kind = "not a model folder (no config.json)" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {kind}; pass a folder that save_pretrained wrote")
    config = parse_object(path.read_bytes(), str(path))
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path}: expected a JSON object with model_type, a string")
    return config


def head_task(config: Mapping[str, Any]) -> str | None:
    """The task of the head that ``config.json`` names under ``architectures``, or None."""
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        for suffix, task in HEAD_CLASSES.items():
            if isinstance(name, str) and name.endswith(suffix):
                return task
    return None


def read_folder(
    folder: str | os.PathLike[str],
    head: str | None = AUTO,
    adapter: str | None = None,
    stages: Sequence[tuple[str | os.PathLike[str], str]] = (),
) -> FolderModel:
    """Reads a folder, and checks all that its files say before a weight is packed.

    Args:
        folder: with ``config.json``, and ``model.safetensors`` or the index of several files. Weights in fp32, fp16 or
            bf16, with the prefix of the architecture (``bert.``) or without.
        head: ``auto``; the task of a head that has to be there: ``text-classification``, ``token-classification``,
            ``question-answering`` or ``fill-mask``; or None: no head.
        adapter: of a model with LoRA adapters (Jina v3), the one that is merged into the weights; None: none of them.
        stages: linear stages behind the pooling, which take the place of a head: folders of Dense modules of
            sentence-transformers, and their activations.

    Warns:
        UserWarning: ``config.json`` counts fewer layers than there are weights of; the last ones are left out.

    Raises:
        FileNotFoundError: there is no such folder, no configuration, no weights, or not all files of them.
        ValueError: the architecture is not supported; a file is damaged, or holds code; a weight is missing, of another
            shape, not finite, or is not what the architecture has.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    config = text_values(read_config(folder))
    path = find_weights(folder)
    stored = map_weights(path)
    try:
        stored = merge(SimpleNamespace(**config), stored, adapter)
        model = _read(
            config,
            {_newer_name(name, stored): tensor for name, tensor in stored.items()},
            None if stages else head,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not stages:
        return model
    spec, tensors = read_stages(stages, model.spec.hidden_size)
    for name, parts in tensors.items():
        _check(name, parts[0], spec.shapes()[name])
        if not parts[0].is_finite():
            raise ValueError(f"{folder}: expected finite weights of Dense modules, got NaN or infinity in {name}")
    return FolderModel(model.spec, spec, {**model.tensors, **tensors})


def _newer_name(name: str, stored: Mapping[str, StoredTensor]) -> str:
    """Norms have a weight and a bias; those of old files, a gamma and a beta."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old) and name.removesuffix(old) + new not in stored:
            return name.removesuffix(old) + new
    return name


def _read(config: dict[str, Any], stored: Mapping[str, StoredTensor], head: str | None) -> FolderModel:
    values = SimpleNamespace(**config)
    architecture = find_architecture(values).named_as(stored)
    values = SimpleNamespace(**architecture.complete(config))
    base = f"{architecture.base}."
    prefix = base if f"{base}{architecture.word}.weight" in stored else ""
    inner = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    outer = {name: tensor for name, tensor in stored.items() if not prefix or not name.startswith(prefix)}
    # Without a prefix, the weights of heads are beside those of the encoder.
    parts = {name.partition(".")[0] for name in _own_names(architecture)}
    foreign = [name for name in inner if name.partition(".")[0] not in parts]
    foreign += _beyond(values, architecture.of(values), inner)
    spec, plan = describe_encoder(
        values, architecture, {name: tensor.shape for name, tensor in inner.items()}, "the file", foreign
    )
    tensors = _tensors(plan, inner, spec)
    task = _wanted(config, architecture, head)
    if task is None:
        return FolderModel(spec, None, tensors)
    weights = {**{f"{base}{name}": tensor for name, tensor in inner.items()}, **outer}
    names = architecture.heads[task]
    layers = head_layers(names, architecture.base)
    own = {name for part, name in layers.items() if not name.startswith(base)} or set(layers.values())
    if names.bias is not None and f"{names.out}.bias" not in weights and names.bias in weights:
        weights[f"{names.out}.bias"] = weights[names.bias]
    if head == AUTO and not any(f"{name}.{kind}" in weights for name in own for kind in ("weight", "bias")):
        return FolderModel(spec, None, tensors)
    if names.tied and config.get("tie_word_embeddings", True) is not False:
        weights[f"{names.out}.weight"] = inner[f"{architecture.word}.weight"]
    head_spec, head_plan = describe_head(
        values,
        architecture,
        task,
        {name: tensor.shape for name, tensor in weights.items()},
        "the file",
        architecture.base,
    )
    return FolderModel(spec, head_spec, {**tensors, **_tensors(head_plan, weights, head_spec)})


def layers_left_out(counted: int, found: int) -> str:
    """What to tell of a folder whose ``config.json`` counts fewer layers than there are weights of.

    Args:
        counted: layers by ``config.json``.
        found: layers in the weights.
    """
    return f"layers: {counted} in config.json, {found} in the weights; the last ones are left out"


def _beyond(config: Any, architecture: Architecture, names: Collection[str]) -> list[str]:
    """Weights of layers that the configuration does not count; they are left out, as transformers does."""
    before, numbered, _ = architecture.layer.partition("{}")
    count = architecture.whole(config, "num_layers")
    layers = {name: re.match(re.escape(before) + r"(\d+)\.", name) for name in names if numbered}
    numbers = {name: int(found[1]) for name, found in layers.items() if found is not None}
    beyond = [name for name, number in numbers.items() if number >= count]
    if beyond and count > 0:
        warnings.warn(layers_left_out(count, max(numbers.values()) + 1), stacklevel=2)
    return beyond


def _own_names(architecture: Architecture) -> list[str]:
    """The names of an encoder's weights, or how they begin."""
    names = (architecture.layer, architecture.word, architecture.embedding_norm, architecture.projection)
    more = (architecture.relative_bias, architecture.final_norm)
    return [name for name in (*names, *more) if name is not None]


def _wanted(config: Mapping[str, Any], architecture: Architecture, head: str | None) -> str | None:
    if head is None:
        return None
    if head == AUTO:
        classes = config.get("architectures")
        named = (architecture.head_classes.get(str(name)) for name in (classes if isinstance(classes, list) else ()))
        task = next(filter(None, named), None) or head_task(config)
        return task if task in architecture.heads else None
    if head not in architecture.heads:
        known = ", ".join((*architecture.heads, repr(AUTO)))
        raise ValueError(f"unknown head {head!r:.80}; known: {known} for what config.json names, and None")
    return head


def _tensors(
    plan: Plan, weights: Mapping[str, StoredTensor], spec: EncoderSpec | HeadSpec
) -> dict[str, list[StoredTensor]]:
    """The weights of a plan, each checked: shape, dtype, and that all of its elements are finite."""
    shapes = spec.shapes()
    tensors: dict[str, list[StoredTensor]] = {}
    finite: set[str] = set()

    def sound(name: str, shape: tuple[int, ...]) -> StoredTensor:
        tensor = weights[name]
        _check(name, tensor, shape)
        if name not in finite and not tensor.is_finite():
            raise ValueError(f"expected finite weights, got NaN or infinity in {name}")
        finite.add(name)  # Layers may share weights.
        return tensor

    projections: dict[str, Projected] = {}
    for name, sources in plan.items():
        rows, *columns = shapes[name]
        for source in sources:
            if isinstance(source, int):
                part = StoredTensor("F32", (source,), memoryview(bytes(4 * source)))
            elif isinstance(source, Rows):
                part = sound(source.name, (weights[source.name].shape[0], *columns)).rows(source.begin, source.end)
            elif isinstance(source, Projected):
                _check_projection(source, (rows, columns[0]), sound)
                projections[name] = source
                continue
            elif isinstance(source, Shifted):
                part = sound(source.name, (rows,)).shifted(source.by)
            else:
                part = sound(
                    source, (_part_rows(spec, name, len(tensors.get(name, ())), rows // len(sources)), *columns)
                )
            tensors.setdefault(name, []).append(part)
    projected = project_all(projections.values(), weights)
    return {**tensors, **{name: [projected[source]] for name, source in projections.items()}}


def _part_rows(spec: EncoderSpec | HeadSpec, name: str, index: int, equal: int) -> int:
    """Rows of one part of a weight."""
    if isinstance(spec, EncoderSpec) and spec.num_kv_heads and ".attention.qkv." in name:
        return (spec.kv_heads if index else spec.num_heads) * spec.size_of_heads
    return equal


def _check_projection(
    projection: Projected, shape: tuple[int, int], sound: Callable[[str, tuple[int, ...]], StoredTensor]
) -> None:
    rows, hidden = shape
    sound(projection.table, (rows, hidden))
    sound(projection.weight, (hidden, hidden))
    for vector in (projection.norm_weight, projection.norm_bias, projection.bias):
        if vector is not None:
            sound(vector, (hidden,))


def _check(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"expected {name} {list(shape)}, as config.json has it, got {list(tensor.shape)}")
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"expected {name} of one of the dtypes {', '.join(_FLOATS)}, got {tensor.dtype:.20}")
