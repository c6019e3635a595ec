"""Times of several ways to do the same work, taken in turns: what else the machine does then hits all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Times", "interleaved", "latencies"]

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Times of one candidate.

    Attributes:
        samples_s: seconds of one call, each an average over one sample.
    """

    samples_s: Sequence[float]

    @property
    def median_s(self) -> float:
        """The median sample."""
        return statistics.median(self.samples_s)

    @property
    def least_s(self) -> float:
        """The fastest sample."""
        return min(self.samples_s)

    def percentile_s(self, percent: float) -> float:
        """The sample that so many per cent of all do not exceed."""
        ordered = sorted(self.samples_s)
        return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def _sample(call: Call, repetitions: int) -> float:
    begun = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - begun) / repetitions


def _repetitions(call: Call, sample_s: float) -> int:
    """How many calls fill a sample; they warm the call up, too."""
    count = 1
    while True:
        took = _sample(call, count)
        if took * count >= sample_s or count >= 1 << 20:
            return max(1, round(sample_s / took)) if took > 0 else count
        count *= 4


def interleaved(
    calls: Mapping[str, Call], rounds: int, sample_s: float = 0.0, limit_s: float = math.inf
) -> dict[str, Times]:
    """Times calls round robin: in every round each is sampled once, each round beginning with another.

    Args:
        calls: what to time, by name; each has run before if its first call is slower.
        rounds: samples of each.
        sample_s: each sample repeats its call for about this time; 0 means one call.
        limit_s: time of each call; one that has used it up gets no more samples, but each has at least one.
    """
    repetitions = {name: _repetitions(call, sample_s) if sample_s else 1 for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            if sum(samples[name]) * repetitions[name] < limit_s:
                samples[name].append(_sample(calls[name], repetitions[name]))
    return {name: Times(found) for name, found in samples.items()}


def latencies(
    calls: Mapping[str, Call], rounds: int, block: int, warm_up: int = 5, limit_s: float = math.inf
) -> dict[str, Times]:
    """Times single calls, in blocks that take turns.

    Args:
        calls: what to time, by name.
        rounds: blocks of each.
        block: calls that are timed in each block.
        warm_up: calls before them that are not: threads of the candidate before may still look for work.
        limit_s: time of each call; the blocks of one that would take longer are smaller, down to one call in all.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shares = dict.fromkeys(calls, 1.0)
    if limit_s < math.inf:
        shares = {name: limit_s / (rounds * (block + warm_up) * _sample(call, 1)) for name, call in calls.items()}
    blocks = {name: max(1, min(block, int(share * block))) for name, share in shares.items()}
    warm_ups = {name: min(warm_up, int(share * warm_up)) for name, share in shares.items()}
    names = list(calls)
    for number in range(rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            if sum(samples[name]) >= limit_s:
                continue
            for _ in range(warm_ups[name]):
                calls[name]()
            samples[name] += [_sample(calls[name], 1) for _ in range(blocks[name])]
    return {name: Times(found) for name, found in samples.items()}
