"""Weights in memory, as :meth:`torch_ext.runtime.Encoder.pack` takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch_ext.states import whole_number

__all__ = ["Tensor", "element_type", "shape_of"]

_ELEMENT_TYPES = {"F32": 0, "F16": 1, "BF16": 2, "I8": 3}  # As torch_ext_runtime.h numbers them.


class Tensor(NamedTuple):
    """A weight in memory, or a part of one.

    Attributes:
        dtype: ``F32``, ``F16``, ``BF16`` or ``I8``, as safetensors name them.
        shape: Its sizes.
        data: Any object with the buffer protocol that holds the elements, row after row.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Any


def element_type(weight: str, part: Tensor) -> int:
    """The number of its dtype in ``torch_ext_runtime.h``.

    Raises:
        TypeError: it is no Tensor.
        ValueError: its dtype is not known.
    """
    if not isinstance(part, Tensor):
        raise TypeError(f"Encoder: expected {weight} as a torch_ext.runtime.Tensor, got {type(part).__name__}")
    if part.dtype not in _ELEMENT_TYPES:
        known = ", ".join(_ELEMENT_TYPES)
        raise ValueError(f"Encoder: expected {weight} of one of the dtypes {known}, got {part.dtype!r}")
    return _ELEMENT_TYPES[part.dtype]


def shape_of(weight: str, part: Tensor) -> tuple[int, ...]:
    """Its shape.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not at least 1, or there are not 1 or 2 dimensions.
    """
    shape = tuple(whole_number(f"sizes of {weight}", size, 1) for size in part.shape)
    if len(shape) not in (1, 2):
        raise ValueError(f"Encoder: expected {weight} with 1 or 2 dimensions, got {list(shape)}")
    return shape
