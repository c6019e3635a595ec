"""The works whose instructions `instructions.py` counts, its bars, and what was found as tables and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import report
from benchmarks.blocks import CPUS

MINILM = {
    "vocab_size": 1000,  # of no influence on the counts
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
# Two layers of twelve, to bound the time: all layers are alike.
BERT = {**MINILM, "hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072}


def _linear(m: int, k: int, n: int, activation: str = "none") -> dict[str, Any]:
    name, file = f"linear {m}x{k}x{n}", f"linear-{k}x{n}-{activation}"
    name += " + GELU" if activation == "gelu" else ""
    return {"name": name, "kind": "linear", "shape": [m, k, n], "activation": activation, "file": file}


def _encoder(name: str, model: Mapping[str, int], tokens: int) -> dict[str, Any]:
    file = name.split(",")[0].lower().replace(" ", "-")
    return {"name": f"{name}, {tokens} tokens", "kind": "encoder", "model": model, "tokens": tokens, "file": file}


MINILM_16, MINILM_128 = _encoder("MiniLM-L6", MINILM, 16), _encoder("MiniLM-L6", MINILM, 128)
BERT_16, BERT_128 = _encoder("BERT-base, 2 layers", BERT, 16), _encoder("BERT-base, 2 layers", BERT, 128)
WORKS = [
    _linear(1, 768, 768),
    _linear(32, 768, 768),
    _linear(128, 768, 3072),
    _linear(128, 768, 3072, "gelu"),
    MINILM_16,
    MINILM_128,
    BERT_16,
    BERT_128,
]
OURS, OURS_INT8 = "torch_ext bf16", "torch_ext int8"
ONNX_INT8 = "ONNX Runtime int8"
BF16_PEERS = ("PyTorch bf16", "ONNX Runtime bf16")
PEERS = (*BF16_PEERS, "PyTorch fp32", "ONNX Runtime fp32", ONNX_INT8)
# Millions of instructions, at most: 1 % more than were counted when this was set. Lower them with the counts.
BARS = {
    ("linear 1x768x768", OURS): 0.168,
    ("linear 32x768x768", OURS): 1.52,
    ("linear 128x768x3072 + GELU", OURS): 25.3,
    ("MiniLM-L6, 16 tokens", OURS): 15.7,
    ("MiniLM-L6, 128 tokens", OURS): 135.4,
    ("linear 128x768x3072", OURS_INT8): 12.72,
    ("MiniLM-L6, 16 tokens", OURS_INT8): 10.28,
    ("MiniLM-L6, 128 tokens", OURS_INT8): 92.0,
}
# Over the count of the best peer, at most.
RATIOS = {
    (BERT_16["name"], OURS): 0.565,
    (BERT_128["name"], OURS): 0.551,
    (BERT_16["name"], OURS_INT8): 0.524,
    (BERT_128["name"], OURS_INT8): 0.537,
}
BFMMLA_SHARE = ("linear 128x768x3072", OURS, 0.60)


@dataclass
class Found:
    """What was found of one work by one engine.

    Attributes:
        work: its name.
        engine: name of the engine.
        counts: executed instructions by class; ``total`` is their sum.
        cycles: modelled cycles by CPU.
    """

    work: str
    engine: str
    counts: dict[str, int]
    cycles: dict[str, float] = field(default_factory=dict)


def bars(found: Sequence[Found], peers: bool) -> list[report.Bar]:
    """The project's promises on what was counted; those of int8 only where this torch_ext has it."""
    totals = {(item.work, item.engine): item.counts["total"] / 1e6 for item in found}
    shares = {(item.work, item.engine): item.counts["bfmmla"] / item.counts["total"] for item in found}
    has_int8 = any(item.engine == OURS_INT8 for item in found)
    lines = [
        report.Bar(f"M instructions, {engine}, {work}", totals.get((work, engine)), limit, at_least=False)
        for (work, engine), limit in BARS.items()
        if engine == OURS or has_int8
    ]
    work, engine, least = BFMMLA_SHARE
    lines.append(report.Bar(f"share of BFMMLA, {engine}, {work}", shares.get((work, engine)), least))
    for (work, engine), ratio in RATIOS.items() if peers else ():
        if engine == OURS_INT8 and not has_int8:
            continue
        others = [
            totals[work, peer] for peer in (BF16_PEERS if engine == OURS else (ONNX_INT8,)) if (work, peer) in totals
        ]
        mine = totals.get((work, engine))
        value = mine / min(others) if mine and others else None
        lines.append(report.Bar(f"M instructions, {engine} / best peer, {work}", value, ratio, at_least=False))
    return lines


