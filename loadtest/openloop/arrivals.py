"""When requests arrive: rates over time, and arrival times that follow from them. No clock, no sockets."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadtest.options import CannotStartError, why

__all__ = ["PROCESSES", "Profile", "diurnal", "gaps", "read_trace", "spikes", "steady", "steps", "times"]

PROCESSES = ("poisson", "constant")
"""How arrivals are spread at a given rate: independent of one another, or evenly."""

_DAY_PARTS = 96


@dataclass(frozen=True)
class Profile:
    """A rate over time: straight lines between points, jumps where two points share a time.

    Attributes:
        points: Seconds from the start, ascending, and arrivals per second.
    """

    points: tuple[tuple[float, float], ...]

    @property
    def duration_s(self) -> float:
        """When the last line ends."""
        return self.points[-1][0]

    @property
    def arrivals(self) -> float:
        """How many arrivals are expected in all."""
        return sum(
            (end_s - start_s) * (first + last) / 2
            for (start_s, first), (end_s, last) in itertools.pairwise(self.points)
        )

    @property
    def highest(self) -> float:
        """The highest rate."""
        return max(rate for _, rate in self.points)


def steady(rate: float, duration_s: float) -> Profile:
    """The same rate all the time."""
    return Profile(((0.0, rate), (duration_s, rate)))


def steps(first: float, last: float, count: int, step_s: float) -> Profile:
    """Rates that rise from one step to the next by the same amount.

    Args:
        first: Arrivals per second of the first step.
        last: Of the last one.
        count: How many steps, at least 2.
        step_s: How long each takes.
    """
    points = []
    for index in range(count):
        rate = first + (last - first) * index / (count - 1)
        points += [(index * step_s, rate), ((index + 1) * step_s, rate)]
    return Profile(tuple(points))


def spikes(base: float, peak: float, *, every_s: float, length_s: float, duration_s: float) -> Profile:
    """A rate with a spike in the middle of each interval.

    Args:
        base: Arrivals per second between the spikes.
        peak: In a spike.
        every_s: Length of an interval.
        length_s: Length of a spike, shorter than the interval.
        duration_s: Of the whole; a spike that would not end before it is left out.
    """
    points = [(0.0, base)]
    start_s = (every_s - length_s) / 2
    while start_s + length_s <= duration_s:
        points += [(start_s, base), (start_s, peak), (start_s + length_s, peak), (start_s + length_s, base)]
        start_s += every_s
    return Profile((*points, (duration_s, base)))


def diurnal(low: float, high: float, *, day_s: float, duration_s: float) -> Profile:
    """A day, compressed: a sine that begins at its lowest, at night.

    Args:
        low: Arrivals per second at night.
        high: At noon.
        day_s: How long a day takes.
        duration_s: Of the whole.
    """
    count = max(1, math.ceil(_DAY_PARTS * duration_s / day_s))
    moments = [duration_s * index / count for index in range(count + 1)]
    return Profile(
        tuple((moment, low + (high - low) * (1 - math.cos(2 * math.pi * moment / day_s)) / 2) for moment in moments)
    )


def gaps(process: str, seed: int) -> Iterator[float]:
    """Distances between arrivals, without end, with a mean of 1.

    Args:
        process: One of `PROCESSES`.
        seed: Of a Poisson process.
    """
    if process == "constant":
        return itertools.repeat(1.0)
    rng = random.Random(f"arrivals/{seed}")
    return iter(lambda: rng.expovariate(1.0), None)


def times(profile: Profile, distances: Iterator[float]) -> Iterator[float]:
    """Arrival times: distances are measured in expected arrivals, which makes a Poisson process exact at any rate.

    Args:
        profile: The rate over time.
        distances: What `gaps` gives.

    Yields:
        Seconds from the start, ascending, below the profile's duration.
    """
    needed = next(distances)
    for (start_s, first), (end_s, last) in itertools.pairwise(profile.points):
        length_s = end_s - start_s
        slope = (last - first) / length_s if length_s else 0.0
        area = length_s * (first + last) / 2
        while needed <= area:
            # The root of first * x + slope * x² / 2 = needed, in the form that a slope of 0 does not divide by.
            after_s = 2 * needed / (first + math.sqrt(max(0.0, first * first + 2 * slope * needed)))
            if start_s + after_s < profile.duration_s:
                yield start_s + after_s
            needed += next(distances)
        needed -= area


def read_trace(path: str | Path, speed: float = 1.0) -> list[float]:
    """Reads arrival times: a number a line, in seconds, or JSON lines with a field ``time_s``.

    Args:
        path: A file in UTF-8; JSON lines if its name ends in ``.jsonl`` or ``.ndjson``.
        speed: How many times faster than recorded.

    Returns:
        Seconds from the first arrival, ascending.

    Raises:
        CannotStartError: No such file, a line that is no time, times that descend, or none.
    """
    path = Path(path)
    as_json = path.suffix.lower() in {".jsonl", ".ndjson"}
    found: list[float] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStartError(f"--trace: cannot read {path}: {why(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            moment_s = float(json.loads(line)["time_s"] if as_json else line)
        except (ValueError, KeyError, TypeError) as error:
            expected = 'an object with a number in "time_s"' if as_json else "a number of seconds"
            raise CannotStartError(f"{path}, line {number}: expected {expected}, got {line[:40]!r}") from error
        if not math.isfinite(moment_s) or (found and moment_s < found[-1]):
            raise CannotStartError(f"{path}, line {number}: expected times that ascend, got {line[:40]!r}")
        found.append(moment_s)
    if not found:
        raise CannotStartError(f"--trace: no arrival times in {path}: expected a number of seconds in each line")
    return [(moment_s - found[0]) / speed for moment_s in found]
