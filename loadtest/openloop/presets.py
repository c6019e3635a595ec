"""Runs in the form of MLPerf's LoadGen: its server and its offline scenario. Not a submission, and not its code.

Server: Poisson arrivals, a bound on the 99th percentile, 600 s at least. Early stopping: a run that is short of queries
passes if the bound is kept with 99 % confidence, so fewer may exceed it than 1 %. Offline: at least 24,576 samples, all
at the start, that take 600 s at least; the result is how many are answered per second. A run that is shorter or smaller
is not refused, but says so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loadtest.measure import Collector, Objectives
from loadtest.options import CannotStartError

if TYPE_CHECKING:
    from .options import Settings

__all__ = ["PRESETS", "allowed_over", "departures", "early_stopping", "may_end", "with_preset"]

_PART, _CONFIDENCE = 0.99, 0.99
_LONGEST = 3
"""How many times its least duration a server run may take before it is judged as it is."""

_LEAST_S, _LEAST_SAMPLES = 600.0, 24_576
"""What MLPerf asks for in both scenarios, and in the offline one."""

PRESETS: dict[str, dict[str, Any]] = {
    "mlperf-server": {"shape": "steady", "process": "poisson", "duration_s": _LEAST_S, "warm_up_s": 0.0},
    "mlperf-offline": {
        "shape": "at-once",
        "count": _LEAST_SAMPLES,
        "max_connections": 64,
        "connections": 64,
        "warm_up_s": 0.0,
    },
}
"""What each preset sets; options come first."""


def with_preset(values: dict[str, Any], objectives: Objectives) -> dict[str, Any]:
    """Fills in what a preset sets and no option does.

    Args:
        values: Of the options; None where none was given.
        objectives: The limits.

    Raises:
        CannotStartError: The preset's own rules are not kept.
    """
    name = values.get("preset")
    if not name:
        return values
    filled = {**values, **{key: value for key, value in PRESETS[name].items() if values.get(key) is None}}
    for key in ("shape", "process"):
        if key in PRESETS[name] and filled[key] != PRESETS[name][key]:
            raise CannotStartError(f"--preset {name}: expected --{key} {PRESETS[name][key]}, got {filled[key]}")
    if name == "mlperf-server":
        if objectives.p99_ms is None:
            raise CannotStartError("--preset mlperf-server: expected a bound on latency, --slo-p99-ms")
        if values.get("trace") or values.get("processes", 1) > 1 or values.get("expect_workers"):
            raise CannotStartError("--preset mlperf-server: expected one process and no --trace")
        filled |= {
            "bound_ms": objectives.p99_ms,
            "least_s": filled["duration_s"],
            "duration_s": _LONGEST * filled["duration_s"],
        }
    return filled


def departures(settings: Settings, *, measured_s: float, samples: int, interrupted: bool) -> list[str]:
    """Which of MLPerf's rules a run did not keep.

    Args:
        settings: Of the run.
        measured_s: How long it took, without its warm-up.
        samples: Texts that were answered.
        interrupted: Whether somebody ended it.

    Returns:
        A sentence for each; none without a preset.
    """
    if not settings.preset:
        return []
    found = []
    if settings.preset == "mlperf-server":
        if settings.least_s < _LEAST_S:
            found.append(f"the run was planned for {settings.least_s:g} s, at least {_LEAST_S:g} s are asked for")
        if settings.inputs_per_request != "1":
            found.append(f"a query had {settings.inputs_per_request} texts, one is asked for")
        if settings.warm_up_s:
            found.append(f"the first {settings.warm_up_s:g} s do not count, all queries are asked for")
    else:
        if samples < _LEAST_SAMPLES:
            found.append(f"{samples} texts were answered, at least {_LEAST_SAMPLES} are asked for")
        if measured_s < _LEAST_S:
            found.append(
                f"the run took {measured_s:.3g} s, at least {_LEAST_S:g} s are asked for: raise --count or "
                "--inputs-per-request"
            )
    if interrupted:
        found.append("the run was interrupted")
    return [f"not by MLPerf's rules: {reason}" for reason in found]


def allowed_over(queries: int, part: float = _PART, confidence: float = _CONFIDENCE) -> int:
    """How many of some queries may exceed a bound so that it still holds with confidence.

    If truly less than `part` of all queries kept the bound, so few that exceed it would be seen with a probability of
    at most 1 - `confidence`: the tail of a binomial distribution.

    Args:
        queries: How many were answered.
        part: Of the queries that must keep the bound.
        confidence: How sure.

    Returns:
        The number, or -1 if there are too few queries for any confidence.
    """
    mean, deviation = queries * (1 - part), math.sqrt(queries * part * (1 - part))
    first = max(0, math.floor(mean - 12 * deviation))
    total = 0.0
    for over in range(first, queries + 1):
        logarithm = math.lgamma(queries + 1) - math.lgamma(over + 1) - math.lgamma(queries - over + 1)
        total += math.exp(logarithm + over * math.log(1 - part) + (queries - over) * math.log(part))
        if total > 1 - confidence:
            return over - 1
    return queries


def _over(collector: Collector, bound_ms: float) -> int:
    return collector.total - collector.latency.within(bound_ms)


def early_stopping(collector: Collector, bound_ms: float) -> tuple[bool, str]:
    """Whether the bound holds with confidence, and a sentence that says so with numbers.

    Args:
        collector: What was counted; failures and refusals exceed every bound.
        bound_ms: Of the 99th percentile.
    """
    over, allowed = _over(collector, bound_ms), allowed_over(collector.total)
    kept = over <= allowed
    than = "at most" if kept else "more than"
    return kept, (
        f"early stopping: {over} of {collector.total} requests exceed {bound_ms:g} ms, {than} the {allowed} that p99 "
        "with 99 % confidence allows"
    )


def may_end(collector: Collector, bound_ms: float) -> bool:
    """Whether a server run that has lasted long enough may end: its bound holds, or is missed beyond hope."""
    return early_stopping(collector, bound_ms)[0] or _over(collector, bound_ms) > (1 - _PART) * max(
        500, collector.total
    )
