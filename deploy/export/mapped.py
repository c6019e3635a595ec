"""Weights of a model in a file instead of in memory, and memory that goes back when a stage is over."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from deploy.heap import M_MMAP_THRESHOLD, give_back, set_thresholds

__all__ = ["Mapped", "keep_little", "map_weights"]

_ALIGNMENT = 64
_LARGE_BYTES = 1 << 20
_SMALL_BYTES = 16 << 20
"""Weights of which nothing is given back: a collection takes up to 0.3 s where there are many objects."""


class Mapped:
    """The file that the weights of a model are in."""

    def __init__(self, model: Any = None, pages: mmap.mmap | None = None) -> None:
        self._model = model
        self._pages = pages
        self._small = pages is None or len(pages) < _SMALL_BYTES

    def forget(self) -> None:
        """Takes the pages out of memory, to be read again when they are needed, and what is not used any more."""
        if self._pages is not None:
            # The mapping is private, and nobody writes to weights.
            self._pages.madvise(mmap.MADV_DONTNEED)
        if not self._small:
            give_back()

    def drop(self) -> None:
        """Takes the weights from the model, so that the file goes when nobody else reads them."""
        if self._model is not None:
            for parameter in self._model.parameters():
                parameter.data = parameter.data.new_empty(0)
        self._model = self._pages = None


def map_weights(model: Any, path: Path) -> Mapped:
    """Moves the parameters of a model of torch into a file, which they are read from when they are needed.

    Args:
        model: The model, in fp32, of which every parameter stays what it is.
        path: The file to write. It has no name afterwards, and goes with the model.

    Returns:
        The file.

    Raises:
        OSError: The file cannot be written.
    """
    import torch

    # Of tied weights there is one parameter, but some models make views of one another.
    parameters = list(model.parameters())
    places: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}
    keys = []
    try:
        with path.open("w+b") as file:
            for parameter in parameters:
                key = (parameter.data_ptr(), tuple(parameter.shape), tuple(parameter.stride()))
                keys.append(key)
                if key not in places and parameter.numel():
                    file.write(bytes(-file.tell() % _ALIGNMENT))
                    places[key] = file.tell()
                    file.write(memoryview(parameter.detach().contiguous().numpy()).cast("B"))
            file.flush()
            if not places:
                return Mapped(model)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    finally:
        path.unlink(missing_ok=True)
    for parameter, key in zip(parameters, keys, strict=True):
        if key in places:
            flat = torch.frombuffer(pages, dtype=parameter.dtype, count=parameter.numel(), offset=places[key])
            parameter.data = flat.view(parameter.shape)
    return Mapped(model, pages)


def keep_little() -> None:
    """Lets the C library return large pieces to the system as soon as they are freed.

    By itself it keeps pieces of up to 32 MiB for later, in a heap that others fill with holes: the weights of a small
    model several times.
    """
    set_thresholds({M_MMAP_THRESHOLD: _LARGE_BYTES})
