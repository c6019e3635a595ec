"""The result of a run as a document: what was asked, what came out, and what both depend on."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.measure import Objectives, describe_answers, milliseconds
from loadtest.tasks import TASKS, Traits

from .engine import Outcome
from .options import Settings
from .plan import profile_of
from .record import GROWTH, Second, bucket_ms, bucket_of, percentile_of
from .schema import KNEE_FORMAT, RUN_FORMAT
from .verdict import Verdict, measured_s, notes_on, point_of, point_of_run

__all__ = ["describe_run", "knee_result", "run_result"]

_SETTLE = 0.2
"""Part of each step that does not count: the queue of the step before is still there."""


def _version() -> str:
    """The commit of this checkout, or ``unknown`` in an image."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("REVISION", "unknown")
    return found.stdout.strip()


def redacted(command: Sequence[str]) -> list[str]:
    """A command line without its secrets."""
    shown: list[str] = []
    secret = False
    for argument in command:
        flag, equals, _ = argument.partition("=")
        # argparse takes the beginning of an option for the whole.
        is_key = len(flag) > len("--") and "--api-key".startswith(flag)
        shown.append("..." if secret else f"{flag}=..." if is_key and equals else argument)
        secret = is_key and not equals and not secret
    return shown


def _common(
    kind: str, command: Sequence[str], settings: Settings, objectives: Objectives, traits: Traits, workers: int
) -> dict[str, Any]:
    return {
        "format": kind,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": redacted(command),
        "versions": {
            "python": platform.python_version(),
            "loadtest": _version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "machine": {"name": platform.node(), "cpus": os.cpu_count() or 0},
        "settings": dataclasses.asdict(settings),
        "objectives": {name: limit for name, limit in dataclasses.asdict(objectives).items() if limit is not None},
        "server": {"path": TASKS[settings.task].path_at(traits), "model": traits.model},
        "workers": workers,
    }


def steps_of(outcome: Outcome, settings: Settings, objectives: Objectives) -> list[dict[str, Any]]:
    """A point for each step of the run, or one for a run at one rate; none where the rate changes otherwise."""
    if settings.trace or settings.shape in ("steady", "soak", "at-once"):
        length_s = measured_s(outcome, settings)
        if length_s <= 0:
            return []
        point = point_of_run(outcome.record.collector, length_s, objectives)
        return [{**point, "rate": point["arrivals_per_s"]}]
    if settings.shape != "steps":
        return []
    profile = profile_of(settings)
    assert profile is not None
    points = []
    for (start_s, rate), (end_s, _) in zip(*[iter(profile.points)] * 2, strict=True):
        # Whole seconds: what is counted is counted by the second.
        numbers = range(math.ceil(start_s + _SETTLE * (end_s - start_s)), math.floor(end_s))
        found = [outcome.record.seconds[number] for number in numbers if number in outcome.record.seconds]
        if found:
            points.append({**point_of(found, float(len(numbers)), objectives), "rate": rate})
    return points


def drift_of(seconds: Mapping[int, Second], warm_up_s: float) -> float | None:
    """How much the 95th percentile of the last quarter is above that of the first, 0 for not at all; None if short."""
    numbers = [number for number in sorted(seconds) if number >= warm_up_s]
    part = len(numbers) // 4
    if part < 5:
        return None
    first, last = (
        percentile_of(Second.sum(seconds[number] for number in chosen).latency, 0.95)
        for chosen in (numbers[:part], numbers[-part:])
    )
    return last / first - 1 if first and last else None


def run_result(
    command: Sequence[str],
    settings: Settings,
    objectives: Objectives,
    traits: Traits,
    outcome: Outcome,
    verdict: Verdict,
) -> dict[str, Any]:
    """The document of a run, in the form `schema.RUN`.

    Args:
        command: As it was given; secrets are taken out.
        settings: Of the run.
        objectives: Its limits.
        traits: What was learnt of the server.
        outcome: What happened.
        verdict: What that says.
    """
    record = outcome.record
    length_s = measured_s(outcome, settings)
    goodput = record.collector.goodput(objectives.within_ms)
    points = steps_of(outcome, settings, objectives)
    kept = [point["rate"] for point in points if point["kept"]]
    whole: Counter[int] = Counter()
    for duration_ms, count in record.collector.latency.counts.items():
        whole[bucket_of(duration_ms)] += count
    return {
        **_common(RUN_FORMAT, command, settings, objectives, traits, outcome.workers),
        "summary": {
            **record.collector.summary(length_s),
            "goodput": goodput,
            "goodput_per_s": goodput / length_s if length_s else 0.0,
        },
        "generator": {
            "lag_ms": {
                "p50": record.lag.percentile(0.5),
                "p99": record.lag.percentile(0.99),
                "max": record.lag.percentile(1.0),
            },
            "cpu": round(outcome.cpu, 3),
            "most_in_flight": outcome.peak,
            "waited_for_connection": outcome.waited,
            "interrupted": outcome.interrupted,
        },
        "failures": dict(record.reasons.most_common()),
        "histogram": {"growth": GROWTH, "counts": [[bucket_ms(bucket), whole[bucket]] for bucket in sorted(whole)]},
        "series": [
            {"second": number, "in_flight": outcome.in_flight[number], **record.seconds.get(number, Second()).to_wire()}
            for number in range(max(record.seconds, default=-1) + 1)
        ],
        "points": points,
        "knee_per_s": max(kept) if settings.shape == "steps" and kept else None,
        "drift": drift_of(record.seconds, settings.warm_up_s),
        "limits": [{"kept": passed, "message": message} for passed, message in verdict.limits],
        "notes": notes_on(outcome, settings),
        "void": verdict.void,
        "exit_code": verdict.exit_code,
    }


def knee_result(
    command: Sequence[str], settings: Settings, objectives: Objectives, traits: Traits, found: Mapping[str, Any]
) -> dict[str, Any]:
    """The document of a search, in the form `schema.KNEE`.

    Args:
        command: As it was given; secrets are taken out.
        settings: Of each trial, but for the rate.
        objectives: The limits.
        traits: What was learnt of the server.
        found: Points, knee, messages, and why it is void.
    """
    return {**_common(KNEE_FORMAT, command, settings, objectives, traits, found["workers"]), **found}


def describe_run(result: Mapping[str, Any]) -> list[str]:
    """Writes the result of a run as lines of text."""
    summary, settings, generator = result["summary"], result["settings"], result["generator"]
    arrivals = f"trace {settings['trace']}" if settings["trace"] else f"{settings['process']}, {settings['shape']}"
    arrived_per_s = summary["requests"] / (summary["measured_s"] or math.inf)
    answers = describe_answers(summary, f"{arrived_per_s:.1f} arrivals/s, {summary['goodput_per_s']:.1f} goodput/s")
    lines = {
        "load test": f"{result['server']['path']} at {settings['host']}, open model, {arrivals}, "
        f"{summary['measured_s']:.1f} s after the warm-up, {result['workers']} generator(s)",
        **answers,
        "latency": f"{answers['latency']} (from the intended start)",
        "generator": f"sent {milliseconds(generator['lag_ms']['p99'])} late at p99, "
        f"{milliseconds(generator['lag_ms']['max'])} at most; "
        f"{generator['cpu']:.0%} of a core, {generator['most_in_flight']} requests in flight at most",
    }
    rows = [f"{name:10} {text}" for name, text in lines.items()]
    rows += [f"{'failure':10} {count} x {reason}" for reason, count in list(result["failures"].items())[:5]]
    if result["settings"]["shape"] == "steps":
        rows += [
            f"{'step':10} {point['rate']:.4g}/s: {point['answered_per_s']:.1f} answered/s, "
            f"p50 {milliseconds(point['p50_ms'])}, p99 {milliseconds(point['p99_ms'])}, "
            f"{'kept' if point['kept'] else 'MISSED'}"
            for point in result["points"]
        ]
    if settings["shape"] == "soak" and result["drift"] is not None:
        rows.append(f"{'drift':10} p95 of the last quarter is {result['drift']:+.1%} from that of the first")
    rows += [f"{'kept' if limit['kept'] else 'MISSED':10} {limit['message']}" for limit in result["limits"]]
    rows += [f"{'NOTE':10} {note}" for note in result["notes"]]
    rows += [f"{'VOID':10} {reason}" for reason in result["void"]]
    return rows
