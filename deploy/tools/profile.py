"""`python -m deploy profile`: where a request's time goes, and what faster parts of it are worth.

One request is one text. Its parts are timed one after the other: the tokenizer, the model, what the task makes of its
output, and HTTP with everything around it, by a client that keeps its connection. The model's part is split by kinds of
ops as `ops` measures them. Amdahl's law then says what each variant should gain by its faster products of matrices, and
what several workers should, and both are measured beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from deploy.bundle import Manifest
from deploy.engines.batch import Batch, Item
from deploy.machine import cpu_name, usable_cpus
from deploy.options import positive, seconds
from deploy.tools.command import (
    ToolError,
    chosen_variants,
    make_parser,
    read_items,
    run,
    table,
    texts_of,
    usable_threads,
)
from deploy.tools.inspect import describe
from deploy.tools.ops import HOT, shares
from deploy.tools.requests import Answered, serve_and_ask

__all__ = ["Parts", "amdahl", "main"]

_BASELINES = ("torch_ext-fp32", "onnx-fp32", "torch_ext-bf16")


def amdahl(share: float, factor: float) -> float:
    """How much faster the whole gets if a part of it, with this share of its time, gets faster by a factor."""
    return 1 / ((1 - share) + share / factor)


@dataclass
class Parts:
    """Where the time of a request goes with one variant, in milliseconds.

    Attributes:
        tokenize_ms, model_ms, answer_ms: Medians; `answer_ms` is pooling, or what else the task makes of the model's
            output.
        ops: Share of the model's time by kind of op; empty where that could not be measured.
        http_ms: What is left of the time that a client sees; None: not measured.
        asked: By number of workers, what clients saw.
    """

    tokenize_ms: float
    model_ms: float
    answer_ms: float
    ops: Mapping[str, float]
    http_ms: float | None = None
    asked: dict[int, Answered] = field(default_factory=dict)

    @property
    def total_ms(self) -> float:
        """All parts together."""
        return self.tokenize_ms + self.model_ms + self.answer_ms + (self.http_ms or 0.0)

    @property
    def hot_ms(self) -> float:
        """The products of matrices with weights."""
        return self.model_ms * self.ops.get(HOT, 0.0)

    @property
    def divided(self) -> float:
        """Share of the time that is spent in workers, each on CPUs of its own."""
        return 1 - (self.http_ms or 0.0) / self.total_ms


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        0, or 2 if the bundle or an option is wrong.
    """
    parser = make_parser(
        "profile",
        "Say where the time of a request goes (tokenizer, kinds of ops of the model, pooling, HTTP), what Amdahl's\n"
        "law predicts of each variant and number of workers, and what was measured. Of a model's folder, too.",
        "folder of a bundle, or a model's folder",
    )
    parser.add_argument("--variants", metavar="A,B", help="default: all of the bundle")
    parser.add_argument("--tokens", type=positive, default=64, metavar="N", help="length of the text (default 64)")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="texts to take one of: one per line, or .jsonl")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: what this process may use")
    parser.add_argument(
        "--workers", type=_counts, metavar="N,N", help="numbers of workers to serve with (default: 1 and all CPUs)"
    )
    parser.add_argument("--seconds", type=seconds, default=1.0, metavar="S", help="for each measurement (default 1)")
    parser.add_argument("--no-http", action="store_true", help="start no server")
    return run(parser, _profile, argv)


def _counts(text: str) -> list[int]:
    return [positive(item) for item in text.split(",")]


