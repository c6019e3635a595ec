"""LoRA adapters inside a model (Jina v3): two small matrices for each task beside every weight, merged into it here."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch_ext.encoder.huggingface.safetensors import StoredTensor

__all__ = ["Adapted", "find_adapted", "merge", "number_of"]

_MARK = ".parametrizations.weight."


class Adapted(NamedTuple):
    """Names of a weight's parts.

    Attributes:
        original: the weight, ``[N, K]``.
        a: ``[tasks, R, K]``; of a table of embeddings ``[tasks, N, R]``.
        b: ``[tasks, N, R]``; of a table of embeddings ``[tasks, R, K]``.
    """

    original: str
    a: str
    b: str


def find_adapted(names: Iterable[str]) -> dict[str, Adapted]:
    """The weights with adapters, by the name that they have without."""
    owners = (name.removesuffix(f"{_MARK}original") for name in names if name.endswith(f"{_MARK}original"))
    parts = ("original", "0.lora_A", "0.lora_B")
    return {f"{owner}.weight": Adapted(*(f"{owner}{_MARK}{part}" for part in parts)) for owner in owners}


def number_of(config: Any, adapter: str | None, has_adapters: bool) -> int | None:
    """The number of an adapter in a model; None for none.

    Raises:
        ValueError: the model has no such adapter.
    """
    if adapter is None:
        return None
    known = getattr(config, "lora_adaptations", None)
    if not has_adapters or not isinstance(known, list) or not known:
        raise ValueError(f"expected a model with adapters for adapter={adapter!r:.80}, this one has none")
    if adapter not in known:
        raise ValueError(f"unknown adapter {adapter!r:.80}; known: {', '.join(map(str, known))}")
    return known.index(adapter)


def merge(config: Any, stored: Mapping[str, StoredTensor], adapter: str | None) -> dict[str, StoredTensor]:
    """A folder's weights under the names that they have without adapters, one of which is merged into them.

    Args:
        config: has the configuration's values as attributes.
        stored: as the file has them.
        adapter: one of ``lora_adaptations``, or None: the weights as they are without an adapter.

    Returns:
        The weights, those that an adapter changes in fp32.

    Raises:
        ValueError: there is no such adapter, or shapes do not fit each other.
    """
    adapted = find_adapted(stored)
    index = number_of(config, adapter, bool(adapted))
    if not adapted:
        return dict(stored)
    inner = {name for parts in adapted.values() for name in parts}
    weights = {name: tensor for name, tensor in stored.items() if name not in inner}
    for name, parts in adapted.items():
        original = stored[parts.original]
        weights[name] = original
        if index is None:
            continue
        if parts.a not in stored or parts.b not in stored:
            raise ValueError(f"expected {parts.a} and {parts.b} beside {parts.original}")
        a, b = (_of_task(part, stored[part], index) for part in (parts.a, parts.b))
        weights[name] = _sum(name, original, a, b, float(getattr(config, "lora_alpha", 1)))
    return weights


def _of_task(name: str, tensor: StoredTensor, index: int) -> StoredTensor:
    if len(tensor.shape) != 3 or tensor.shape[0] <= index:
        raise ValueError(f"expected {name} with 3 dimensions, one matrix for each adapter, got {list(tensor.shape)}")
    part = tensor.rows(index, index + 1)
    return StoredTensor(part.dtype, part.shape[1:], part.data)


def _sum(name: str, original: StoredTensor, a: StoredTensor, b: StoredTensor, alpha: float) -> StoredTensor:
    """``original + alpha / rank * product``, in fp32."""
    from torch_ext import _runtime

    rows, columns = original.shape
    if a.shape[1] == columns and b.shape == (rows, a.shape[0]):
        left, right = b, a
    elif a.shape[0] == rows and b.shape == (a.shape[1], columns):
        left, right = a, b
    else:
        raise ValueError(f"{name}: adapters {list(a.shape)} and {list(b.shape)} do not fit {list(original.shape)}")
    rank = left.shape[1]
    numbers = right.shifted(0.0).data.cast("f")
    factor = alpha / rank
    turned = array("f", [factor * numbers[row * columns + column] for column in range(columns) for row in range(rank)])
    tensors = [
        ("table", *_described(left)),
        ("weight", 0, (columns, rank), turned, False),
        ("residual", *_described(original)),
    ]
    result = _runtime.project_rows(tensors, 0.0)
    return StoredTensor("F32", original.shape, memoryview(result).cast("B"))


def _described(tensor: StoredTensor) -> tuple[int, tuple[int, ...], Any, bool]:
    return {"F32": 0, "F16": 1, "BF16": 2}[tensor.dtype], tensor.shape, tensor.data, False
