"""What :class:`torch.utils.flop_counter.FlopCounterMode` counts for our ops: products and sums, as for PyTorch's own.

Like PyTorch's formulas, these leave out what is done element by element. PyTorch's module of formulas takes time to
import, seconds where it brings triton along; :func:`register_when_imported` adds ours once somebody imports it.
"""

from __future__ import annotations

import importlib
import itertools
import struct
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["register_when_imported"]

_COUNTER = "torch.utils.flop_counter"

_ops = torch.ops.torch_ext

# EncoderHeader of csrc/packing/packed_encoder.h, up to gated_ffn.
_HEADER = struct.Struct("=8sIIQ12IfBBB")


def _has_data(tensor: Tensor) -> bool:
    """Whether its values can be read: those of fake and meta tensors cannot."""
    return type(tensor) is Tensor and not tensor.is_meta


def _pairs(cu_seqlens: Tensor, tokens: int, window: int | None = None) -> int:
    """Pairs of tokens that see each other; without data, as if all were one sequence."""
    bounds = cu_seqlens.tolist() if _has_data(cu_seqlens) else [0, tokens]
    total = 0
    for begin, end in itertools.pairwise(bounds):
        length = end - begin
        reach = length if window is None else min(window, length)
        # All of them, less two triangles of those too far away.
        total += length**2 - max(0, length - reach - 1) * max(0, length - reach)
    return total


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
    **_: Any,
) -> int:
    return 4 * _pairs(cu_seqlens, qkv.shape[0], window) * (qkv.shape[1] // 3)


def _encoder_forward(
    input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None, packed: Tensor, **_: Any
) -> int:
    if not _has_data(packed):
        return 0  # Its sizes are in its data.
    fields = _HEADER.unpack(bytes(packed.flatten()[: _HEADER.size].tolist()))
    hidden, layers, _heads, wide, embedded = fields[4:9]
    window, global_every = fields[13:15]
    gated = fields[-1]
    tokens = input_ids.shape[0]
    weights = layers * (4 * hidden**2 + (3 if gated else 2) * hidden * wide)
    if embedded != hidden:
        weights += embedded * hidden
    local = sum(bool(window and index % global_every) for index in range(layers))
    pairs = (layers - local) * _pairs(cu_seqlens, tokens) + local * _pairs(cu_seqlens, tokens, window)
    return int(2 * tokens * weights + 4 * pairs * hidden)


def _register(counter: ModuleType) -> None:
    """Adds the formulas to PyTorch's, once."""
    if _ops.linear in counter.flop_registry:
        return
    register = counter.register_flop_formula
    # These get shapes ...
    register(_ops.linear)(_linear)
    register([_ops.matmul, _ops.bmm])(_matmul)
    register(_ops.addmm)(_addmm)
    # ... and these the tensors, whose values they need.
    register(_ops.varlen_attention, get_raw=True)(_varlen_attention)
    register(_ops.encoder_forward, get_raw=True)(_encoder_forward)


class _Finder(MetaPathFinder):
    """Finds PyTorch's module as the other finders do, and has the formulas added at the end of its import.

    It stays in ``sys.meta_path``: if it were removed there, an import in another thread could skip a finder.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's specification; None for any other module."""
        if name != _COUNTER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _then_register(spec.loader.exec_module)  # type: ignore[assignment, method-assign]
                return spec
        return None


def _then_register(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == _COUNTER:  # A loader may have several modules.
            _register(module)

    return exec_module


def register_when_imported() -> None:
    """Adds the formulas to PyTorch's: at once if its module is there, else at the end of its import."""
    sys.meta_path.insert(0, _Finder())
    if _COUNTER in sys.modules:
        _register(importlib.import_module(_COUNTER))  # Waits where another thread is still importing it.
