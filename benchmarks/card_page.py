"""Pages of result cards: one file each, without scripts and without network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

__all__ = ["card_page", "index_page"]

BASELINE = "PyTorch fp32"

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #0b6e4f; --bad: #b3261e; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
th { text-align: left; font-weight: 600 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.note { padding: .5rem .8rem; border-left: 4px solid var(--bad) } .FAIL { color: var(--bad) }
tr.ours td:first-child { font-weight: 600; color: var(--good) } small { opacity: .75 }
"""


def _page(title: str, body: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>"
    )


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def _table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], text_columns: int = 1) -> str:
    """A table; cells are HTML already, and the first `text_columns` of them are no numbers.

    Args:
        columns: Heads.
        rows: Class of each row, and its cells.
        text_columns: How many are aligned to the left.
    """

    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = ("" if index < text_columns else ' class="number"' for index in range(len(values)))
        return "".join(f"<{tag}{kind}>{value}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    body = "\n".join(f'<tr class="{kind}">{cells("td", values)}</tr>' for kind, values in rows)
    return f"<table><thead><tr>{cells('th', columns)}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _cost(price: float | None, texts_per_s: float | None) -> float | None:
    """Price of a million texts."""
    return price / 3600 / texts_per_s * 1e6 if price and texts_per_s else None


def _warnings(card: Mapping[str, Any]) -> list[str]:
    machine = card["machine"]
    found = []
    if not machine["arm"]:
        found.append(f"Not ARM: measured on {machine['architecture']}.")
    if machine["emulated"]:
        found.append("Emulated: times mean nothing.")
    if card["quick"]:
        found.append("Quick: says that it works, not how fast.")
    if machine["arm"] and not {"bf16", "i8mm"} <= set(machine["features"]):
        found.append("This CPU lacks bf16 or i8mm instructions.")
    return found


def card_page(card: Mapping[str, Any]) -> str:
    """One card.

    Args:
        card: In the form of `card_form.FORM`.
    """
    machine, parts = card["machine"], card["parts"]
    price, currency = machine["price_per_hour"], escape(machine["currency"])
    cost_of = f"{currency} per million texts"
    instance = "an instance of unknown type" if machine["instance"] == "unknown" else machine["instance"]
    body = [f"<h1>{escape(machine['cpu'])}</h1>", f"<p>{escape(card['model'])} on {escape(instance)}</p>"]
    body += [f'<p class="note">{escape(text)}</p>' for text in _warnings(card)]
    facts = {
        "CPUs": str(machine["cpus"]),
        "features": " ".join(machine["features"]) or "none known",
        "memory": f"{machine['memory_mb']} MiB, pages of {machine['page_bytes'] // 1024} KiB",
        "firmware": machine["firmware"],
        "price": "not given" if price is None else f"{price:g} {machine['currency']} per hour",
        "system": f"{card['system']}, Python {card['python']}",
        "versions": ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
        "commit": f"{card['commit']}, {card['date']}",
    }
    body.append(_table(["machine", ""], (("", (escape(name), escape(text))) for name, text in facts.items()), 2))
    if (encoder := parts["encoder"]) is not None:
        base = next((row["texts_per_s"] for row in encoder["rows"] if row["name"] == BASELINE), None)
        rows = [
            (
                "ours" if row["name"].startswith("torch_ext") else "",
                (
                    escape(row["name"]),
                    _number(row["texts_per_s"]),
                    _number(row["texts_per_s"] * encoder["mean_tokens"] / encoder["threads"]),
                    f"{row['texts_per_s'] / base:.2f}x" if base else "",
                    _number(row["latency_ms"]),
                    "" if row["cosine_mean"] is None else f"{row['cosine_mean']:.5f}",
                    _number(_cost(price, row["texts_per_s"])),
                ),
            )
            for row in sorted(encoder["rows"], key=lambda row: -row["texts_per_s"])
        ]
        heads = ["encoder", "texts/s", "tokens/s per core", f"beside {BASELINE}", "one text, ms", "cosine", cost_of]
        body += [f"<h2>Encoder, {encoder['threads']} threads</h2>", _table(heads, rows)]
        if encoder["left_out"]:
            body.append(
                f"<p>Stopped, since they would have taken too long: {escape(', '.join(encoder['left_out']))}.</p>"
            )
    if (knee := parts["knee"]) is not None:
        cost = _cost(price, knee["texts_per_s"])
        cells = (escape(knee["variant"]), f"{knee['slo_p95_ms']:g}", _number(knee["texts_per_s"]), _number(cost))
        heads = ["served", "p95 at most, ms", "texts/s at the knee", cost_of]
        body += [
            "<h2>Server</h2>",
            "<p>Arrivals at random times, one text each; server and load share the machine.</p>",
        ]
        body.append(_table(heads, [("ours", cells)]))
    if (accuracy := parts["accuracy"]) is not None:
        measures = list(next(iter(accuracy["engines"].values()), {}))
        rows = [
            ("ours", (escape(engine), *(f"{values[name]:.5f}" for name in measures)))
            for engine, values in accuracy["engines"].items()
        ]
        body += [
            f"<h2>Accuracy beside fp32, {accuracy['texts']} texts</h2>",
            _table(["engine", *map(escape, measures)], rows),
        ]
    if (doctor := parts["doctor"]) is not None:
        rows = [
            (
                escape(item["status"]),
                (escape(item["status"]), escape(item["name"]), escape(f"{item['detail']} {item['advice']}")),
            )
            for item in doctor["findings"]
        ]
        body += [f"<h2>Doctor: {escape(doctor['status'])}</h2>", _table(["", "", ""], rows, 3)]
    if card["not_run"]:
        rows = [("", (escape(part), escape(why))) for part, why in card["not_run"].items()]
        body += ["<h2>Not run</h2>", _table(["part", "why"], rows, 2)]
    return _page(f"{machine['cpu']}: torch_ext", body)


def index_page(cards: Mapping[str, Mapping[str, Any]]) -> str:
    """All cards, the fastest per core first.

    Args:
        cards: By the stem of their files.
    """
    rows: list[tuple[float, tuple[str, Sequence[str]]]] = []
    for stem, card in cards.items():
        machine, encoder, knee = card["machine"], card["parts"]["encoder"], card["parts"]["knee"]
        ours = [row for row in encoder["rows"] if row["name"].startswith("torch_ext")] if encoder else []
        best = max(ours, key=lambda row: row["texts_per_s"], default=None)
        base = next((row for row in encoder["rows"] if row["name"] == BASELINE), None) if encoder else None
        speed = best["texts_per_s"] if best else None
        per_core = speed * encoder["mean_tokens"] / encoder["threads"] if speed else 0.0
        notes = _warnings(card)
        name = f'<a href="{quote(stem)}.html">{escape(machine["cpu"])}</a>'
        cells = (
            name + (f"<br><small>{escape(' '.join(notes))}</small>" if notes else ""),
            escape(machine["instance"]),
            str(machine["cpus"]),
            escape(best["name"] if best else ""),
            _number(speed),
            _number(per_core),
            f"{speed / base['texts_per_s']:.2f}x" if speed and base else "",
            _number(knee["texts_per_s"] if knee else None),
        )
        rows.append((per_core, ("", cells)))
    heads = ["CPU", "instance", "CPUs", "fastest", "texts/s", "tokens/s per core", f"beside {BASELINE}", "at the knee"]
    body = [
        "<h1>Result cards</h1>",
        "<p><code>make arm-card</code> measures a machine. Each card names its commit, versions and commands.</p>",
    ]
    if rows:
        body.append(_table(heads, [row for _, row in sorted(rows, key=lambda item: -item[0])], 2))
    else:
        body.append("<p>No cards yet.</p>")
    return _page("Result cards of torch_ext", body)
