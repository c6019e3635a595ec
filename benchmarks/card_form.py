"""The form of a result card: what cards that users hand in are checked by."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loadtest.openloop.schema import check

__all__ = ["FEATURES", "FORM", "NAME", "PARTS", "check_card", "read_card"]

NAME = "torch-ext card 1"
PARTS = ("doctor", "encoder", "accuracy", "knee")
FEATURES = ("asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16", "avx2", "avx512_bf16", "avx512_vnni", "amx_bf16")

_TEXT, _NUMBER, _FLAG = {"type": "string"}, {"type": "number", "minimum": 0}, {"type": "boolean"}
_MAYBE = {"type": ["number", "null"]}
_MEASURED = {"type": "number", "exclusiveMinimum": 0}
_MEASURED_MAYBE = {"type": ["number", "null"], "exclusiveMinimum": 0}


def _record(fields: Mapping[str, Any], *, empty: bool = False) -> dict[str, Any]:
    return {
        "type": ["object", "null"] if empty else "object",
        "properties": dict(fields),
        "required": list(fields),
        "additionalProperties": False,
    }


def _named(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": dict(value)}


def _list(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(item)}


FORM: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    **_record(
        {
            "form": {"type": "string", "enum": [NAME]},
            "machine": _record(
                {
                    "arm": _FLAG,
                    "emulated": _FLAG,
                    "architecture": _TEXT,
                    "cpu": _TEXT,
                    "features": _list({"type": "string", "enum": list(FEATURES)}),
                    "cpus": {"type": "integer", "minimum": 1},
                    "memory_mb": {"type": "integer", "minimum": 0},
                    "page_bytes": {"type": "integer", "minimum": 1024},
                    "instance": _TEXT,
                    "firmware": _TEXT,
                    "price_per_hour": _MEASURED_MAYBE,
                    "currency": _TEXT,
                }
            ),
            "model": _TEXT,
            "date": _TEXT,
            "commit": _TEXT,
            "system": _TEXT,
            "python": _TEXT,
            "versions": _named(_TEXT),
            "quick": _FLAG,
            "parts": _record(
                {
                    "doctor": _record(
                        {
                            "status": {"type": "string", "enum": ["OK", "WARN", "FAIL"]},
                            "findings": _list(
                                _record({"name": _TEXT, "status": _TEXT, "detail": _TEXT, "advice": _TEXT})
                            ),
                            "isa": _TEXT,
                        },
                        empty=True,
                    ),
                    "encoder": _record(
                        {
                            "threads": {"type": "integer", "minimum": 1},
                            "mean_tokens": _NUMBER,
                            "quick": _FLAG,
                            "rows": _list(
                                _record(
                                    {
                                        "name": _TEXT,
                                        "texts_per_s": _MEASURED,
                                        "latency_ms": _MEASURED_MAYBE,
                                        "cosine_mean": _MAYBE,
                                    }
                                )
                            ),
                            "left_out": _list(_TEXT),
                            "command": _TEXT,
                            "versions": {"type": "object"},
                        },
                        empty=True,
                    ),
                    "accuracy": _record(
                        {
                            "texts": {"type": "integer", "minimum": 1},
                            "pairs": {"type": "integer", "minimum": 1},
                            "engines": _named(_named({"type": "number"})),
                            "missed": {"type": "array"},
                        },
                        empty=True,
                    ),
                    "knee": _record({"slo_p95_ms": _NUMBER, "variant": _TEXT, "texts_per_s": _NUMBER}, empty=True),
                }
            ),
            "not_run": _named(_TEXT),
        }
    ),
}


def _infinite(value: Any, name: str) -> Iterator[str]:
    """Names of numbers that are none: JSON has no NaN, Python reads it nevertheless."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from _infinite(inner, f"{name}.{key}")


def read_card(path: Path) -> dict[str, Any]:
    """Reads a file that `card.py collect` wrote.

    Raises:
        ValueError: It cannot be read, or is no card; the message names it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if wrong := check_card(found):
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    card: dict[str, Any] = found
    return card


def check_card(card: Any) -> list[str]:
    """What is wrong with a card; empty if nothing is."""
    if wrong := check(card, FORM, "card"):
        return [wrong]
    if infinite := next(_infinite(card, "card"), ""):
        return [f"{infinite}: expected a finite number"]
    engines = (card["parts"]["accuracy"] or {"engines": {}})["engines"]
    if len({frozenset(measures) for measures in engines.values()}) > 1:
        return ["card.parts.accuracy.engines: expected the same measures of each engine"]
    missing = [part for part in PARTS if card["parts"][part] is None and part not in card["not_run"]]
    return [f"card.not_run: expected the reason why {part} is missing" for part in missing]
