"""Forms of the files that the load test writes and reads: JSON Schema, and a check of the part of it that they use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtest.options import CannotStartError

__all__ = ["KNEE", "RUN", "check", "read_result", "write_result"]

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
    "$schema": "https://json-schema.org/draft/2020-12/schema",
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
        },
    ),
}
"""The file of ``python -m loadtest run -o``."""

KNEE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
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

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


def check(value: Any, schema: Mapping[str, Any], where: str = "$") -> list[str]:
    """Compares a value with a schema: type, enum, minimum, properties, required, additionalProperties, items.

    Args:
        value: Decoded JSON.
        schema: What it should be.
        where: How messages call the value.

    Returns:
        What is wrong; empty if nothing is.
    """
    kinds = schema.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_is(value, kind) for kind in kinds):
        return [f"{where}: expected {' or '.join(kinds)}, got {type(value).__name__}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: expected one of {schema['enum']}, got {value!r}"]
    if "minimum" in schema and value < schema["minimum"]:
        return [f"{where}: expected at least {schema['minimum']}, got {value!r}"]
    wrong: list[str] = []
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        wrong += [f"{where}: lacks {name!r}" for name in schema.get("required", ()) if name not in value]
        if not schema.get("additionalProperties", True):
            wrong += [f"{where}: unknown field {name!r}" for name in value if name not in properties]
        for name in value.keys() & properties.keys():
            wrong += check(value[name], properties[name], f"{where}.{name}")
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            wrong += check(item, schema["items"], f"{where}[{index}]")
    return wrong


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def read_result(path: str | Path) -> dict[str, Any]:
    """Reads a file that ``run`` or ``knee`` wrote.

    Raises:
        CannotStartError: It cannot be read, or is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CannotStartError(f"cannot read {path}: {error}") from error
    kind = found.get("format") if isinstance(found, dict) else None
    if kind not in _FORMS:
        raise CannotStartError(
            f"{path}: expected a result of this load test ({', '.join(_FORMS)}), got format {kind!r}"
        )
    if wrong := check(found, _FORMS[kind]):
        raise CannotStartError(
            f"{path}: expected the form {kind}: {wrong[0]}" + f" (and {len(wrong) - 1} more)" * (len(wrong) > 1)
        )
    result: dict[str, Any] = found
    return result


def write_result(path: str | Path, result: Mapping[str, Any]) -> None:
    """Writes a result; one that is not in its own form is a bug and is not written.

    Raises:
        CannotStartError: The file cannot be written.
        ValueError: The result is not in its form.
    """
    if wrong := check(result, _FORMS[result["format"]]):
        raise ValueError(f"the result is not in its own form: {wrong[:3]}")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CannotStartError(f"-o: cannot write {path}: {error}") from error
