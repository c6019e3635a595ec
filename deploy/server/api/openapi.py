"""The OpenAPI document, made from the rows of routes, the types that check requests, and the table of errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ...bundle import Manifest
from ..errors import ERRORS
from ..limits.bounds import BOUNDS, Limits, Settings
from ..service import TextTokenizer
from .route import JSON, Route
from .schemas import BOUND, ErrorResponse

__all__ = ["document"]

_SERVER_TIMING = {
    "Server-Timing": {
        "description": "Milliseconds by stage: `tokenize;dur=..,queue;dur=..,infer;dur=..`.",
        "schema": {"type": "string"},
    }
}


def document(
    routes: Sequence[Route],
    manifest: Manifest,
    variant: str | None,
    settings: Settings,
    tokenizer: TextTokenizer,
    memory_mb: int,
) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server.

    Args:
        routes: Its rows.
        manifest: What is served.
        variant: Which variant of it; None while it is not chosen yet.
        settings: Limits, which the document names.
        tokenizer: Says which token ids there are.
        memory_mb: What all requests may hold.

    Returns:
        A JSON object. Endpoints of other tasks are listed too: they answer 400.
    """
    types = [kind for route in routes for kind in (route.request, route.answer) if kind is not None]
    _, schemas = msgspec.json.schema_components(
        [*dict.fromkeys(types), ErrorResponse], ref_template="#/components/schemas/{name}"
    )
    mask = manifest.special_tokens["mask"]
    for route in routes:
        if route.request is not None:
            _write_bounds(schemas[route.request.__name__], _bounds(route.limits(settings), manifest, tokenizer))
    fill = {"{model}": manifest.model.name, "{mask}": "[MASK]" if mask is None else mask.token}
    secured = settings.api_key is not None
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, manifest.task, fill, secured)

    limits = (
        f"Limits: {settings.max_inputs} inputs a request, {settings.max_chars} characters a text, "
        f"{manifest.max_tokens} tokens a text (longer ones are cut unless `truncate` is false), "
        f"{settings.max_body_bytes} bytes a body, {settings.max_queue_tokens} tokens waiting, {settings.max_values} "
        "numbers an answer. `x-limits` has them all. A client that waits for so many milliseconds only says so by the "
        "header `X-Request-Timeout-Ms`: what cannot be answered by then is refused with 504."
    )
    version = manifest.created_with.get("torch_ext", "0")
    components: dict[str, Any] = {"schemas": schemas}
    if secured:
        components["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{manifest.model.name} ({manifest.task})",
            "version": version,
            "description": limits if variant is None else f"Variant {variant}. {limits}",
        },
        "paths": paths,
        "components": components,
        "x-limits": _table(settings, memory_mb),
    }


def _table(settings: Settings, memory_mb: int) -> dict[str, Any]:
    """The table of limits, with their values."""
    result = {}
    for name, row in BOUNDS.items():
        limit = row.fixed if row.setting is None else getattr(settings, row.setting)
        result[name] = {
            "of": row.what,
            "limit": memory_mb if name == "memory" else limit,
            "unit": row.unit,
            "option": row.option,
            "status": row.status,
        }
    return result


def _bounds(limits: Limits, manifest: Manifest, tokenizer: TextTokenizer) -> dict[str, Any]:
    """What the marks in types of requests stand for, by their names."""
    no_nul = r"[^\u0000]*"
    mask = manifest.special_tokens["mask"]
    masked = re.escape("[MASK]" if mask is None else mask.token)
    texts = {"minItems": 1, "maxItems": limits.inputs}
    text = {"maxLength": limits.chars, "pattern": f"^{no_nul}$"}
    some_text = {"type": "string", **text}
    # Ids that lack the special tokens get them.
    room = manifest.max_tokens - len(tokenizer.prefix) - len(tokenizer.suffix)
    some_ids = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": tokenizer.vocab_size - 1},
        "minItems": 1,
        "maxItems": room,
    }
    lists = [{"type": "array", "items": items, **texts} for items in (some_text, some_ids)]
    return {
        "text": text,
        "texts": texts,
        "masked": {**text, "pattern": f"^{no_nul}{masked}{no_nul}$"},
        "texts or ids": {"anyOf": [some_text, lists[0], some_ids, lists[1]]},
        "width": {"anyOf": [{"const": manifest.hidden_size}, {"type": "null"}]},
    }


def _write_bounds(schema: Any, bounds: Mapping[str, Any]) -> None:
    """Replaces the marks in the schema of a request by what they stand for."""
    if isinstance(schema, list):
        for item in schema:
            _write_bounds(item, bounds)
    elif isinstance(schema, dict):
        for item in schema.values():
            _write_bounds(item, bounds)
        if (name := schema.pop(BOUND, None)) is not None:
            schema.update(bounds[name])


def _operation(route: Route, task: str, fill: dict[str, str], secured: bool) -> dict[str, Any]:
    """What the document says of a row."""
    operation: dict[str, Any] = {"operationId": route.name, "tags": [route.tag], "summary": route.summary}
    if route.request is not None:
        note = "" if route.task in (None, task) else f" Not with this bundle, which is for {task}: answers 400."
        operation["description"] = f"{route.request.__doc__}{note}"
        content = {"schema": _ref(route.request), "example": _fill(dict(route.example), fill)}
        operation["requestBody"] = {"required": True, "content": {JSON: content}}
    answer = _answer(route)
    kinds = [*route.error_kinds, *(["unauthorized"] if secured and route.secured else [])]
    operation["responses"] = {"200": answer, **_errors(kinds)}
    if route.task is not None:
        answer["headers"] = _SERVER_TIMING
    if secured and route.secured:
        operation["security"] = [{"api_key": []}]
    return operation


def _answer(route: Route) -> dict[str, Any]:
    if route.answer is not None:
        return _json(route.answer, route.answered or route.answer.__doc__ or "")
    schema = {"type": "object" if route.media_type == JSON else "string"}
    return {"description": route.answered, "content": {route.media_type: {"schema": schema}}}


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _json(kind: type, description: str) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": _ref(kind)}}}


def _errors(kinds: Sequence[str]) -> dict[str, Any]:
    """Responses of error kinds, by status; kinds that share a status share an entry."""
    result: dict[str, Any] = {}
    for kind in sorted(kinds, key=lambda item: ERRORS[item].status):
        row = ERRORS[kind]
        status = str(row.status)
        text = f"`{kind}`: {row.meaning}."
        if status in result:
            result[status]["description"] += f" {text}"
            continue
        result[status] = _json(ErrorResponse, text)
        if row.retry:
            result[status]["headers"] = {
                "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}
            }
    return result


def _fill(value: Any, names: dict[str, str]) -> Any:
    """A copy of an example with its placeholders filled in."""
    if isinstance(value, dict):
        return {key: _fill(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, names) for item in value]
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(name, text)
    return value
