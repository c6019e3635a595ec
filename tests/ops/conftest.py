"""Fixtures of the tests that run in torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def generator(seed: int) -> Iterator[torch.Generator]:
    """A seeded generator; the global one is seeded, too, and the number of threads is put back."""
    threads = torch.get_num_threads()
    torch.manual_seed(seed)
    yield torch.Generator().manual_seed(seed)
    torch.set_num_threads(threads)
