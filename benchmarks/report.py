"""What every benchmark writes: where it ran, tables in Markdown, plots as SVG and PNG, bars that pass or fail."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.machine import cpu_name

__all__ = [
    "RESULTS",
    "Bar",
    "Curves",
    "Panel",
    "commit",
    "cpu_name",
    "heading",
    "machine",
    "markdown",
    "plot",
    "plot_curves",
    "versions",
    "write",
]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_COLOURS = ("#0b6e4f", "#c8553d", "#588b8b", "#f28f3b", "#30638e", "#8d6a9f", "#6c757d", "#d1b000", "#a44a3f")


def commit(root: Path = ROOT) -> str:
    """Short hash of the commit that is checked out, ``+changes`` behind it if files differ from it."""
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        # What a benchmark writes is no change of what it measures.
        differs = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found}+changes" if differs else found


def versions(*packages: str) -> dict[str, str]:
    """Versions of the distributions that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line(words: Sequence[str]) -> str:
    """A command as results show it: of absolute paths the last part, since where files are on a machine is private."""
    return shlex.join(Path(word).name if word.startswith("/") else word for word in words)


def machine(
    command: Sequence[str], packages: Iterable[str] = ("torch", "transformers", "onnxruntime")
) -> dict[str, Any]:
    """Where and how a benchmark ran.

    Args:
        command: what was run, words.
        packages: distributions whose versions matter.
    """
    import torch_ext

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {**versions(*packages), "torch_ext": torch_ext.__version__},
        "isa": torch_ext.isa_report(),
        "command": command_line(command),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def heading(facts: Mapping[str, Any]) -> str:
    """The facts of :func:`machine` as a paragraph."""
    used = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores ({facts['architecture']}, {facts['system']}); "
        f"Python {facts['python']}, {used}. `{facts['command']}`, commit {facts['commit']}, {facts['date']}."
    )


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table, its columns padded so that it reads well as plain text too; the first column is text, others numbers.

    Args:
        columns: headings.
        rows: cells; None becomes an empty one.
    """
    cells = [[str(column) for column in columns]]
    cells += [["" if cell is None else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    if any(len(row) != len(columns) for row in cells):
        raise ValueError(f"expected {len(columns)} cells in every row, got {[len(row) for row in cells]}")
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = []
    for number, row in enumerate(cells):
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(padded) + " |")
        if number == 0:
            rules = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
            lines.append("| " + " | ".join(rules) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Bar:
    """A promise, and what was found.

    Attributes:
        what: the quantity.
        value: what was found; None if it could not be found, which breaks the promise.
        limit: the promise.
        at_least: whether more is better; otherwise the limit is the most.
    """

    what: str
    value: float | None
    limit: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        """Whether the promise is kept. NaN keeps none."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        """One line: verdict, quantity, value, limit."""
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        bound = "at least" if self.at_least else "at most"
        return f"{'pass' if self.passed else 'FAIL'}  {self.what}: {value} ({bound} {self.limit:g})"


@dataclass(frozen=True)
class Panel:
    """One group of bars of a plot.

    Attributes:
        title: above it.
        unit: of the values.
        labels: one for each group.
        series: name to values, one for each label; None leaves a gap.
        logarithmic: scale of the values.
    """

    title: str
    unit: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    logarithmic: bool = False


def plot(panels: Sequence[Panel], title: str, stem: Path) -> list[Path]:
    """Draws panels of horizontal bars as SVG and PNG: one below the other, from four on in two columns.

    A series has the same colour in every panel.

    Args:
        panels: what to draw.
        title: above all of it.
        stem: path of the files without their suffix.

    Returns:
        The files.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    heights = [_height(panel) for panel in panels]
    columns = 2 if len(panels) > 3 else 1
    rows = [max(heights[start : start + columns]) for start in range(0, len(panels), columns)]
    with _figure((9 * columns, sum(rows) + 0.5), title) as figure:
        axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": rows}).flat
        for axis, panel in itertools.zip_longest(axes, panels):
            if panel is None:
                axis.set_visible(False)
            else:
                _draw(axis, panel, colours)
        return _save(figure, stem)


