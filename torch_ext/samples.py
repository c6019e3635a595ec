"""Inputs that a model is measured on, and what counts of its outputs, for :mod:`torch_ext.sensitivity`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Sample", "output_rows"]

Sample = Mapping[str, Any] | Tensor | Sequence[Any] | Callable[[nn.Module], Any]
"""One input of a model: keyword arguments, one positional argument, several, or a function that calls the model."""

_OUTPUTS = ("logits", "last_hidden_state", "scores", "sentence_embedding", "token_embeddings")
"""What is compared, by name: the first that an output has. The last three are those of sentence-transformers."""


def output_rows(model: nn.Module, sample: Sample) -> Tensor:
    """What a model says to one input, as rows that can be compared.

    Args:
        model: the model; it is called under ``torch.inference_mode()``.
        sample: see :data:`Sample`. Models of sentence-transformers, like any ``nn.Sequential``, take a dictionary as
            it is, unless it names their argument, ``input``. Where a dictionary holds an ``attention_mask`` ``[B, T]``
            and the output is ``[B, T, width]``, padding is left out. A function returns what is to be compared, such as
            pooled embeddings: a tensor, dense or sparse, an array of numpy, or a list of either, each ``[rows, width]``
            or ``[width]``.

    Returns:
        fp32 ``[rows, width]``: the output itself if it is a tensor, else its ``start_logits`` and ``end_logits``,
        ``logits``, ``last_hidden_state``, ``scores``, ``sentence_embedding`` or ``token_embeddings``, else its first
        element.

    Raises:
        TypeError: ``sample`` is none of these, or there is no floating-point tensor in the output.
        ValueError: the output has no rows.
    """
    mask = None
    with torch.inference_mode():
        if isinstance(sample, Mapping):
            # An nn.Sequential has one argument, `input`. Modules of sentence-transformers write into dictionaries.
            whole = isinstance(model, nn.Sequential) and "input" not in sample
            output = model(dict(sample)) if whole else model(**sample)
            mask = sample.get("attention_mask")
        elif isinstance(sample, Tensor):
            output = model(sample)
        elif _is_text(sample):
            raise TypeError(
                f"sample: expected inputs of {type(model).__name__}, got text: pass tokens, or a function that calls "
                "the model, such as [lambda model: model.encode(texts)] with sentence-transformers"
            )
        elif isinstance(sample, Sequence):
            output = model(*sample)
        elif callable(sample):
            output = _stacked(sample(model))
        else:
            raise TypeError(
                "sample: expected keyword arguments, a tensor, positional arguments or a function of the model, got "
                f"{type(sample).__name__}"
            )
        output = _compared(output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0:
        got = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"sample: expected the model to return rows of floating-point numbers, got {got}")
    rows = output.float()
    if isinstance(mask, Tensor) and mask.shape == rows.shape[:-1]:
        rows = rows[mask != 0]
    rows = rows.reshape(-1, rows.shape[-1]).clone()
    if not rows.numel():
        raise ValueError(f"sample: expected output with at least one row, got {list(output.shape)}")
    return rows


def _is_text(sample: Any) -> bool:
    """Whether it is a text, or a list of texts or pairs; a tuple may be arguments."""
    if isinstance(sample, list) and sample:
        return all(isinstance(text, str) for part in sample for text in (part if _is_pair(part) else [part]))
    return isinstance(sample, str)


def _is_pair(part: Any) -> bool:
    return isinstance(part, (list, tuple)) and len(part) == 2


def _compared(output: Any) -> Any:
    """The part of an output that counts: the first of :data:`_OUTPUTS` that it has, or all of it."""

    def field(name: str) -> Any:
        return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)

    start, end = field("start_logits"), field("end_logits")
    if start is not None and end is not None:
        return torch.cat((start, end))
    return next((part for part in map(field, _OUTPUTS) if part is not None), output)


def _stacked(output: Any) -> Any:
    """What a function returned, as one dense tensor where it is arrays, sparse tensors, or a list of them."""
    if isinstance(output, (list, tuple)):
        parts = [_stacked(part) for part in output]
        if parts and all(isinstance(part, Tensor) and 0 < part.dim() < 3 for part in parts):
            rows = [part.reshape(-1, part.shape[-1]) for part in parts]
            if len({part.shape[1] for part in rows}) == 1:
                return torch.cat(rows)
        return output
    if isinstance(output, Tensor):
        return output if output.layout is torch.strided else output.to_dense()
    return torch.as_tensor(output) if hasattr(output, "__array_interface__") else output
