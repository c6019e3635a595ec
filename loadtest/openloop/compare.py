"""Two runs, one question: better, worse, or noise? Decided by a bootstrap over blocks of time.

Requests that are close in time share a queue: they are not independent, and a test that takes them so finds differences
everywhere. Blocks of some seconds nearly are. Each resample draws whole blocks, with replacement.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.options import CannotStartError

from .record import percentile_of

__all__ = ["FEWEST_BLOCKS", "Change", "blocks_of", "changes_data", "compare_runs", "describe_changes", "overall"]

FEWEST_BLOCKS = 8
_MOST_BLOCKS = 60
_RESAMPLES = 1000
_COARSE = math.log(1.1)
"""A change for the worse that noise hides is said from here on, as a logarithm."""
_SAME_SETTINGS = (
    *("task", "inputs_per_request", "lengths", "texts", "text_count", "max_chars", "encoding_format", "top_k"),
    *("shape", "process", "rate", "rate_to", "steps", "spike_every_s", "spike_s", "day_s", "count"),
    *("trace", "trace_speed", "request_timeout_s"),
)
_SAME_LENGTH = ("steps", "spike", "diurnal")
"""Shapes whose load depends on the length of the run."""


_NOTHING: dict[str, Any] = {"arrivals": 0, "good": 0, "errors": 0, "refused": 0, "latency": []}
"""A second in which nothing was to start."""


@dataclass
class Block:
    """Requests of some neighbouring seconds.

    Attributes:
        arrivals: How many were to start.
        good: Of these, answered rightly.
        errors: Failed, those refused with status 429 included.
        latency: Durations of the good ones, by bucket.
    """

    arrivals: int
    good: int
    errors: int
    latency: Counter[int]


@dataclass(frozen=True)
class Change:
    """How one figure of a run differs from that of another.

    Attributes:
        name: Of the figure.
        before: In the first run; None if it has none.
        after: In the second.
        low: Lowest difference that is plausible: of logarithms for durations and rates, of parts for error rates.
        high: Highest one.
        verdict: ``better``, ``worse`` or ``noise``.
    """

    name: str
    before: float | None
    after: float | None
    low: float
    high: float
    verdict: str


def blocks_of(result: Mapping[str, Any], name: str = "run") -> list[Block]:
    """Cuts a run into blocks of whole seconds after its warm-up: as many as there are, 60 at most.

    Args:
        result: Of a run.
        name: How messages call it.

    Raises:
        CannotStartError: It is too short.
    """
    first = math.ceil(result["settings"]["warm_up_s"])
    by_second = {second["second"]: second for second in result["series"]}
    numbers = range(first, first + math.floor(result["summary"]["measured_s"]))
    seconds = [by_second.get(number, _NOTHING) for number in numbers]
    length = max(1, math.ceil(len(seconds) / _MOST_BLOCKS))
    found = []
    # A last block that is shorter than the others is left out.
    for start in range(0, len(seconds) - length + 1, length):
        latency: Counter[int] = Counter()
        group = seconds[start : start + length]
        for second in group:
            latency.update({int(bucket): int(count) for bucket, count in second["latency"]})
        arrivals, good = (sum(second[what] for second in group) for what in ("arrivals", "good"))
        found.append(Block(arrivals, good, sum(second["errors"] + second["refused"] for second in group), latency))
    if len(found) < FEWEST_BLOCKS:
        raise CannotStartError(
            f"{name}: expected at least {FEWEST_BLOCKS} seconds after the warm-up, got {len(found)}: make runs longer"
        )
    return found


Figure = Callable[[Block], "float | None"]


def _whole(blocks: Sequence[Block], times: Mapping[int, int] | None = None) -> Block:
    """All blocks in one, each as often as `times` says by its place; once without."""
    latency: dict[int, int] = {}
    arrivals = good = errors = 0
    for place, count in times.items() if times is not None else ((place, 1) for place in range(len(blocks))):
        block = blocks[place]
        arrivals += count * block.arrivals
        good += count * block.good
        errors += count * block.errors
        for bucket, number in block.latency.items():
            latency[bucket] = latency.get(bucket, 0) + count * number
    return Block(arrivals, good, errors, Counter(latency))


def _logarithm(value: float | None) -> float | None:
    return math.log(value) if value else None


_FIGURES: dict[str, tuple[Figure, bool, bool]] = {
    "p50_ms": (lambda block: percentile_of(block.latency, 0.5), True, False),
    "p95_ms": (lambda block: percentile_of(block.latency, 0.95), True, False),
    "p99_ms": (lambda block: percentile_of(block.latency, 0.99), True, False),
    "answered_rate": (lambda block: block.good / block.arrivals if block.arrivals else None, False, True),
    "error_rate": (lambda block: block.errors / block.arrivals if block.arrivals else None, False, False),
}
"""By name: how a figure is computed, whether ratios count rather than differences, and whether more is better."""


def _drawn(blocks: Sequence[Block], rng: random.Random, resamples: int) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = {name: [] for name in _FIGURES}
    for _ in range(resamples):
        whole = _whole(blocks, Counter(rng.choices(range(len(blocks)), k=len(blocks))))
        for name, (figure, ratio, _) in _FIGURES.items():
            found[name].append(_logarithm(figure(whole)) if ratio else figure(whole))
    return found


def _check_alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    for result, name in ((first, "the first"), (second, "the second")):
        if "series" not in result:
            raise CannotStartError(f"{name} result is a search: expected two files of python -m loadtest run")
        if result["void"]:
            raise CannotStartError(f"{name} run is void: {result['void'][0]}")
    shaped = first["settings"]["shape"] in _SAME_LENGTH and not first["settings"]["trace"]
    for setting in (*_SAME_SETTINGS, *["duration_s"] * shaped):
        before, after = first["settings"][setting], second["settings"][setting]
        if before != after:
            raise CannotStartError(
                f"the runs differ in --{setting.replace('_', '-')} ({before!r} and {after!r}): compare runs of the "
                "same load"
            )


def compare_runs(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    *,
    confidence: float = 0.99,
    tolerance: float = 0.02,
    seed: int = 0,
    resamples: int = _RESAMPLES,
) -> list[Change]:
    """Compares two runs of the same load.

    Args:
        first: The result to start from.
        second: The one to judge.
        confidence: Of the interval of each difference; all figures together are a little less sure.
        tolerance: Differences within it do not matter: a part of durations, and of all requests.
        seed: Of the resamples.
        resamples: How many.

    Returns:
        A change for each figure; ``better`` or ``worse`` only if the whole interval is beyond the tolerance.

    Raises:
        CannotStartError: The runs are void, too short, or not of the same load.
    """
    if not 0.5 <= confidence < 1 or not 0 <= tolerance < 1:
        raise CannotStartError(
            f"expected --confidence from 0.5 and --tolerance from 0, both below 1, got {confidence:g} and {tolerance:g}"
        )
    _check_alike(first, second)
    rng = random.Random(f"bootstrap/{seed}")
    before, after = blocks_of(first, "the first run"), blocks_of(second, "the second run")
    drawn_before, drawn_after = _drawn(before, rng, resamples), _drawn(after, rng, resamples)
    whole_before, whole_after = _whole(before), _whole(after)
    changes = []
    for name, (figure, ratio, more_is_better) in _FIGURES.items():
        pairs = zip(drawn_before[name], drawn_after[name], strict=True)
        differences = sorted(new - old for old, new in pairs if old is not None and new is not None)
        values = figure(whole_before), figure(whole_after)
        if not differences or None in values:
            changes.append(Change(name, *values, 0.0, 0.0, "noise"))
            continue
        tail = (1 - confidence) / 2
        low = differences[math.floor(tail * len(differences))]
        high = differences[min(len(differences) - 1, math.ceil((1 - tail) * len(differences)))]
        bound = math.log1p(tolerance) if ratio else tolerance
        rises, falls = low > bound, high < -bound
        verdict = "noise" if not rises and not falls else "better" if rises == more_is_better else "worse"
        changes.append(Change(name, *values, low, high, verdict))
    return changes


def describe_changes(changes: Sequence[Change], confidence: float) -> list[str]:
    """Writes a comparison as lines of text."""
    rows = []
    for change in changes:
        ratio = _FIGURES[change.name][1]
        low, high = (math.expm1(bound) if ratio else bound for bound in (change.low, change.high))
        values = ["none" if value is None else f"{value:.4g}" for value in (change.before, change.after)]
        unit = "" if ratio else " points"
        rows.append(
            f"{change.verdict:8} {change.name:14} {values[0]} -> {values[1]} ({low:+.1%} to {high:+.1%}{unit}, "
            f"{confidence:.0%} sure)"
        )
    hidden = [
        f"{change.name.removesuffix('_ms')} up to {math.expm1(change.high):+.0%}"
        for change in changes
        if change.verdict == "noise" and _FIGURES[change.name][1] and change.high > _COARSE
    ]
    if hidden:
        rows.append(f"{'note':8} noise may hide {', '.join(hidden)}: longer runs show less")
    return rows


def changes_data(changes: Sequence[Change]) -> dict[str, Any]:
    """The same as numbers."""
    found = [asdict(change) for change in changes]
    return {"format": "torch-ext-loadtest-compare/1", "verdict": overall(changes), "changes": found}


def overall(changes: Sequence[Change]) -> str:
    """``worse`` if any figure is, else ``better`` if any is, else ``noise``."""
    verdicts = {change.verdict for change in changes}
    return next((word for word in ("worse", "better") if word in verdicts), "noise")