def _height(panel: Panel) -> float:
    """Inches: bars are thinner where they are many."""
    bar = 0.24 if len(panel.series) < 5 else 0.13
    return max(1.0, bar * len(panel.labels) * (len(panel.series) + 0.8)) + 0.9


@contextlib.contextmanager
def _figure(size: tuple[float, float], title: str) -> Iterator[Any]:
    import matplotlib
    from matplotlib.figure import Figure

    # Without dates and random ids, so that equal results are equal files; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "torch-ext", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=10)
        yield figure


def _save(figure: Any, stem: Path) -> list[Path]:
    written = [stem.with_name(f"{stem.name}.svg"), stem.with_name(f"{stem.name}.png")]
    figure.savefig(written[0], metadata={"Date": None})
    figure.savefig(written[1], dpi=150, metadata={"Software": None})
    return written


def _draw(axis: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    count = len(panel.series)
    width = 0.8 / count
    for number, (name, values) in enumerate(panel.series.items()):
        if len(values) != len(panel.labels):
            raise ValueError(f"{panel.title}: expected {len(panel.labels)} values of {name}, got {len(values)}")
        shown = [(index, value) for index, value in enumerate(values) if value is not None]
        places = [index + (number - (count - 1) / 2) * width for index, _ in shown]
        drawn = axis.barh(places, [value for _, value in shown], width * 0.92, color=colours[name], label=name)
        axis.bar_label(drawn, labels=[_short(value) for _, value in shown], padding=2, fontsize=7)
    axis.set_yticks(range(len(panel.labels)), panel.labels)
    axis.invert_yaxis()
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.set_xlabel(panel.unit)
    if panel.logarithmic:
        axis.set_xscale("log")
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    if count > 1:
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


@dataclass(frozen=True)
class Curves:
    """One diagram of curves.

    Attributes:
        title: above it.
        x_unit: of the places.
        y_unit: of the values.
        places: along x.
        series: name to values, one for each place.
    """

    title: str
    x_unit: str
    y_unit: str
    places: Sequence[float]
    series: Mapping[str, Sequence[float]]


def plot_curves(diagrams: Sequence[Curves], title: str, stem: Path) -> list[Path]:
    """Draws curves, two diagrams side by side, as SVG and PNG.

    Args:
        diagrams: what to draw.
        title: above all of it.
        stem: path of the files without their suffix.

    Returns:
        The files.
    """
    rows = (len(diagrams) + 1) // 2
    with _figure((9, 3.2 * rows + 0.4), title) as figure:
        axes = figure.subplots(rows, 2, squeeze=False).ravel()
        for axis, diagram in zip(axes, diagrams, strict=False):
            for (name, values), colour in zip(diagram.series.items(), _COLOURS, strict=False):
                axis.plot(diagram.places, values, label=name, color=colour)
            axis.set_title(diagram.title, fontsize=9, loc="left")
            axis.set_xlabel(diagram.x_unit)
            axis.set_ylabel(diagram.y_unit)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=7, frameon=False)
        for axis in axes[len(diagrams) :]:
            axis.set_visible(False)
        return _save(figure, stem)


def _short(value: float) -> str:
    """Three digits, without an exponent below a million."""
    if value == 0 or abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(stem: Path, text: str, data: Mapping[str, Any], panels: Sequence[Panel], title: str) -> list[Path]:
    """Writes a benchmark's results: ``stem.md``, ``stem.json``, ``stem.svg`` and ``stem.png``.

    Args:
        stem: path without a suffix; its folder is made.
        text: the tables.
        data: everything, for programs.
        panels: of the plot.
        title: of the plot.

    Returns:
        The files.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    table, raw = stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.json")
    table.write_text(text.rstrip() + "\n", encoding="utf-8")
    raw.write_text(json.dumps(data, indent=1, default=_plain) + "\n", encoding="utf-8")
    return [table, raw, *plot(panels, title, stem)]


def _plain(value: Any) -> Any:
    if isinstance(value, Bar):
        return {**asdict(value), "passed": value.passed}
    raise TypeError(f"expected plain data, got {type(value).__name__}")
