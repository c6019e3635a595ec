"""One page on some runs, without network: curves, percentiles over time, stages in the server, cost; and as JSON."""

from __future__ import annotations

import html
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.options import CannotStartError

from .charts import Line, bars, lines
from .prices import Price, cost_per_million
from .record import percentile_of

__all__ = ["Source", "choose_prices", "report_data", "report_html"]

_MOST_PLACES = 300
"""Points of a line over time, at most: longer runs are drawn by several seconds each."""

_PERCENTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


@dataclass(frozen=True)
class Source:
    """A result and how the page calls it.

    Attributes:
        name: Name of its file, without what all have in common.
        result: In one of the forms of `schema`.
        price: Of the machine that was measured, if it is known.
    """

    name: str
    result: Mapping[str, Any]
    price: Price | None = None

    @property
    def is_run(self) -> bool:
        """Whether this is a run rather than a search."""
        return "series" in self.result


def choose_prices(prices: Sequence[Price], wanted: Sequence[str], count: int) -> list[Price | None]:
    """The price for each result.

    Args:
        prices: Of the user's file.
        wanted: Instances that ``--instance`` names: one for all results, or one for each.
        count: How many results there are.

    Raises:
        CannotStartError: It is not clear which machine was measured.
    """
    if not prices:
        if wanted:
            raise CannotStartError("--instance: expected --prices, a file with the price of this machine")
        return [None] * count
    by_name = {price.instance: price for price in prices}
    if not wanted and len(prices) == 1:
        wanted = [prices[0].instance]
    if len(wanted) not in (1, count) or any(name not in by_name for name in wanted):
        raise CannotStartError(
            f"--instance: expected the machine that was measured, once or for each of {count} results, out of "
            f"{', '.join(by_name)}; got {', '.join(wanted) or 'none'}"
        )
    names = [*wanted] * count if len(wanted) == 1 else wanted
    return [by_name[name] for name in names]


