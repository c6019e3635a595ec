"""Measures variants against each other on this machine, in a process of its own.

The process (`python -m deploy.server.variants.measure`) loads the candidates one after the other, keeps the better one
of two and drops the other: at no time are there more than two, and all of their memory is free again when it ends. The
two take turns on the same batches, so that a disturbance hits both, and the median of the ratios counts.

The server (`measurement`) sends a `Job` as one line of JSON and gets lines back: `begin`, `failed`, `speeds`, and
`done` at the end.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import random
import statistics
import sys
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...bundle import Accuracy, load_manifest
from ...tasks import Ids
from .choice import fastest
from .measurement import Job

__all__ = ["compare", "deal", "make_lengths"]

SECONDS = 0.5
"""How long the slower one of two variants is measured."""

MIN_ROUNDS = 3
ROUND_S = 0.06
"""How long a batch of the first variant should take: short, so that the two change places often."""

MAX_TEXTS = 16
"""Texts of a batch, as under load, which is when speed matters; slow variants get fewer.

all-MiniLM-L6-v2 on AMD Zen 5, 2 threads: int8 is 1.05 times as fast as bf16 with 8 texts, a tie or not by chance, and
1.16 times with 16 and with 32.
"""

# Deciles and more of the lengths of 1,024 docstrings (`deploy.texts`) in tokens of all-MiniLM-L6-v2, over their mean.
_RELATIVE_LENGTHS = (0.14, 0.2, 0.22, 0.26, 0.3, 0.34, 0.42, 0.52, 0.63, 0.71, 0.87, 1.09, 1.39, 1.8, 2.54, 4.77)
_MEAN_TOKENS = 50
_TEXTS = 64

Texts = list[Ids]
Runner = Callable[[Texts], Any]


def make_lengths(mean_tokens: float, max_tokens: int, texts: int = _TEXTS) -> list[int]:
    """Lengths of ragged texts in tokens, the longest first.

    Args:
        mean_tokens: Their mean, as far as `max_tokens` allows.
        max_tokens: Longest text.
        texts: How many.
    """
    last = len(_RELATIVE_LENGTHS) - 1
    lengths = []
    for index in range(texts):
        place = index / max(texts - 1, 1) * last
        low = min(int(place), last - 1)
        share = place - low
        relative = (1 - share) * _RELATIVE_LENGTHS[low] + share * _RELATIVE_LENGTHS[low + 1]
        lengths.append(max(min(round(relative * mean_tokens), max_tokens), min(3, max_tokens)))
    return sorted(lengths, reverse=True)


def deal(lengths: Sequence[int], texts: int) -> list[list[int]]:
    """Ragged batches of about equal cost: the longest first, dealt to and fro.

    Args:
        lengths: Longest first.
        texts: Texts of a batch.
    """
    count = max(len(lengths) // texts, 1)
    batches: list[list[int]] = [[] for _ in range(count)]
    for index, length in enumerate(lengths[: count * texts]):
        turn, place = divmod(index, count)
        batches[place if turn % 2 == 0 else count - 1 - place].append(length)
    random.Random(0).shuffle(batches)
    return batches


def compare(
    names: Sequence[str],
    load: Callable[[str], Runner],
    texts: Callable[[Sequence[int]], Texts],
    lengths: Sequence[int],
    accuracies: Mapping[str, Accuracy],
    report: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Measures variants against each other.

    Args:
        names: Candidates, in the order in which they are loaded.
        load: Loads and warms up a variant; raises if that fails.
        texts: Token ids of texts with these lengths.
        lengths: Lengths of texts to run, longest first.
        accuracies: By name; of two that are equally fast, the more accurate one stays loaded.
        report: Called with each event, as `Measurement` reads it.
        clock: Seconds.

    Returns:
        Texts per second of each variant that could be loaded: that of the first, times the medians of ratios.
    """
    speeds: dict[str, float] = {}
    best = ""
    engine: Runner | None = None
    batches: list[Texts] = []

    def seconds(runner: Runner, batch: Texts) -> float:
        begun_s = clock()
        runner(batch)
        return max(clock() - begun_s, 1e-9)

    for name in names:
        report({"begin": name})
        try:
            challenger = load(name)
            if engine is None:
                one_s = seconds(challenger, texts([lengths[len(lengths) // 4]]))
                size = max(1, min(MAX_TEXTS, round(ROUND_S / one_s)))
                batches = [texts(batch) for batch in deal(lengths, size)]
                tokens_per_s = []
                spent_s = 0.0
                for batch in itertools.cycle(batches):
                    spent_s += (taken_s := seconds(challenger, batch))
                    tokens_per_s.append(sum(map(len, batch)) / taken_s)
                    if spent_s >= SECONDS and len(tokens_per_s) >= MIN_ROUNDS:
                        break
                speeds[name] = statistics.median(tokens_per_s) * len(lengths) / sum(lengths)
                best, engine = name, challenger
            else:
                seconds(challenger, batches[0])
                ratios: list[float] = []
                both_s = [0.0, 0.0]
                for number, batch in enumerate(itertools.cycle(batches)):
                    taken = [0.0, 0.0]
                    for side in (0, 1) if number % 2 == 0 else (1, 0):
                        taken[side] = seconds((engine, challenger)[side], batch)
                        both_s[side] += taken[side]
                    ratios.append(taken[0] / taken[1])
                    if max(both_s) >= SECONDS and len(ratios) >= MIN_ROUNDS:
                        break
                speeds[name] = speeds[best] * statistics.median(ratios)
                if fastest({key: speeds[key] for key in (best, name)}, accuracies) == name:
                    best, engine = name, challenger
        except Exception as error:  # Engines raise what they like.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            report({"failed": name, "reason": reason, "lasting": not isinstance(error, MemoryError)})
        else:
            report({"speeds": speeds})
        challenger = None  # type: ignore[assignment] # Let go before the next one is loaded.
        gc.collect()
    report({"done": True})
    return speeds


def _end_with(descriptor: int) -> None:
    """Ends this process when the server closes its pipe, or dies."""

    def watch() -> None:
        while os.read(descriptor, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _room_for(bytes_: int) -> None:
    """Raises MemoryError where a variant of that size would not fit beside the one that is loaded."""
    from ...machine import available_memory_bytes

    needed = 3 * bytes_ + (64 << 20)
    available = available_memory_bytes()
    if available is not None and available < needed:
        raise MemoryError(f"expected about {needed >> 20} MiB of free memory, got {available >> 20} MiB")


def main() -> int:
    """The measuring process: a job on standard input, reports on standard output."""
    # Whatever a library prints goes to standard error.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    line = b""
    while not line.endswith(b"\n"):
        if not (part := os.read(0, 1 << 16)):
            return 1
        line += part
    job = Job(**json.loads(line))
    _end_with(0)

    from ...engines.open import load_engine
    from ...tasks import open_task

    manifest = load_manifest(job.bundle, verify=False, variants=job.names)
    task = open_task(manifest)
    special = {token.id for token in manifest.special_tokens.values() if token is not None}
    plain = [index for index in range(job.vocab_size) if index not in special] or [0]
    generator = random.Random(0)

    def texts(lengths: Sequence[int]) -> Texts:
        return task.prepare([array("q", generator.choices(plain, k=length)) for length in lengths])

    def load(name: str) -> Runner:
        if name != job.names[0]:
            _room_for(manifest.variants[name].bytes)
        engine, _ = load_engine(manifest, manifest.variants[name], job.threads)

        return lambda batch: engine.run(batch, [task.usual] * len(batch))

    def report(value: dict[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    mean = manifest.verification.get("mean_tokens")
    known = isinstance(mean, (int, float)) and 1 <= mean < math.inf
    lengths = make_lengths(float(mean) if known else _MEAN_TOKENS, manifest.max_tokens)  # type: ignore[arg-type]
    accuracies = {name: found for name in job.names if (found := manifest.variants[name].accuracy) is not None}
    compare(job.names, load, texts, lengths, accuracies, report)
    out.flush()
    # Threads of engines have nothing left to say.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
