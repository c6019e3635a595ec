"""Forms of the files that the load test writes and reads, in JSON Schema."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fastjsonschema

from loadtest.options import CannotStartError, why

__all__ = ["KNEE", "RUN", "check", "check_output", "read_result", "write_result"]

RUN_FORMAT, KNEE_FORMAT = "torch-ext-loadtest-run/1", "torch-ext-loadtest-knee/1"

_NUMBER = {"type": "number"}
_NUMBER_OR_NONE = {"type": ["number", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_COUNTS = ("arrivals", "good", "refused", "errors", "texts")
_TEXTS = {"type": "array", "items": _TEXT}
_BUCKETS = {"type": "array", "items": {"type": "array", "items": _NUMBER}}


def _object(properties: Mapping[str, Any], *, optional: tuple[str, ...] = (), closed: bool = True) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": not closed,
    }


_POINT = _object(
    {
        **{f"{name}_per_s": _NUMBER for name in ("arrivals", "answered", "goodput", "texts")},
        **{f"{name}_ms": _NUMBER_OR_NONE for name in ("p50", "p95", "p99")},
        "error_rate": _NUMBER,
        "refused_rate": _NUMBER,
        "kept": {"type": "boolean"},
        "rate": _NUMBER,
        "void": _TEXTS,
    },
    optional=("void",),
)

_COMMON: dict[str, Any] = {
    "format": _TEXT,
    "created": _TEXT,
    "command": _TEXTS,
    "versions": _object({"python": _TEXT, "loadtest": _TEXT, "system": _TEXT}),
    "machine": _object({"name": _TEXT, "cpus": _COUNT}),
    "settings": {"type": "object"},
    "objectives": {"type": "object"},
    "server": _object({"path": _TEXT, "model": _TEXT}),
    "workers": _COUNT,
    "void": _TEXTS,
    "exit_code": {"type": "integer", "enum": [0, 1, 2]},
}

RUN = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "One run of the load test",
    **_object(
        {
            **_COMMON,
            "format": {"type": "string", "enum": [RUN_FORMAT]},
            "summary": _object(
                {
                    **dict.fromkeys(("measured_s", "requests_per_s", "texts_per_s"), _NUMBER),
                    **dict.fromkeys(("requests", "good", "refused", "errors", "goodput"), _COUNT),
                    **dict.fromkeys(("error_rate", "refused_rate", "tokens_per_s"), _NUMBER_OR_NONE),
                    "goodput_per_s": _NUMBER,
                    "latency_ms": {"type": "object"},
                    "server_ms": {"type": "object"},
                }
            ),
            "generator": _object(
                {
                    "lag_ms": _object(dict.fromkeys(("p50", "p99", "max"), _NUMBER_OR_NONE)),
                    "cpu": _NUMBER,
                    "most_in_flight": _COUNT,
                    "waited_for_connection": _COUNT,
                    "interrupted": {"type": "boolean"},
                }
            ),
            "failures": {"type": "object"},
            "histogram": _object({"growth": _NUMBER, "counts": _BUCKETS}),
            "series": {
                "type": "array",
                "items": _object(
                    {
                        **dict.fromkeys(
                            ("second", "arrivals", "good", "refused", "errors", "texts", "in_flight"), _COUNT
                        ),
                        "latency": _BUCKETS,
                    }
                ),
            },
            "points": {"type": "array", "items": _POINT},
            "knee_per_s": _NUMBER_OR_NONE,
            "drift": _NUMBER_OR_NONE,
            "limits": {"type": "array", "items": _object({"kept": {"type": "boolean"}, "message": _TEXT})},
            "notes": _TEXTS,
        },
        optional=("notes",),
    ),
}
"""The file of ``python -m loadtest run -o``."""

KNEE = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "A search for the highest rate that keeps the limits",
    **_object(
        {
            **_COMMON,
            "format": {"type": "string", "enum": [KNEE_FORMAT]},
            "points": {"type": "array", "items": _POINT},
            "knee_per_s": _NUMBER_OR_NONE,
            "missed_per_s": _NUMBER_OR_NONE,
            "messages": _TEXTS,
        }
    ),
}
"""The file of ``python -m loadtest knee -o``."""

_FORMS = {RUN_FORMAT: RUN, KNEE_FORMAT: KNEE}


@functools.cache
def _compiled(schema: str) -> Callable[..., Any]:
    validate: Callable[..., Any] = fastjsonschema.compile(json.loads(schema))
    return validate


def check(value: Any, schema: Mapping[str, Any], name: str = "result") -> str:
    """Compares a value with a schema.

    Args:
        value: Decoded JSON.
        schema: What it should be.
        name: How messages call the value.

    Returns:
        The first thing that is wrong; empty if nothing is.
    """
    try:
        _compiled(json.dumps(schema))(value, name_prefix=name)
    except fastjsonschema.JsonSchemaValueException as error:
        if error.rule == "required":
            return (
                f"{error.name} lacks {', '.join(field for field in error.rule_definition if field not in error.value)}"
            )
        return str(error.message)
    return ""


def read_result(path: str | Path) -> dict[str, Any]:
    """Reads a file that ``run`` or ``knee`` wrote.

    Raises:
        CannotStartError: It cannot be read, or is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CannotStartError(f"cannot read {path}: {why(error)}") from error
    kind = found.get("format") if isinstance(found, dict) else None
    if kind not in _FORMS:
        raise CannotStartError(
            f"{path}: expected a result of this load test ({', '.join(_FORMS)}), got format {kind!r}"
        )
    if wrong := check(found, _FORMS[kind]):
        raise CannotStartError(f"{path}: expected the form {kind}: {wrong}")
    result: dict[str, Any] = found
    return result


def check_output(path: str | Path) -> None:
    """Looks whether a result can be written, before a load is made whose result would be lost.

    Raises:
        CannotStartError: It cannot.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reason = "is a folder" if path.is_dir() else "may not be written"
        writable = not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError as error:
        raise CannotStartError(f"-o: cannot write {path}: {why(error)}") from error
    if not writable:
        raise CannotStartError(f"-o: cannot write {path}: it {reason}")


def write_result(path: str | Path, result: Mapping[str, Any]) -> None:
    """Writes a result; one that is not in its own form is a bug and is not written.

    Raises:
        CannotStartError: The file cannot be written.
        ValueError: The result is not in its form.
    """
    if wrong := check(result, _FORMS[result["format"]]):
        raise ValueError(f"the result is not in its own form: {wrong}")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CannotStartError(f"-o: cannot write {path}: {why(error)}") from error
