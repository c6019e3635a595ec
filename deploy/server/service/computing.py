"""From the token ids of a request to results: through the queue, or from a cache of what was computed before."""

from __future__ import annotations

import asyncio
import functools
from typing import Any, Protocol

from ..limits.callers import Caller, CallerLeft
from ..metrics import Metrics
from .batching import Batcher
from .work import Work

__all__ = ["Compute", "compute", "computing"]


class Compute(Protocol):
    """Computes the texts of a request; sets its times."""

    async def __call__(self, work: Work, caller: Caller) -> list[Any]:
        """Waits for the results.

        Args:
            work: The texts; nobody else has it yet.
            caller: Who waits.

        Raises:
            ApiError: It is refused, or failed.
            CallerLeft: The client has left.
        """
        ...


async def compute(batcher: Batcher, work: Work, caller: Caller) -> list[Any]:
    """Computes all texts; see `Compute`."""
    batcher.submit(work)
    caller.on_leave = functools.partial(batcher.abandon, work)
    try:
        return await work.future
    except asyncio.CancelledError:
        if caller.gone:
            raise CallerLeft from None
        batcher.abandon(work)
        raise


def computing(batcher: Batcher, metrics: Metrics, cache_mb: int | None) -> Compute:
    """What computes the texts of requests.

    Args:
        batcher: The queue.
        metrics: Told of the cache.
        cache_mb: Memory of the cache; None: there is none.
    """
    if cache_mb is None:
        return functools.partial(compute, batcher)
    from .cache import Cache  # For those who ask for it.

    cache = Cache(batcher, cache_mb << 20, metrics.cached)
    metrics.cache(lambda: cache.held_bytes)
    return cache.compute
