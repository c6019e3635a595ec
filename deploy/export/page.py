"""`report.html`: a page with what an export measured, in one file that loads nothing.

Charts are SVG inside of it. Colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deploy.bundle import Manifest, Variant
from deploy.export.progress import megabytes
from deploy.tasks.bounds import SHOWN

__all__ = ["REPORT_FILE", "render", "write_page"]

REPORT_FILE = "report.html"

_CSS = Path(__file__).with_name("page.css")
_COLOURS = 5
_WIDTH = 720
_SMALLEST = 1e-7
"""Errors below are drawn there: fp32 has no smaller ones."""


def write_page(manifest: Manifest) -> Path:
    """Writes the page of a bundle into its folder.

    Args:
        manifest: With everything but the page's own entry.
    """
    path = manifest.root / REPORT_FILE
    path.write_text(render(manifest), encoding="utf-8")
    return path


def render(manifest: Manifest) -> str:
    """The page as HTML."""
    variants = list(manifest.variants.values())
    verified = manifest.verification
    reference, source = str(verified.get("reference", "fp32")), str(verified.get("source", "unknown"))
    count, length = verified.get("texts", 0), verified.get("mean_tokens", 0)
    lead = (
        f"{manifest.model.architecture}, {manifest.task}, at most {manifest.max_tokens} tokens. Each variant was "
        f"compared with {reference} on {count} texts ({source}, {length} tokens on average)."
    )
    parts = [
        f"<h1>{escape(manifest.model.name)}</h1>\n<p>{escape(lead)}</p>",
        _overview(manifest, variants),
        _section("Size", "Of everything that a variant loads.", _bars(variants, _bytes, megabytes)),
        _speed(manifest, variants),
        _distributions(variants),
        _tried(manifest, variants),
        _versions(manifest),
    ]
    body = "\n".join(part for part in parts if part)
    title = escape(f"{manifest.model.name}: export report")
    # Nothing is loaded, whatever is in the names that the page shows.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{title}</title>\n<style>\n{_CSS.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _section(title: str, text: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n<p>{escape(text)}</p>\n{content}" if content else ""


def _colour(place: int) -> str:
    return f"var(--c{place % _COLOURS})"


def _key(place: int) -> str:
    return f'<span class="key" style="background:{_colour(place)}"></span>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _overview(manifest: Manifest, variants: Sequence[Variant]) -> str:
    measured = {name for item in variants if item.accuracy is not None for name in item.accuracy.details}
    shown = {name: title for name, title in SHOWN.items() if name in measured}
    metric = next((item.accuracy.metric for item in variants if item.accuracy is not None), "accuracy")
    rows = []
    for place, item in enumerate(variants):
        accuracy = item.accuracy
        figures = [accuracy and accuracy.mean, accuracy and accuracy.min]
        figures += [None if accuracy is None else accuracy.details.get(name) for name in shown]
        cells = ["-" if value is None else f"{value:.6f}" for value in figures]
        speed = "-" if item.speed is None else f"{item.speed.texts_per_s:.0f}"
        rows.append([f"{_key(place)}{escape(item.name)}", megabytes(item.bytes), *cells, speed])
    text = "Figures are means over the texts, and the worst text."
    if (own := manifest.verification.get("eval")) is not None:
        text += f" --eval is the {own['metric']} on {own['examples']} examples of {own['file']}, which transformers in "
        text += f"fp32 answers with {own['reference']:.6f}."
    if manifest.machine is not None:
        text += f" Measured on {manifest.machine}."
    head = ["variant", "size", f"{metric}, mean", "worst", *shown.values(), "texts/s"]
    return _section("Variants", text, _table(head, rows))


def _bytes(variant: Variant) -> float:
    return variant.bytes


def _bars(variants: Sequence[Variant], value: Any, label: Any, baseline: tuple[str, float] | None = None) -> str:
    """Horizontal bars, one for each variant that has a value."""
    rows = [(item.name, value(item), _colour(place)) for place, item in enumerate(variants)]
    if baseline is not None:
        rows.append((*baseline, "var(--soft)"))
    rows = [row for row in rows if row[1]]
    if not rows:
        return ""
    left, right, step = 170, 90, 30
    scale = (_WIDTH - left - right) / max(amount for _, amount, _ in rows)
    drawn = []
    for place, (name, amount, colour) in enumerate(rows):
        top = place * step + 4
        width = max(1.0, amount * scale)
        drawn.append(
            f'<text x="{left - 10}" y="{top + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left}" y="{top}" width="{width:.1f}" height="22" rx="3" style="fill:{colour}"/>'
            f'<text class="soft" x="{left + width + 8:.1f}" y="{top + 15}">{escape(label(amount))}</text>'
        )
    height = len(rows) * step
    return f'<figure><svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(drawn)}</svg></figure>'


def _speed(manifest: Manifest, variants: Sequence[Variant]) -> str:
    measured = [item.speed for item in variants if item.speed is not None]
    if not measured:
        return ""
    baseline = manifest.verification.get("reference_texts_per_s")
    text = (
        f"Texts per second without the tokenizer, {measured[0].threads} threads on {measured[0].cpu}, in batches of "
        f"{measured[0].batch} at most. A quick measurement: another machine has another order."
    )
    bars = _bars(
        variants,
        lambda item: 0 if item.speed is None else item.speed.texts_per_s,
        lambda amount: f"{amount:.0f} texts/s",
        ("transformers fp32", float(baseline)) if baseline else None,
    )
    return _section("Speed", text, bars)


def _distributions(variants: Sequence[Variant]) -> str:
    """Cumulative curves: how many texts have at most an error."""
    curves = [
        (place, item.name, item.accuracy)
        for place, item in enumerate(variants)
        if item.accuracy is not None and item.accuracy.quantiles
    ]
    if not curves:
        return ""
    metric = curves[0][2].metric
    left, top, width, height = 56, 12, _WIDTH - 76, 240
    low, high = math.log10(_SMALLEST), 0.0

    def across(error: float) -> float:
        return left + width * (math.log10(min(1.0, max(_SMALLEST, error))) - low) / (high - low)

    drawn = []
    for power in range(round(low), 1):
        x = across(10.0**power)
        name = "0" if power == round(low) else "1" if power == 0 else f"1e{power}"
        drawn.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + height}"/>'
            f'<text class="soft" x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{name}</text>'
        )
    for share in (0, 25, 50, 75, 100):
        y = top + height * (1 - share / 100)
        drawn.append(
            f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="soft" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{share} %</text>'
        )
    for place, name, accuracy in curves:
        # The worst text comes first, and has the largest error.
        values = list(reversed(accuracy.quantiles))
        last = max(1, len(values) - 1)
        points = [(across(1 - value), top + height * (1 - index / last)) for index, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append(
            f'<polyline points="{path}" style="fill:none;stroke:{_colour(place)};stroke-width:2.5"/>'
            f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="4" style="fill:{_colour(place)}">'
            f"<title>{escape(name)}: worst text {accuracy.min:.6f}</title></circle>"
        )
    keys = "&emsp;".join(f"{_key(place)}{escape(name)}" for place, name, _ in curves)
    text = f"Share of texts whose {metric} is at most so far from 1. Further left is better; the dot is the worst text."
    chart = f'<svg viewBox="0 0 {_WIDTH} {top + height + 28}" role="img">{"".join(drawn)}</svg>'
    return _section("Accuracy, text by text", text, f"<figure>{chart}<figcaption>{keys}</figcaption></figure>")


def _tried(manifest: Manifest, variants: Sequence[Variant]) -> str:
    parts = []
    left_out: Mapping[str, Any] = manifest.verification.get("left_out") or {}
    for name, reason in left_out.items():
        parts.append(f'<p><strong>{escape(name)}</strong> <span class="bad">left out</span>: {escape(str(reason))}</p>')
    for item in variants:
        found = item.quantization
        if found.get("tries"):
            rows = [
                [
                    str(each["layers_in_fp32"]),
                    f"{each['mean']:.6f}",
                    f"{each['min']:.6f}",
                    escape(each["missed"]) or "kept",
                ]
                for each in found["tries"]
            ]
            parts.append(f"<p>{escape(item.name)}: its most sensitive layers stay in fp32, as many as are needed.</p>")
            parts.append(_table(["layers in fp32", "mean", "worst", "bounds"], rows))
        if found.get("layers"):
            rows = [
                [escape(", ".join(layer["names"])), f"{layer['damage']:.6f}", "bf16" if layer["kept"] else "int8"]
                for layer in found["layers"]
            ]
            parts.append(f"<p>{escape(item.name)}: what int8 does to the mean cosine, one layer at a time.</p>")
            parts.append(_table(["layer", "damage alone", "stored in"], rows))
        elif found.get("int8"):
            whole = found["int8"]
            parts.append(
                f"<p>{escape(item.name)}: all linear layers in int8 at once were accurate enough: cosine to fp32 "
                f"{whole['mean']:.6f} on average, {whole['min']:.6f} at worst.</p>"
            )
    bounds = [
        [escape(item.name), escape(name), f"{bound:g}"]
        for item in variants
        if item.accuracy is not None
        for name, bound in item.accuracy.bound.items()
    ]
    if bounds:
        parts.append("<p>Bounds that each variant kept:</p>")
        parts.append(_table(["variant", "figure", "bound"], bounds))
    return _section("What was tried", "Layers, variants and bounds.", "\n".join(parts)) if parts else ""


def _versions(manifest: Manifest) -> str:
    rows = [[escape(name), escape(version)] for name, version in manifest.created_with.items()]
    rows += [
        [f"kernels of {escape(item.name)}", escape(item.kernels)] for item in manifest.variants.values() if item.kernels
    ]
    if manifest.model.revision:
        rows.append(["revision of the model", f"<code>{escape(manifest.model.revision)}</code>"])
    return _section("Made with", "Versions of what wrote and measured the bundle.", _table(["what", "version"], rows))
