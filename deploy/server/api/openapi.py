"""The OpenAPI document, made from the rows of routes, the types that check requests, and the table of errors."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ...bundle import Manifest
from ..errors import ERRORS
from ..limits.bounds import BOUNDS, Limits, Settings
from ..service import TextTokenizer, widths_of
from .route import JSON, Route
from .schemas import BOUND

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
    types: list[Any] = [kind for route in routes for kind in (route.request, route.answer) if kind is not None]
    types += [dialect.body for route in routes for dialect in (route.dialect, route.other) if dialect is not None]
    types = list(dict.fromkeys(types))
    written, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    of = dict(zip(types, written, strict=True))
    for schema in schemas.values():  # Docstrings are indented or not, as msgspec and Python have it.
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    mask = manifest.special_tokens["mask"]

    def bounds(limits: Limits) -> dict[str, Any]:
        return _bounds(limits, manifest, tokenizer, settings)

    marks: dict[str, Mapping[str, Any]] = {}
    for route in routes:
        if route.request is not None:
            schema = schemas[route.request.__name__]
            _write_bounds(schema, {**bounds(route.limits(settings)), **route.marks})
            if either := getattr(route.request, "EITHER", None):
                schema["anyOf"] = [{"required": list(names)} for names in either]
        marks |= route.marks
    for schema in schemas.values():  # Parts of those.
        _write_bounds(schema, {**bounds(Limits.of_texts(settings)), **marks})
    fill = {"{model}": manifest.model.name, "{mask}": "[MASK]" if mask is None else mask.token}
    secured = settings.api_key is not None or settings.api_keys_file is not None
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, manifest.task, fill, secured, of)

    limits = (
        f"Limits: {settings.max_queue_tokens} tokens a request and of all that wait, {manifest.max_tokens} a text "
        f"(longer ones are cut unless `truncate` is false), {settings.max_body_bytes} bytes a body, "
        f"{settings.max_values} numbers an answer. `x-limits` has them all. A client that waits for so many "
        "milliseconds only says so by the header `X-Request-Timeout-Ms`: what cannot be answered by then is refused, "
        "with 504."
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
        **({"servers": [{"url": settings.root_path}]} if settings.root_path else {}),
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


def _widths(manifest: Manifest, settings: Settings) -> dict[str, Any]:
    """Widths that OpenAI's clients may ask for."""
    widths = widths_of(manifest, settings.any_dimensions)
    if isinstance(widths, range):
        return {"type": "integer", "minimum": 1, "maximum": manifest.width}
    return {"enum": list(widths)}


def _bounds(limits: Limits, manifest: Manifest, tokenizer: TextTokenizer, settings: Settings) -> dict[str, Any]:
    """What the marks in types of requests stand for, by their names."""
    no_nul = r"[^\u0000]*"
    mask = manifest.special_tokens["mask"]
    masked = re.escape("[MASK]" if mask is None else mask.token)
    texts = {"minItems": 1, "maxItems": limits.inputs}
    text: dict[str, Any] = {"pattern": f"^{no_nul}$"}
    if limits.chars:
        text["maxLength"] = limits.chars
    some_text = {"type": "string", **text}
    prompts = list(tokenizer.prompts.texts)
    nothing = {"type": "null"}
    # Ids that lack the special tokens get them.
    room = manifest.max_tokens - len(tokenizer.prefix) - len(tokenizer.suffix)
    some_ids = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": tokenizer.vocab_size - 1},
        "minItems": 1,
        "maxItems": room,
    }
    lists = [{"type": "array", "items": items, **texts} for items in (some_text, some_ids)]
    one_or_two = {"type": "array", "items": some_text, "minItems": 1, "maxItems": 2}
    id_lists = [{**some_ids, "minItems": 0, "maxItems": limits.ids}]
    id_lists.append({"type": "array", "items": id_lists[0], "minItems": 1, "maxItems": limits.inputs})
    return {
        "text": text,
        "texts": texts,
        "some text": {**text, "minLength": 1},
        "text if any": {"anyOf": [some_text]},
        "texts if any": {"anyOf": [lists[0]]},
        "prompt": {"anyOf": [{"enum": prompts}, nothing] if prompts else [nothing]},
        "nothing": {"anyOf": [nothing]},
        "window": {"maximum": manifest.max_tokens},
        "whole window": {"anyOf": [{"type": "integer", "minimum": manifest.max_tokens}, nothing]},
        "masked": {**text, "pattern": f"^{no_nul}{masked}{no_nul}$"},
        "texts or ids": {"anyOf": [some_text, lists[0], *([some_ids, lists[1]] if settings.accept_token_ids else [])]},
        "dimensions": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": manifest.width}, nothing]},
        "openai dimensions": {"anyOf": [_widths(manifest, settings), nothing]},
        "predict": {"anyOf": [some_text, one_or_two, {"type": "array", "items": one_or_two, **texts}]},
        "texts or similarity": {
            "anyOf": [some_text, lists[0], {"$ref": "#/components/schemas/SimilarityInput"}],
        },
        "ids": {"anyOf": [{**id_lists[0], "minItems": 1}, id_lists[1]]},
    }