def _profile(arguments: argparse.Namespace) -> int:
    manifest, _ = describe(arguments.model)
    names = chosen_variants(manifest, arguments.variants)
    threads = usable_threads(arguments.threads)
    text, item = _text(manifest, arguments.texts, arguments.tokens)
    parts = {name: _measure(manifest, name, text, item, threads, arguments.seconds) for name in names}
    counts = sorted({1, *(arguments.workers or [usable_cpus()])})
    if not arguments.no_http:
        for name in names:
            for count in counts:
                each = max(1, threads // count)
                answered = serve_and_ask(manifest, name, text, count, each, arguments.seconds)
                parts[name].asked[count] = answered
            parts[name].http_ms = parts[name].asked[1].outside_ms
    baseline = next((name for name in _BASELINES if name in parts), names[0])
    if arguments.json:
        report: dict[str, Any] = {"tokens": len(item), "threads": threads, "cpu": cpu_name(), "baseline": baseline}
        report["variants"] = {name: asdict(found) | _laws(parts[baseline], found) for name, found in parts.items()}
        print(json.dumps(report, indent=2))
    else:
        _print(parts, baseline, f"one text of {len(item)} tokens, {threads} threads, {cpu_name()}")
    return 0


def _text(manifest: Manifest, file: Path | None, tokens: int) -> tuple[str, Item]:
    """The text whose length is nearest to what is asked for, and its token ids."""
    texts, _ = texts_of(file, 256)
    best: tuple[int, str, Item] | None = None
    for text in texts:
        try:
            (item,) = read_items(manifest, [text])
        except (ValueError, ToolError):  # No input of the task.
            continue
        distance = abs(len(item) - tokens)
        if best is None or distance < best[0]:
            best = distance, text, item
    if best is None:
        raise ToolError("no text can be an input of the model's task; pass other ones with --texts")
    return best[1], best[2]


def _measure(manifest: Manifest, name: str, text: str, item: Item, threads: int, seconds: float) -> Parts:
    from deploy.engines.open import open_engine

    encode = _tokenizer(manifest)
    tokenize = _median_ms(lambda: encode(text), seconds / 4)
    try:
        engine = open_engine(manifest, manifest.variants[name], threads)
    except (OSError, RuntimeError, ValueError) as error:  # What an engine says of a damaged file.
        raise ToolError(f"{manifest.root}: {name} cannot be loaded: {error}") from error
    usual = engine.task.usual
    engine.run([item], [usual])
    model: list[float] = []
    answer: list[float] = []
    end = time.perf_counter() + seconds
    while not model or time.perf_counter() < end:
        start = time.perf_counter()
        ((_, states),) = engine._states(Batch([item]))
        middle = time.perf_counter()
        engine.task.answers(states, [usual])
        model.append(1e3 * (middle - start))
        answer.append(1e3 * (time.perf_counter() - middle))
    found = shares(manifest, manifest.variants[name], item, threads, seconds)
    return Parts(tokenize, median(model), median(answer), found)


def _tokenizer(manifest: Manifest) -> Any:
    from tokenizers import Tokenizer

    if manifest.tokenizer_json is not None:
        return Tokenizer.from_str(manifest.tokenizer_json).encode
    return Tokenizer.from_file(str(manifest.tokenizer_path)).encode


def _median_ms(call: Any, seconds: float) -> float:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def _laws(baseline: Parts, found: Parts) -> dict[str, Any]:
    """What Amdahl's law predicts, and what was measured: of the variant against the baseline, and of workers."""
    share = baseline.hot_ms / baseline.total_ms
    one = found.asked.get(1)
    return {
        "total_ms": found.total_ms,
        "hot_share": found.hot_ms / found.total_ms,
        "speedup": {
            "predicted": amdahl(share, baseline.hot_ms / found.hot_ms) if share and found.hot_ms else None,
            "measured": baseline.total_ms / found.total_ms,
        },
        "workers": {
            count: {
                "predicted": amdahl(found.divided, min(count, usable_cpus())),
                "measured": answered.per_s / one.per_s,
            }
            for count, answered in found.asked.items()
            if one is not None
        },
    }


def _print(parts: Mapping[str, Parts], baseline: str, what: str) -> None:
    kinds = sorted(
        {kind for found in parts.values() for kind in found.ops},
        key=lambda kind: -max(found.model_ms * found.ops.get(kind, 0.0) for found in parts.values()),
    )
    rows = [["part, ms", *parts]]
    rows.append(["tokenize", *(f"{found.tokenize_ms:.3f}" for found in parts.values())])
    rows.append(["model", *(f"{found.model_ms:.3f}" for found in parts.values())])
    for kind in kinds:
        cells = (f"{found.model_ms * found.ops[kind]:.3f}" if kind in found.ops else "-" for found in parts.values())
        rows.append([f"  {kind}", *cells])
    rows.append(["pool, answer", *(f"{found.answer_ms:.3f}" for found in parts.values())])
    if any(found.http_ms is not None for found in parts.values()):
        rows.append(["HTTP, client", *(f"{found.http_ms or 0:.3f}" for found in parts.values())])
    rows.append(["all", *(f"{found.total_ms:.3f}" for found in parts.values())])
    print(f"{what}\n\n{table(rows)}\n")

    laws = {name: _laws(parts[baseline], found) for name, found in parts.items()}
    print(f"Amdahl's law, against {baseline}, for faster products with weights:")
    rows = [["variant", "share of products", "predicted", "measured"]]
    for name, law in laws.items():
        predicted = law["speedup"]["predicted"]
        rows.append(
            [
                name,
                f"{100 * law['hot_share']:.0f} %" if parts[name].ops else "-",
                "-" if predicted is None else f"{predicted:.2f}x",
                f"{law['speedup']['measured']:.2f}x",
            ]
        )
    print(table(rows))
    workers = [["variant", "workers", "requests/s", "predicted", "measured"]]
    for name, found in parts.items():
        for count, answered in found.asked.items():
            law = laws[name]["workers"][count]
            factors = f"{law['predicted']:.2f}x", f"{law['measured']:.2f}x"
            workers.append([name, str(count), f"{answered.per_s:.0f}", *factors])
    if len(workers) > 1:
        print("\nAmdahl's law for workers: all but HTTP and client is divided among them, at most by the CPUs:")
        print(table(workers))
        print("the client takes CPUs of the same machine")
