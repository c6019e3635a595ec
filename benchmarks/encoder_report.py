"""What `encoder.py` found, as tables, a plot, and beside the project's promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import report

if TYPE_CHECKING:
    from benchmarks.linear import LinearResult

LATENCY_TOKENS = 16
# Kernels of x86-64 without instructions for bf16, where PyTorch emulates it.
WITHOUT_BF16 = ("avx2", "avx_vnni")


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
