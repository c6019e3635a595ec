"""Optimized models and encoders in processes that are started by spawn and forkserver."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from tests.ops import other_process, reference
from torch_ext import Encoder, EncoderSpec, Head, HeadSpec

Calls = list[tuple[Callable[..., Tensor], tuple[Any, ...]]]

SPEC = EncoderSpec("bert", 16, 2, 2, 24, "gelu", 12, 0, 1e-5, 30, 2)


class Subclass(torch_ext.PackedLinear):
    """Of a user."""


class Tied(nn.Module):
    """A head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.head = nn.Linear(16, 30)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


@pytest.fixture
def calls(generator: torch.Generator) -> Calls:
    """One call of everything that can be sent, with its arguments."""
    x = torch.randn(3, 16, generator=generator)
    ids, bounds = torch.randint(0, 30, (7,), generator=generator), reference.cu_seqlens([4, 3])
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in SPEC.shapes().items()}
    head_spec = HeadSpec("fill-mask", 16, "gelu", True, 1e-5, 30)
    head_weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in head_spec.shapes().items()}
    linear = nn.Linear(16, 8)
    shared = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    shared[2].weight = shared[0].weight
    layers: Calls = [(Subclass(linear.weight, linear.bias), (x,)), (torch_ext.optimize(Tied()), (ids,))]
    layers += [(torch_ext.optimize(nn.Sequential(nn.Linear(16, 9), nn.Linear(9, 5)), "int8"), (x,))]
    layers += [(torch_ext.optimize(shared).half(), (x.half(),))]
    encoders: Calls = [(Encoder(SPEC, weights, dtype), (ids, bounds)) for dtype in ("bf16", "int8", "fp32")]
    return [*layers, *encoders, (Head(head_spec, head_weights), (x,))]


@pytest.fixture
def sharing_strategy() -> Iterator[Callable[[str], None]]:
    """A function that sets how torch shares memory, for one test."""
    before = torch.multiprocessing.get_sharing_strategy()
    yield torch.multiprocessing.set_sharing_strategy
    torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.parametrize(
    ("module", "method", "strategy"),
    [
        (torch.multiprocessing, "spawn", "file_descriptor"),
        (torch.multiprocessing, "forkserver", "file_system"),
        (multiprocessing, "spawn", "file_system"),
        (multiprocessing, "forkserver", "file_descriptor"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_results_are_equal_in_another_process(
    calls: Calls, module: Any, method: str, strategy: str, sharing_strategy: Callable[[str], None]
) -> None:
    sharing_strategy(strategy)
    torch.set_num_threads(1)  # As in the other process: results may differ in rounding by it.
    with torch.inference_mode():
        expected = [function(*args).double().tolist() for function, args in calls]
    context = module.get_context(method)
    results = context.Queue()
    process = context.Process(target=other_process.answer, args=(results, calls), daemon=True)
    process.start()
    try:
        assert results.get(timeout=200) == expected
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
    # What was sent computes as before, from memory that is shared now.
    with torch.inference_mode():
        assert [function(*args).double().tolist() for function, args in calls] == expected
