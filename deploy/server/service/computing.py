"""From the token ids of a request to results: through the queue, or from a cache of what was computed before."""

from __future__ import annotations

from typing import Any, Protocol

from ..limits.callers import Caller
from ..metrics import Metrics
from .batching import Batcher
from .work import Work

__all__ = ["Compute", "computing"]


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


def computing(batcher: Batcher, metrics: Metrics, cache_mb: int | None) -> Compute:
    """What computes the texts of requests.

    Args:
        batcher: The queue.
        metrics: Told of the cache.
        cache_mb: Memory of the cache; None: there is none.
    """
    if cache_mb is None:
        return batcher.compute
    from .cache import Cache  # For those who ask for it.

    cache = Cache(batcher, cache_mb << 20, metrics.cached)
    metrics.cache(lambda: cache.held_bytes)
    return cache.compute
