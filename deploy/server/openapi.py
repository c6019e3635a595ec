"""The OpenAPI document, made from the rows of routes, the types that check requests, and the table of errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..bundle import Manifest
from .api.schemas import ErrorResponse
from .errors import ERRORS
from .limits import Settings
from .route import JSON, Route

__all__ = ["document"]

_SERVER_TIMING = {
    "Server-Timing": {
        "description": "Milliseconds by stage: `tokenize;dur=..,queue;dur=..,infer;dur=..`.",
        "schema": {"type": "string"},
    }
}


def document(routes: Sequence[Route], manifest: Manifest, variant: str | None, settings: Settings) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server.

    Args:
        routes: Its rows.
        manifest: What is served.
        variant: Which variant of it; None while it is not chosen yet.
        settings: Limits, which the document names.

    Returns:
        A JSON object. Endpoints of other tasks are listed too: they answer 400.
    """
    types = [kind for route in routes for kind in (route.request, route.answer) if kind is not None]
    _, schemas = msgspec.json.schema_components(
        [*dict.fromkeys(types), ErrorResponse], ref_template="#/components/schemas/{name}"
    )
    mask = manifest.special_tokens["mask"]
    fill = {"{model}": manifest.model.name, "{mask}": "[MASK]" if mask is None else mask.token}
    secured = settings.api_key is not None
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, manifest.task, fill, secured)

    limits = (
        f"Limits: {settings.max_inputs} inputs a request, {settings.max_chars} characters a text, "
        f"{manifest.max_tokens} tokens a text (longer ones are cut unless `truncate` is false), "
        f"{settings.max_body_bytes} bytes a body, {settings.max_queue_tokens} tokens waiting."
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
    }


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