def _best(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The point with the most texts per second that kept the limits and is not void."""
    kept = [point for point in result["points"] if point["kept"] and not point.get("void")]
    if "missed_per_s" in result:
        # A trial above the knee kept the limits by luck: a longer one did not.
        kept = [point for point in kept if point["rate"] <= (result["knee_per_s"] or 0)]
    return max(kept, key=lambda point: point["texts_per_s"], default=None)


def report_data(sources: Sequence[Source]) -> dict[str, Any]:
    """What the page says, as numbers."""
    rows = []
    for source in sources:
        best, price = _best(source.result), source.price
        cost = cost_per_million(price, best["texts_per_s"]) if price and best else None
        rows.append(
            {
                "name": source.name,
                "kind": "run" if source.is_run else "knee",
                "exit_code": source.result["exit_code"],
                "void": source.result["void"],
                "notes": source.result.get("notes", []),
                "path": source.result["server"]["path"],
                "model": source.result["server"]["model"],
                "objectives": source.result["objectives"],
                "knee_per_s": source.result["knee_per_s"],
                "best_kept": best,
                "summary": source.result.get("summary"),
                "points": source.result["points"],
                "cost": {
                    "instance": price.instance,
                    "per_hour": price.per_hour,
                    "currency": price.currency,
                    "note": price.note,
                    "per_million_texts": cost,
                }
                if price
                else None,
                "created": source.result["created"],
                "versions": source.result["versions"],
                "command": source.result["command"],
            }
        )
    return {"format": "torch-ext-loadtest-report/1", "results": rows}


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{shown}{unit}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML already."""
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _verdict(result: Mapping[str, Any]) -> str:
    word, kind = {0: ("kept", "good"), 1: ("missed", "bad"), 2: ("void", "bad")}[result["exit_code"]]
    return f'<span class="{kind}">{word}</span>'


def _figures(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the overview shows of a result: its best point, its only one, or the whole run where the rate changed."""
    points = result["points"]
    if best := _best(result) or (points[0] if len(points) == 1 else None):
        return best
    if points or "summary" not in result:
        return {}
    summary = result["summary"]
    latency = {f"{name}_ms": summary["latency_ms"].get(name) for name, _ in _PERCENTILES}
    return {"answered_per_s": summary["requests_per_s"], "texts_per_s": summary["texts_per_s"], **latency}


def _overview(sources: Sequence[Source]) -> str:
    rows = []
    for source in sources:
        shown = _figures(source.result)
        summary = source.result.get("summary")
        rows.append(
            [
                _text(source.name),
                _verdict(source.result),
                _number(source.result["knee_per_s"]),
                *(_number(shown.get(f"{name}_per_s")) for name in ("answered", "texts")),
                *(_number(shown.get(f"{name}_ms")) for name, _ in _PERCENTILES),
                _number(100 * ((summary or shown).get("error_rate") or 0) if summary or shown else None, " %"),
            ]
        )
    head = ("result", "limits", "knee, 1/s", "answered/s", "texts/s", "p50 ms", "p95 ms", "p99 ms", "errors")
    note = (
        "Rates and percentiles are those of the fastest point that kept the limits, of the only one, or of the whole "
        "run where the rate changed."
    )
    voids = "".join(
        f'<p class="bad">{_text(source.name)} is void: {_text(reason)}</p>'
        for source in sources
        for reason in source.result["void"]
    )
    notes = "".join(
        f'<p class="bad">{_text(source.name)}: {_text(said)}</p>'
        for source in sources
        for said in source.result.get("notes", ())
    )
    return f'{_table(head, rows)}<p class="faint">{note}</p>{notes}{voids}'


def _curve(sources: Sequence[Source]) -> str:
    found, marks = [], []
    for source in sources:
        points = sorted(source.result["points"], key=lambda point: float(point["arrivals_per_s"]))
        if points:
            found.append(
                Line(
                    f"{source.name}, p99",
                    [(point["arrivals_per_s"], point["p99_ms"]) for point in points],
                    [not point["kept"] for point in points],
                )
            )
        if source.result["knee_per_s"] is not None:
            marks.append(
                (source.result["knee_per_s"], f"knee of {source.name}: {_number(source.result['knee_per_s'])}/s")
            )
    if not found:
        return "<p>No result has a point at a steady rate.</p>"
    limits = {source.result["objectives"].get("p99_ms") for source in sources} - {None}
    limit = (limits.pop(), "limit of p99") if len(limits) == 1 else None
    chart = lines(
        "Latency over throughput",
        found,
        x_label="arrivals per second",
        y_label="p99 in ms",
        log=True,
        marks=marks,
        limit=limit,
    )
    return chart + '<p class="faint">Hollow points missed a limit.</p>'


def _over_time(source: Source) -> str:
    series, settings = source.result["series"], source.result["settings"]
    if settings["shape"] == "at-once" and not settings["trace"]:
        return f"<h3>{_text(source.name)}</h3><p>All requests were to start at once.</p>"
    together = max(1, -(-len(series) // _MOST_PLACES))
    groups = [series[start : start + together] for start in range(0, len(series), together)]
    merged: list[tuple[float, Counter[int], float]] = []
    for group in groups:
        counts: Counter[int] = Counter()
        for second in group:
            counts.update(dict(second["latency"]))
        merged.append((group[0]["second"], counts, sum(second["arrivals"] for second in group) / len(group)))
    latency = [
        Line(name, [(moment, percentile_of(counts, part)) for moment, counts, _ in merged])
        for name, part in _PERCENTILES
    ]
    marks = [(settings["warm_up_s"], "end of warm-up")] if settings["warm_up_s"] else []
    rates = [
        Line("arrivals/s", [(moment, arrivals) for moment, _, arrivals in merged]),
        Line(
            "right answers/s",
            [(group[0]["second"], sum(second["good"] for second in group) / len(group)) for group in groups],
        ),
        Line("in flight", [(group[0]["second"], max(second["in_flight"] for second in group)) for group in groups]),
    ]
    seconds = "seconds from the start, by the intended start of the request"
    return (
        f"<h3>{_text(source.name)}</h3>"
        + lines("Percentiles over time", latency, x_label=seconds, y_label="ms", log=True, marks=marks)
        + lines("Load over time", rates, x_label=seconds, y_label="count")
    )


def _stages(sources: Sequence[Source]) -> str:
    rows = []
    for source in sources:
        summary = source.result.get("summary")
        if summary and summary["server_ms"]:
            parts = [(name, float(stage["mean"])) for name, stage in summary["server_ms"].items()]
            rest = float(summary["latency_ms"]["mean"] or 0) - sum(length for _, length in parts)
            rows.append((source.name, [*parts, ("outside these stages", max(0.0, rest))]))
    if not rows:
        return "<p>No result has timing headers of the server.</p>"
    return bars("Mean time of a request by stage", rows, unit="ms")


def _costs(data: Mapping[str, Any]) -> str:
    rows = [
        [
            _text(row["name"]),
            _text(row["cost"]["instance"]),
            f"{_number(row['cost']['per_hour'])} {_text(row['cost']['currency'])}",
            _number(row["best_kept"]["texts_per_s"] if row["best_kept"] else None),
            _number(row["cost"]["per_million_texts"], f" {_text(row['cost']['currency'])}"),
            _text(row["cost"]["note"]),
        ]
        for row in data["results"]
        if row["cost"]
    ]
    if not rows:
        return "<p>No prices: pass a file of your own with --prices.</p>"
    note = (
        '<p class="faint">Prices are those of the file that was given, not of this project. Costs are those of a '
        "machine that is busy all the time at the fastest point that kept the limits.</p>"
    )
    return _table(("result", "instance", "an hour", "texts/s", "a million texts", "note"), rows) + note


def _details(sources: Sequence[Source]) -> str:
    parts = []
    for source in sources:
        result = source.result
        machine, server = result["machine"], result["server"]
        facts = {
            "command": shlex.join(["python", "-m", "loadtest", *result["command"]]),
            "created": result["created"],
            "versions": ", ".join(f"{name} {value}" for name, value in result["versions"].items()),
            "generator": f"{machine['name']}, {machine['cpus']} CPUs, {result['workers']} process(es)",
            "server": f"{result['settings']['host']}{server['path']}, model {server['model'] or '?'}",
            "limits": json.dumps(result["objectives"]),
            "seed": result["settings"]["seed"],
        }
        text = "\n".join(f"{name:10} {value}" for name, value in facts.items())
        said = [f"{'kept' if limit['kept'] else 'MISSED'}  {limit['message']}" for limit in result.get("limits", ())]
        text += "\n" + "\n".join([*said, *result.get("messages", ())])
        parts.append(f"<details><summary>{_text(source.name)}</summary><pre>{_text(text)}</pre></details>")
    return "".join(parts)


def report_html(sources: Sequence[Source]) -> str:
    """The page; it loads nothing."""
    data = report_data(sources)
    style = (Path(__file__).with_name("report.css")).read_text(encoding="utf-8")
    runs = [source for source in sources if source.is_run]
    sections = {
        "Overview": _overview(sources),
        "Throughput and latency": _curve(sources),
        "Over time": "".join(map(_over_time, runs)) or "<p>No result is a run.</p>",
        "Where the time goes": _stages(sources),
        "Cost": _costs(data),
        "How the numbers were made": _details(sources),
    }
    body = "".join(f"<h2>{name}</h2>{content}" for name, content in sections.items())
    inside = json.dumps(data).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Load test</title><style>{style}</style></head><body><h1>Load test</h1>"
        f'<p class="faint">Latency counts from the intended start of each request.</p>{body}'
        f'<script type="application/json" id="data">{inside}</script></body></html>\n'
    )
