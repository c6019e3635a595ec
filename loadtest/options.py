"""Options of both load tests, and those of the closed loop beside Locust's own."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any, Protocol

from loadtest.measure import Objectives
from loadtest.tasks import TASKS

__all__ = [
    "KEY_VARIABLE",
    "CannotStartError",
    "Options",
    "RequestOptions",
    "add_options",
    "flag_of",
    "request_headers",
    "why",
]

KEY_VARIABLE = "LOADTEST_API_KEY"


class CannotStartError(Exception):
    """The load test cannot start; the message says why and what to do."""


def why(error: OSError | ValueError) -> str:
    """Why a file could not be read, as UTF-8 or JSON, or not be written; messages name the file themselves."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"it is no {'UTF-8' if isinstance(error, UnicodeDecodeError) else 'JSON'} ({error})"


def flag_of(name: str) -> str:
    """How an option is written on the command line, by the name of its value."""
    return "--" + name.replace("_", "-")


def request_headers(key: str) -> dict[str, str]:
    """Headers of every request.

    Args:
        key: A bearer token as it was given, empty for none; a line end of the file that it came from is left out.

    Raises:
        CannotStartError: It cannot stand in a header. The message does not show it.
    """
    key = key.strip()
    if not all("!" <= character <= "~" for character in key):
        raise CannotStartError(f"--api-key (or {KEY_VARIABLE}): expected ASCII characters without spaces")
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    return headers | {"Authorization": f"Bearer {key}"} if key else headers


@dataclass(frozen=True)
class RequestOptions:
    """What both load tests send, and how, with their defaults. Names and units are those on the command line."""

    task: str = "embed"
    texts: str = ""
    text_count: int = 2000
    max_chars: int = 2000
    seed: int = 0
    encoding_format: str = "float"
    model: str = ""
    mask_token: str = ""
    top_k: int = 5
    request_timeout_s: float = 30.0
    warm_up_s: float = 2.0
    max_cpu: float = 0.9


class _Group(Protocol):
    def add_argument(self, *names: str, **settings: Any) -> Any: ...


class _Parser(_Group, Protocol):
    def add_argument_group(self, title: str) -> Any: ...


def add_options(parser: _Parser) -> None:
    """Adds this load test's options to Locust's.

    Args:
        parser: Locust's parser; its arguments take two settings more than argparse's, ``env_var`` and ``is_secret``.
    """
    group: _Group = parser.add_argument_group("Server under test")
    add = group.add_argument
    known = RequestOptions()
    add("--task", choices=sorted(TASKS), default=known.task, help=f"endpoint to test (default: {known.task})")
    add("--inputs-per-request", type=int, default=1, metavar="N", help="texts in a request (default: 1)")
    add(
        "--think-time-s",
        type=float,
        default=0.0,
        metavar="S",
        help="mean pause of a user after an answer, exponentially distributed (default: 0, a closed loop)",
    )
    add(
        "--warm-up-s",
        type=float,
        default=known.warm_up_s,
        metavar="S",
        help=f"requests count from so many seconds after all users run (default: {known.warm_up_s:g})",
    )
    add(
        "--request-timeout-s",
        type=float,
        default=known.request_timeout_s,
        metavar="S",
        help=f"an answer that takes longer is an error (default: {known.request_timeout_s:g})",
    )
    add(
        "--texts",
        default=known.texts,
        metavar="FILE",
        help="texts to send, one per line, or JSON lines (default: docstrings of Python's standard library)",
    )
    add(
        "--text-count",
        type=int,
        default=known.text_count,
        metavar="N",
        help=f"how many different texts (default: {known.text_count})",
    )
    add(
        "--max-chars",
        type=int,
        default=known.max_chars,
        metavar="N",
        help=f"cut texts to this length (default: {known.max_chars})",
    )
    add("--seed", type=int, default=known.seed, help=f"which texts, in which order (default: {known.seed})")
    add(
        "--encoding-format",
        choices=("float", "base64"),
        default=known.encoding_format,
        help=f"for --task openai (default: {known.encoding_format})",
    )
    add("--model", default=known.model, help="model name for --task openai (default: the server's first)")
    add("--mask-token", default=known.mask_token, help="for --task fill-mask (default: the server's own)")
    add(
        "--top-k",
        type=int,
        default=known.top_k,
        help=f"candidates for each mask with --task fill-mask (default: {known.top_k})",
    )
    # Not in the group: only the parser itself knows is_secret, which keeps the key out of the web interface.
    parser.add_argument("--api-key", default="", env_var=KEY_VARIABLE, is_secret=True, help="sent as a bearer token")
    group = parser.add_argument_group("Limits that decide the exit code (0 kept, 1 missed, 2 not started or void)")
    add = group.add_argument
    add(
        "--max-cpu",
        type=float,
        default=known.max_cpu,
        metavar="CORES",
        help="the run is void if a process of the load test uses more of a core than that: it was the limit, not the "
        f"server (default: {known.max_cpu:g})",
    )
    add("--slo-p95-ms", type=float, metavar="MS", help="95 %% of the right answers take at most that long")
    add(
        "--slo-error-rate",
        type=float,
        metavar="PART",
        help="at most that part of the requests fails, 0 to 1; 429 is counted apart, not as an error (default: 0)",
    )
    add(
        "--slo-refused-rate",
        type=float,
        metavar="PART",
        help="at most that part of the requests is refused with status 429, 0 to 1 (default: any, but a "
        "refused request exceeds the limit of latency)",
    )