def _write_bounds(schema: Any, bounds: Mapping[str, Any]) -> None:
    """Replaces the marks in the schema of a request by what they stand for, and puts null behind other types."""
    if isinstance(schema, list):
        for item in schema:
            _write_bounds(item, bounds)
    elif isinstance(schema, dict):
        if (name := schema.pop(BOUND, None)) is not None:
            schema.update(copy.deepcopy(bounds[name]))  # Marks of a row may hold others.
        if "anyOf" in schema:  # Releases of msgspec differ in where null comes.
            schema["anyOf"].sort(key=lambda kind: kind == {"type": "null"})
        for item in schema.values():
            _write_bounds(item, bounds)


def _operation(
    route: Route, task: str, fill: dict[str, str], secured: bool, of: Mapping[Any, dict[str, Any]]
) -> dict[str, Any]:
    """What the document says of a row; `of` has the schema of each type."""
    operation: dict[str, Any] = {"operationId": route.name, "tags": [route.tag], "summary": route.summary}
    if route.request is not None:
        status = route.dialect.status("wrong_task")
        note = "" if route.task in (None, task) else f" Not with this bundle, which is for {task}: answers {status}."
        operation["description"] = f"{inspect.getdoc(route.request)}{note}"
        content = {"schema": of[route.request], "example": _fill(dict(route.example), fill)}
        operation["requestBody"] = {"required": True, "content": {JSON: content}}
    answer = _answer(route, of)
    kinds = [*route.error_kinds, *(["unauthorized", "rate_limit_exceeded"] if secured and route.secured else [])]
    operation["responses"] = {"200": answer, **_errors(kinds, route, of)}
    if route.task is not None:
        answer["headers"] = _SERVER_TIMING
    if secured and route.secured:
        operation["security"] = [{"api_key": []}]
    return operation


def _answer(route: Route, of: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    if route.answer is not None:
        return _json(of[route.answer], route.answered or inspect.getdoc(route.answer) or "")
    schema = {"type": "object" if route.media_type == JSON else "string"}
    return {"description": route.answered, "content": {route.media_type: {"schema": schema}}}


def _json(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": schema}}}


def _errors(kinds: Sequence[str], route: Route, of: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """Responses of error kinds, by status; kinds that share a status share an entry."""
    dialects = [dialect for dialect in (route.dialect, route.other) if dialect is not None]
    found = {(dialect.status(kind), kind) for dialect in dialects for kind in kinds}
    result: dict[str, Any] = {}
    for code, kind in sorted(found, key=lambda item: (item[0], kinds.index(item[1]))):
        row = ERRORS[kind]
        status = str(code)
        text = f"`{kind}`: {row.meaning}."
        if status in result:
            result[status]["description"] += f" {text}"
            continue
        bodies = [of[other.body] for other in dialects if any(other.status(name) == code for name in kinds)]
        result[status] = _json(bodies[0] if len(bodies) == 1 else {"anyOf": bodies}, text)
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
