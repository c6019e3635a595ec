"""Options of the open load test, checked."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.measure import Objectives
from loadtest.options import KEY_VARIABLE, CannotStartError, RequestOptions, flag_of, request_headers, why
from loadtest.tasks import TASKS

from .arrivals import PROCESSES
from .lengths import parse_counts, parse_lengths
from .presets import PRESETS

__all__ = [
    "MOST_PER_S",
    "OBJECTIVES",
    "SHAPES",
    "Settings",
    "add_load_options",
    "add_slo_options",
    "check_effects",
    "read_objectives",
]

SHAPES = ("steady", "soak", "steps", "spike", "diurnal", "at-once")

MOST_PER_S = 1e6
"""Arrivals per second; more than any generator sends."""

OBJECTIVES = {
    "p50_ms": "half of the right answers take at most that long",
    "p95_ms": "95 %% of the right answers take at most that long",
    "p99_ms": "99 %% of the right answers take at most that long",
    "error_rate": "at most that part of the requests fails, 0 to 1 (default: 0; none with a goodput rate)",
    "refused_rate": "at most that part of the requests is refused with status 429, 0 to 1 (default: any, but a refused "
    "request exceeds every limit of latency)",
    "within_ms": "answers that take longer are no goodput",
    "goodput_per_s": "at least so many requests per second are goodput",
    "goodput_rate": "at least that part of the requests is goodput, 0 to 1",
}
"""Limits, by their names in an SLO file, and what they mean; options are called alike."""


@dataclass(frozen=True)
class Settings(RequestOptions):
    """What one run sends, when, and how; the API key is not part of it. Names and units are those of the options."""

    host: str = ""
    inputs_per_request: str = "1"
    lengths: str = "texts"
    ca: str = ""
    shape: str = "steady"
    process: str = "poisson"
    rate: float = 0.0
    rate_to: float = 0.0
    duration_s: float = 30.0
    steps: int = 8
    spike_every_s: float = 60.0
    spike_s: float = 10.0
    day_s: float = 600.0
    count: int = 10_000
    trace: str = ""
    trace_speed: float = 1.0
    connections: int = 16
    max_connections: int = 4096
    max_lag_ms: float = 10.0
    preset: str = ""
    bound_ms: float = 0.0
    least_s: float = 0.0

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Settings:
        """Takes the values of options, and checks them.

        Args:
            values: By name; others are left out, None stands for the default.

        Raises:
            CannotStartError: One is out of range, or does not go with another.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        settings = cls(**{name: value for name, value in values.items() if name in fields and value is not None})
        if settings.shape == "at-once" and not settings.trace:
            settings = dataclasses.replace(settings, warm_up_s=0.0)
        if settings.lengths != "texts" and values.get("max_chars") is None:
            settings = dataclasses.replace(settings, max_chars=0)
        settings.check()
        return settings

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return request_headers(os.environ.get(KEY_VARIABLE, ""))

    def trust(self) -> ssl.SSLContext | None:
        """Which certificates are trusted; None for those of this system.

        Raises:
            CannotStartError: The file of certificates cannot be read.
        """
        if not self.ca:
            return None
        try:
            return ssl.create_default_context(cafile=self.ca)
        except OSError as error:
            raise CannotStartError(f"--ca: expected a file of certificates in PEM, {self.ca}: {error}") from error

    def check(self) -> None:
        """Looks at every value.

        Raises:
            CannotStartError: One is out of range, or does not go with another.
        """
        parse_lengths(self.lengths)
        parse_counts(self.inputs_per_request)
        self._expect("max_chars", self.max_chars >= 0, "at least 0, which cuts none")
        for name in ("text_count", "top_k", "count", "connections", "max_connections"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in ("request_timeout_s", "duration_s", "spike_every_s", "spike_s", "day_s", "trace_speed"):
            self._expect(name, 0 < getattr(self, name) < float("inf"), "more than 0")
        for name in ("max_lag_ms", "max_cpu"):
            self._expect(name, 0 < getattr(self, name) < float("inf"), "a finite number above 0")
        self._expect("warm_up_s", 0 <= self.warm_up_s < float("inf"), "at least 0")
        self._expect("steps", self.steps >= 2, "at least 2")
        if self.trace or self.shape == "at-once":
            return
        expected = f"arrivals per second, more than 0, at most {MOST_PER_S:g}"
        if self.rate == 0:  # The default.
            raise CannotStartError(f"--rate: expected {expected}, got none")
        self._expect("rate", 0 < self.rate <= MOST_PER_S, expected)
        if self.shape in ("steps", "spike", "diurnal"):
            self._expect(
                "rate_to",
                self.rate < self.rate_to <= MOST_PER_S,
                f"more than --rate with --shape {self.shape}, at most {MOST_PER_S:g}",
            )
        if self.shape == "steps":
            step_s = self.duration_s / self.steps
            self._expect("duration_s", step_s >= 3, f"at least 3 s for each of {self.steps} steps")
        if self.shape == "spike":
            self._expect("spike_s", self.spike_s < self.spike_every_s, "less than --spike-every-s")
        if self.warm_up_s >= self.duration_s:
            raise CannotStartError(
                f"the run of {self.duration_s:g} s ends within its warm-up of {self.warm_up_s:g} s: make --duration-s "
                "longer or lower --warm-up-s"
            )

    def _expect(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise CannotStartError(f"{flag_of(name)}: expected {expected}, got {getattr(self, name):g}")


_SHAPED = {
    "rate_to": ("steps", "spike", "diurnal"),
    "steps": ("steps",),
    "spike_every_s": ("spike",),
    "spike_s": ("spike",),
    "day_s": ("diurnal",),
    "count": ("at-once",),
    **dict.fromkeys(("rate", "process", "duration_s", "warm_up_s"), ("steady", "soak", "steps", "spike", "diurnal")),
}
"""Options that only some shapes read."""

_OF_TASKS = {
    "encoding_format": ("openai",),
    "top_k": ("fill-mask",),
    "mask_token": tuple(name for name, task in TASKS.items() if task.needs_mask),
}
"""Options that only some tasks read."""


_NOT_IN_A_SEARCH = (
    "--preset", "--shape", "--steps", "--spike-every-s", "--spike-s", "--day-s", "--count", "--trace", "--trace-speed"
)  # fmt: skip
"""Its trials are steady."""


def check_effects(values: dict[str, Any], settings: Settings, *, search: bool = False) -> None:
    """Refuses options that nothing reads: who gives one expects that it changes the load.

    Args:
        values: Of the options as they were given; None where none was.
        settings: What became of them.
        search: Whether the rates are those of a search for the knee.

    Raises:
        CannotStartError: One has no effect.
    """

    def refuse(name: str, beside: str) -> None:
        if values.get(name):
            raise CannotStartError(f"{flag_of(name)} has no effect {beside}: leave it out")

    for name, tasks in _OF_TASKS.items():
        if settings.task not in tasks:
            refuse(name, f"with --task {settings.task}")
    for name in (*_SHAPED, "shape") if settings.trace else ():
        if name != "warm_up_s":
            refuse(name, "with --trace")
    if settings.trace:
        return
    refuse("trace_speed", "without --trace")
    for name, shapes in _SHAPED.items():
        if settings.shape not in shapes and not (search and name == "rate_to"):
            refuse(name, "in a search, whose trials are steady" if search else f"with --shape {settings.shape}")


def add_load_options(parser: argparse.ArgumentParser, *, search: bool = False, **defaults: float) -> None:
    """Adds what says what is sent, and when.

    Args:
        parser: Of a command.
        search: Whether it searches for the knee: the help is silent about options that this refuses.
        defaults: Those that are others than in `Settings`, by name.
    """
    known = {field.name: field.default for field in dataclasses.fields(Settings)} | defaults

    def add(group: Any, flag: str, text: str, **more: Any) -> None:
        name = flag[2:].replace("-", "_")
        default = known[name]
        if name in defaults:
            more["default"] = default
        if search and flag in _NOT_IN_A_SEARCH:
            text = argparse.SUPPRESS
        elif default not in ("", 0.0) or flag == "--seed":
            text += f" (default: {default})"
        if not isinstance(default, str):
            more = {"type": type(default), "metavar": flag.rpartition("-")[2].upper(), **more}
        group.add_argument(flag, help=text, **more)

    group = parser.add_argument_group("Server under test")
    add(group, "--host", "address of the server, such as http://127.0.0.1:8000 or https://...", required=True)
    add(group, "--task", "endpoint to test", choices=sorted(TASKS), metavar="NAME")
    add(group, "--inputs-per-request", "texts in a request: a number, or a range such as 1-8", metavar="N")
    add(group, "--texts", "texts to send, one a line, or JSON lines (default: docstrings of Python)", metavar="FILE")
    add(group, "--lengths", "words of a text: texts, fixed:N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA", metavar="FORM")
    add(group, "--text-count", "how many different texts")
    add(group, "--max-chars", "cut texts to this length, 0 for none; with --lengths, none are cut unless this says so")
    add(group, "--seed", "which texts and arrival times")
    add(group, "--encoding-format", "for --task openai", choices=("float", "base64"))
    add(group, "--model", "name of the model where a task sends one (default: the server's first)")
    add(group, "--mask-token", "for tasks that fill masks (default: the server's own)")
    add(group, "--top-k", "candidates for each mask")
    add(group, "--request-timeout-s", "an answer that takes longer is an error")
    add(group, "--ca", "trust the certificates in this file, instead of the system's", metavar="FILE")
    group.add_argument(
        "--api-key", default="", metavar="KEY", help=f"sent as a bearer token (better in the variable {KEY_VARIABLE})"
    )
    group = parser.add_argument_group("Arrivals")
    add(
        group,
        "--preset",
        "in the form of MLPerf's LoadGen: its server or its offline scenario",
        choices=sorted(PRESETS),
    )
    add(group, "--shape", "rate over time", choices=SHAPES)
    add(group, "--process", "arrivals at random, or evenly spread", choices=PROCESSES)
    lowest, highest = "; the lowest with steps, spike and diurnal", ", with steps, spike and diurnal"
    if search:
        lowest, highest = " of the first trial", " to try"
    add(group, "--rate", f"arrivals per second{lowest}", metavar="PER_S")
    add(group, "--rate-to", f"the highest rate{highest}", metavar="PER_S")
    add(group, "--duration-s", "of each trial, with its warm-up" if search else "of the run, with its warm-up")
    add(group, "--warm-up-s", "requests count that are to start from then on")
    add(group, "--steps", "how many, with --shape steps", metavar="N")
    add(group, "--spike-every-s", "interval with one spike, with --shape spike")
    add(group, "--spike-s", "length of a spike")
    add(group, "--day-s", "length of a day, with --shape diurnal")
    add(group, "--count", "how many requests, with --shape at-once", metavar="N")
    add(group, "--trace", "arrival times in seconds, one a line, instead of a shape", metavar="FILE")
    add(group, "--trace-speed", "how many times faster than recorded", metavar="FACTOR")
    group = parser.add_argument_group("Generator")
    add(group, "--connections", "connections opened ahead of the load", metavar="N")
    add(group, "--max-connections", "most connections of a process", metavar="N")
    add(group, "--max-lag-ms", "void if 1 %% of the requests were sent later than that")
    add(group, "--max-cpu", "void if a process of the generator used more of a core", metavar="PART")
    group.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes that make load here (default: 1)"
    )
    group.add_argument(
        "--expect-workers", type=int, default=0, metavar="N", help="wait for N others: python -m loadtest worker"
    )
    group.add_argument(
        "--expect-workers-max-wait-s", type=float, default=60.0, metavar="S", help="void after that (default: 60)"
    )
    group.add_argument(
        "--bind", default="127.0.0.1:0", metavar="HOST:PORT", help="where workers connect to (default: 127.0.0.1:0)"
    )


def add_slo_options(parser: argparse.ArgumentParser) -> None:
    """Adds the limits that decide the exit code."""
    group = parser.add_argument_group("Limits that decide the exit code (0 kept, 1 missed, 2 void)")
    group.add_argument("--slo", default="", metavar="FILE", help='a JSON object of limits, such as {"p99_ms": 200}')
    for name, text in OBJECTIVES.items():
        group.add_argument(flag_of(f"slo_{name}"), type=float, metavar="NUMBER", help=text)


def read_objectives(values: dict[str, Any]) -> Objectives:
    """The limits of a file and of options, which come first.

    Raises:
        CannotStartError: The file cannot be read, or a limit is unknown or out of range.
    """
    limits: dict[str, Any] = {}
    if values.get("slo"):
        path = Path(values["slo"])
        try:
            limits = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise CannotStartError(f"--slo: cannot read {path}: {why(error)}") from error
        if not isinstance(limits, dict):
            raise CannotStartError(f"--slo: expected a JSON object in {path}, got {type(limits).__name__}")
    if unknown := sorted(set(limits) - set(OBJECTIVES)):
        raise CannotStartError(f"--slo: expected some of {', '.join(OBJECTIVES)}, got {unknown[0]!r}")
    limits |= {name: values[f"slo_{name}"] for name in OBJECTIVES if values.get(f"slo_{name}") is not None}
    for name, limit in limits.items():
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        highest = 1 if name.endswith("_rate") else float("inf")
        lowest = 0 if name.endswith("_rate") else 1e-9
        if not number or not lowest <= limit <= highest or limit == float("inf"):
            expected = "between 0 and 1" if name.endswith("_rate") else "more than 0"
            raise CannotStartError(f"SLO {name}: expected a number {expected}, got {limit!r}")
    return Objectives(**{name: float(limit) for name, limit in limits.items()})
