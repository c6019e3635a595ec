"""Adds the metrics of several processes up, in Prometheus' text format."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping

__all__ = ["counted", "labelled", "merge", "of_process", "write_rows"]

_Combine = Callable[[float, float], float]

_GAUGES: Mapping[str, _Combine] = {
    "serve_model_info": max,
    "serve_ready": max,
    "serve_queue_wait_seconds": max,
    "process_start_time_seconds": min,
    "process_max_fds": min,
}
"""How gauges are combined whose sum says nothing; of others it is the sum."""

_LASTING = ("counter", "histogram")
"""Types whose values outlive the process that counted."""


class _Family:
    """What a name has: its comments, its type, and its samples in their order."""

    def __init__(self) -> None:
        self.head: list[str] = []
        self.type = "untyped"
        self.samples: dict[str, float] = {}


def _parse(text: bytes) -> dict[str, _Family]:
    """The families of a text; samples follow the comments of their family."""
    families: dict[str, _Family] = {}
    family = _Family()
    for line in text.decode().split("\n"):  # The only end of a line of this format: values of labels may hold others.
        if line.startswith("# "):
            _, what, name, *rest = line.split(" ", 3)
            family = families.setdefault(name, _Family())
            if line not in family.head:
                family.head.append(line)
            if what == "TYPE":
                family.type = rest[0]
        elif line:
            sample, _, value = line.rpartition(" ")
            family.samples[sample] = float(value)
    return families


def _sum(texts: Iterable[bytes]) -> dict[str, _Family]:
    total: dict[str, _Family] = {}
    for text in texts:
        for name, family in _parse(text).items():
            known = total.setdefault(name, family)
            if known is family:
                continue
            combine: _Combine = _GAUGES.get(name, operator.add)
            for sample, value in family.samples.items():
                known.samples[sample] = combine(known.samples[sample], value) if sample in known.samples else value
    return total


def _write(families: Mapping[str, _Family]) -> bytes:
    lines: list[str] = []
    for family in families.values():
        lines += family.head
        lines += (f"{sample} {_number(value)}" for sample, value in family.samples.items())
    return "".join(f"{line}\n" for line in lines).encode()


def _number(value: float) -> str:
    return (
        repr(float(value))
        if value == value and abs(value) != float("inf")
        else {1: "+Inf", -1: "-Inf"}.get((value > 0) - (value < 0), "NaN")
    )


def merge(texts: Iterable[bytes]) -> bytes:
    """The metrics of several processes as those of one: counters and histograms are sums, and so are most gauges."""
    return _write(_sum(texts))


def counted(texts: Iterable[bytes]) -> bytes:
    """What processes that have ended leave behind: the sums of their counters and histograms."""
    return _write({name: family for name, family in _sum(texts).items() if family.type in _LASTING})


def labelled(text: bytes, model: str) -> bytes:
    """The metrics of one model of several: with its name as the label `model`, and without those of the process.

    Args:
        text: What was counted.
        model: Its name.
    """
    families = {name: family for name, family in _parse(text).items() if not name.startswith("process_")}
    value = model.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    for family in families.values():
        family.samples = {_with_model(sample, value): number for sample, number in family.samples.items()}
    return _write(families)


def _with_model(sample: str, value: str) -> str:
    name, brace, labels = sample.partition("{")
    if labels.startswith("model="):
        return sample
    return f'{name}{{model="{value}"' + (f",{labels}" if brace else "}")


def of_process(text: bytes) -> bytes:
    """The metrics of the process among those of a model."""
    return _write({name: family for name, family in _parse(text).items() if name.startswith("process_")})


def write_rows(rows: Iterable[tuple[str, str, str, int]]) -> bytes:
    """Metrics without labels: name, type, what it counts, value."""
    return "".join(
        f"# HELP {name} {what}\n# TYPE {name} {kind}\n{name} {value}\n" for name, kind, what, value in rows
    ).encode()
