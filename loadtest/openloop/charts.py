"""Charts as inline SVG: lines over numbers, and stacked bars. Colours are those of the page (report.css)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Line", "bars", "lines"]

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 44


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: In the legend.
        points: Where it goes; a place without a number interrupts it.
        missed: Whether each point missed its limits; such points are drawn hollow. Empty if that is not asked.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    missed: Sequence[bool] = ()


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from `low` to `high`."""
    step = 10 ** math.floor(math.log10(max((high - low) / count, 1e-9)))
    for factor in (1, 2, 5, 10):
        if (high - low) / (factor * step) <= count:
            step *= factor
            break
    return [round(number * step, 9) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; other round numbers where these are too few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    found = [number for number in found if low <= number <= high]
    return found if len(found) >= 3 else [number for number in _ticks(low, high) if number > 0]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<span><i class="s{index % 8}"></i>{html.escape(name)}</span>' for index, name in enumerate(names))
    return f'<p class="legend">{items}</p>'


def _frame(title: str, inside: str, legend: Sequence[str]) -> str:
    return (
        f'<figure>{_legend(legend)}<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{inside}</svg></figure>"
    )


def _alone(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """Points without a neighbour: a line has no length there, so they are drawn as dots."""
    heights = [None, *(y for _, y in points), None]
    neighbours = zip(points, heights, heights[2:], strict=False)
    return [(x, y) for (x, y), before, after in neighbours if y is not None and before is None and after is None]


def lines(
    title: str,
    found: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    limit: tuple[float, str] | None = None,
) -> str:
    """A chart of lines.

    Args:
        title: For those who cannot see it.
        found: The lines, at most eight of different colours.
        x_label: What goes to the right, with its unit.
        y_label: What goes up, with its unit.
        log: Whether the upward axis is logarithmic.
        marks: Places on the axis to the right that get a dashed line, and their names.
        limit: A height that gets a dashed line, and its name.

    Returns:
        HTML; a sentence if there is nothing to draw.
    """
    points = [(x, y) for line in found for x, y in line.points if y is not None and (y > 0 or not log)]
    if not points:
        return "<p>Nothing to draw: no right answers.</p>"
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_x = min(low_x, 0.0) if low_x < 0.3 * high_x else low_x
    high_x = max([high_x, *(x for x, _ in marks)])
    high_x = high_x if high_x > low_x else low_x + 1
    heights = [y for _, y in points] + ([limit[0]] if limit else [])
    low_y, high_y = (0.8 * min(heights) if log else 0.0), 1.08 * max(heights)
    high_y = high_y if high_y > low_y else low_y + 1

    def across(x: float) -> float:
        return _LEFT + (x - low_x) / (high_x - low_x) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        part = math.log(y / low_y) / math.log(high_y / low_y) if log else (y - low_y) / (high_y - low_y)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in _powers(low_y, high_y) if log else _ticks(low_y, high_y):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        )
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{up(tick) + 4:.1f}">{_number(tick)}</text>')
    for tick in _ticks(low_x, high_x, 8):
        parts.append(f'<text class="middle" x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}">{_number(tick)}</text>')
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM}"/>'
    )
    parts.append(
        f'<text class="middle" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}">{html.escape(x_label)}</text>'
    )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text class="middle" transform="translate(14 {middle}) rotate(-90)">{html.escape(y_label)}</text>')
    if limit:
        height = up(limit[0])
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text class="note" x="{_LEFT + 4}" y="{height - 4:.1f}">{html.escape(limit[1])}</text>')
    for index, (x, name) in enumerate(marks):
        place = across(x)
        parts.append(f'<line class="limit" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        # To the left of its line where there is room: curves of latency leave the upper left free.
        anchor, shift = ("note end", -4) if place > 0.35 * _WIDTH else ("note", 4)
        at = f'x="{place + shift:.1f}" y="{_TOP + 10 + 14 * index}"'
        parts.append(f'<text class="{anchor}" {at}>{html.escape(name)}</text>')
    for index, line in enumerate(found):
        path, pen = [], "M"
        for x, y in line.points:
            if y is None or (log and y <= 0):
                pen = "M"
            else:
                path.append(f"{pen}{across(x):.1f} {up(y):.1f}")
                pen = "L"
        parts.append(f'<path class="line s{index % 8}" d="{" ".join(path)}"/>')
        for x, y in _alone(line.points):
            if y > 0 or not log:
                parts.append(f'<path class="line dot s{index % 8}" d="M{across(x):.1f} {up(y):.1f}h0"/>')
        for (x, y), missed in zip(line.points, line.missed, strict=False):
            if y is not None and (y > 0 or not log):
                kind = "missed" if missed else "kept"
                name = f"{line.name}: {y:.4g} at {x:.4g}, {kind}"
                parts.append(
                    f'<circle class="s{index % 8} {kind}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="4"><title>'
                    f"{html.escape(name)}</title></circle>"
                )
    return _frame(title, "".join(parts), [line.name for line in found])


def bars(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, unit: str) -> str:
    """Horizontal bars, each of parts in a row.

    Args:
        title: For those who cannot see it.
        rows: Name of each bar, and its parts: name and length.
        unit: Of the lengths.

    Returns:
        HTML.
    """
    names = list(dict.fromkeys(name for _, parts in rows for name, _ in parts))
    longest = max((sum(length for _, length in parts) for _, parts in rows), default=0.0) or 1.0
    found = []
    for row, parts in rows:
        pieces = "".join(
            f'<b class="s{names.index(name) % 8}" style="width:{100 * length / longest:.2f}%" '
            f'title="{html.escape(name)} {length:.4g} {html.escape(unit)}"></b>'
            for name, length in parts
        )
        said = ", ".join(f"{name} {length:.4g} {unit}" for name, length in parts)
        found.append(f"<dt>{html.escape(row)}</dt><dd><div>{pieces}</div><small>{html.escape(said)}</small></dd>")
    return f'<figure aria-label="{html.escape(title)}">{_legend(names)}<dl class="bars">{"".join(found)}</dl></figure>'
