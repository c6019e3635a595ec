"""Compares a written variant with the reference, and measures it.

`verify` compares, `measure` times, `refuse` says which bound was missed. What runs a variant is the engine that serves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from deploy.bundle import Accuracy, Speed
from deploy.engines.batch import Batch
from deploy.engines.engine import Engine
from deploy.export.accuracy import Result, Verification
from deploy.export.errors import ExportError
from deploy.machine import cpu_name

__all__ = ["VariantRefusedError", "describe", "measure", "refuse", "verify"]


class VariantRefusedError(ExportError):
    """A variant misses an accuracy bound."""


def verify(
    engine: Engine, verification: Verification, bounds: Mapping[str, float], speed_s: float, threads: int
) -> tuple[Result, Speed | None]:
    """Accuracy of a variant, and its speed if it keeps its bounds."""
    result = verification.check(engine, bounds)
    return result, None if result.missed else measure(engine, verification.work, speed_s, threads)


def measure(engine: Engine, work: Sequence[Batch], seconds: float, threads: int) -> Speed | None:
    """Texts per second over batches of every length, until the time is over; the engine has run before."""
    if seconds <= 0:
        return None
    # Whole rounds only, so that short and long texts count alike.
    chosen = work[:: max(1, len(work) // 4)]
    usual = engine.task.usual
    count, start = 0, time.perf_counter()
    while True:
        for batch in chosen:
            engine.run(batch.items, [usual] * len(batch))
            count += len(batch)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return Speed(round(count / elapsed, 1), threads, cpu_name(), max(map(len, chosen)))


def describe(accuracy: Accuracy, speed: Speed | None) -> str:
    """Both, for a line of the progress."""
    text = f"{accuracy.metric} mean {accuracy.mean:.6f} min {accuracy.min:.6f}"
    if "max_prob_diff" in accuracy.details:
        text += f" max probability difference {accuracy.details['max_prob_diff']:.4f}"
    return text if speed is None else f"{text}, {speed.texts_per_s:.0f} texts/s"


def refuse(name: str, result: Result, names: Sequence[str], how: str = "") -> None:
    """Does nothing for a variant that keeps its bounds.

    Raises:
        VariantRefusedError: It misses one; the message says how to go on.
    """
    if not result.missed:
        return
    others = ",".join(other for other in names if other != name)
    drop = f"leave it out with --variants {others}, or " if others else ""
    bound, measured, _ = result.missed[0]
    raise VariantRefusedError(
        f"{name} misses its accuracy bound on {result.accuracy.texts} texts{how}: {result}; {drop}change the bound "
        f"with --bound {name}.{bound}=VALUE (measured {measured:.6g})"
    )