@dataclass(frozen=True, kw_only=True)
class Options(RequestOptions):
    """The values of the closed loop's options, checked."""

    inputs_per_request: int
    think_time_s: float
    api_key: str
    slo_p95_ms: float | None
    slo_error_rate: float | None
    slo_refused_rate: float | None

    @classmethod
    def from_namespace(cls, parsed: argparse.Namespace) -> Options:
        """Checks what was given.

        Args:
            parsed: Result of the parser that `add_options` added to.

        Raises:
            CannotStartError: A value is out of range.
        """
        values = vars(parsed)
        options = cls(**{name: values[name] for name in cls.__dataclass_fields__})
        for name, lowest in (
            *(("inputs_per_request", 1), ("text_count", 1), ("max_chars", 1), ("top_k", 1)),
            *(("think_time_s", 0), ("warm_up_s", 0)),
        ):
            if not lowest <= values[name] < math.inf:
                expected = "a finite number" if values[name] == math.inf else f"at least {lowest}"
                raise CannotStartError(f"{flag_of(name)}: expected {expected}, got {values[name]:g}")
        for name in ("request_timeout_s", "slo_p95_ms"):
            if values[name] is not None and not 0 < values[name] < math.inf:
                expected = "a finite number" if values[name] == math.inf else "more than 0"
                raise CannotStartError(f"{flag_of(name)}: expected {expected}, got {values[name]:g}")
        if not values["max_cpu"] > 0:
            raise CannotStartError(f"--max-cpu: expected more than 0, such as 0.9, got {values['max_cpu']:g}")
        for name in ("slo_error_rate", "slo_refused_rate"):
            if values[name] is not None and not 0 <= values[name] <= 1:
                raise CannotStartError(f"{flag_of(name)}: expected between 0 and 1, such as 0.01, got {values[name]:g}")
        run_time_s = values.get("run_time")
        if run_time_s and run_time_s <= options.warm_up_s:
            raise CannotStartError(
                f"the run of {run_time_s:g} s (-t) ends within its warm-up of {options.warm_up_s:g} s: make it longer "
                "or lower --warm-up-s"
            )
        return options

    @property
    def objectives(self) -> Objectives:
        """The limits."""
        return Objectives(self.slo_p95_ms, self.slo_error_rate, self.slo_refused_rate)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return request_headers(self.api_key)
