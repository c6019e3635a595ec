"""What tests run in another process: a module that it can import, without pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def answer(results: Any, calls: list[tuple[Callable[..., torch.Tensor], tuple[Any, ...]]]) -> None:
    """Put the results of calls into a queue: lists of numbers, or the error as text."""
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            results.put([function(*args).double().tolist() for function, args in calls])
    except Exception as error:
        results.put(repr(error))
        raise