def text_of(data: Mapping[str, Any], found: Sequence[Found]) -> str:
    """The tables."""
    engines = list(dict.fromkeys(item.engine for item in found))
    works = [work["name"] for work in WORKS]
    by_pair = {(item.work, item.engine): item for item in found}

    def millions(value: float | None) -> str:
        return "" if value is None else f"{value / 1e6:.2f}"

    def matrix(value_of: Any) -> str:
        rows = [
            [work, *(value_of(by_pair[work, name]) if (work, name) in by_pair else "" for name in engines)]
            for work in works
        ]
        return report.markdown(["work", *engines], rows)

    parts = [
        "# Instructions and modelled cycles",
        data["heading"],
        "Counts of an emulator and figures of a model, not times: neither knows caches, memory, frequency. One thread.",
        "## Executed instructions, millions",
        matrix(lambda item: millions(item.counts["total"])),
    ]
    if any(item.cycles for item in found):
        parts += [
            "## Modelled cycles, millions",
            (
                f"llvm-mca on the blocks that make {data['covered']:.0%} of the instructions executed, each as if it "
                "followed upon itself, with every load a hit and every branch foreseen. The code is always that which "
                f"ran on the emulated {data['cpu']} (vectors of 128 bits)."
            ),
        ]
        for cpu in CPUS:
            parts += [f"### {cpu}", matrix(lambda item, cpu=cpu: millions(item.cycles.get(cpu)))]
    classes = [name for name in next(iter(found)).counts if name != "total"]
    classes = [name for name in classes if any(item.counts[name] for item in found)]
    parts += [
        "## By class, millions",
        report.markdown(
            ["work, engine", "total", *classes],
            [
                [f"{work}, {name}", *(millions(by_pair[work, name].counts[key]) for key in ("total", *classes))]
                for work in works
                for name in engines
                if (work, name) in by_pair
            ],
        ),
        "\n".join(f"- left out: {name}: {why}" for name, why in data["left_out"].items()),
        "## Bars",
        "```\n" + "\n".join(bar.line() for bar in data["bars"]) + "\n```",
    ]
    return "\n\n".join(part for part in parts if part)


def panels_of(found: Sequence[Found]) -> list[report.Panel]:
    """The plot: instructions, and cycles on each CPU, of every engine beside torch_ext in bf16."""
    engines = list(dict.fromkeys(item.engine for item in found))
    works = [work["name"] for work in WORKS]
    by_pair = {(item.work, item.engine): item for item in found}

    def panel(title: str, value_of: Any) -> report.Panel:
        series: dict[str, list[float | None]] = {}
        for name in engines:
            values: list[float | None] = []
            for work in works:
                mine, base = by_pair.get((work, name)), by_pair.get((work, OURS))
                values.append(value_of(mine) / value_of(base) if mine and base else None)
            series[name] = values
        return report.Panel(title, f"times those of {OURS} (less is better)", works, series, logarithmic=True)

    panels = [panel("executed instructions", lambda item: item.counts["total"])]
    if any(item.cycles for item in found):
        panels += [panel(f"modelled cycles, {cpu}", lambda item, cpu=cpu: item.cycles[cpu]) for cpu in CPUS]
    return panels
