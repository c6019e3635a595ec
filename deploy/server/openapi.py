"""The OpenAPI document, made from the types that check the requests and from the table of errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..bundle import Manifest
from .errors import ERRORS
from .limits import Settings
from .schemas import (
    EmbedRequest,
    EmbedResponse,
    ErrorResponse,
    FillMaskRequest,
    FillMaskResponse,
    InfoResponse,
    OpenAIEmbeddingsRequest,
    OpenAIEmbeddingsResponse,
    OpenAIModels,
    PredictRequest,
    PredictResponse,
    StatusResponse,
)

__all__ = ["document"]

_INFERENCE_ERRORS = (
    "wrong_task",
    "timeout",
    "too_large",
    "unsupported_media_type",
    "invalid_request",
    "queue_full",
    "internal",
    "loading",
    "draining",
)
_SERVER_TIMING = {
    "Server-Timing": {
        "description": "Milliseconds by stage: `tokenize;dur=..,queue;dur=..,infer;dur=..`.",
        "schema": {"type": "string"},
    }
}
_INFERENCE: Sequence[tuple[str, str, str, Any, Any, dict[str, Any]]] = (
    (
        "/embed",
        "feature-extraction",
        "Embed texts",
        EmbedRequest,
        EmbedResponse,
        {"inputs": ["A server answers.", "A second text."]},
    ),
    ("/predict", "text-classification", "Classify texts", PredictRequest, PredictResponse, {"inputs": "What a day!"}),
    (
        "/fill-mask",
        "fill-mask",
        "Fill masked words",
        FillMaskRequest,
        FillMaskResponse,
        {"inputs": "Paris is the {mask} of France.", "top_k": 3},
    ),
    (
        "/v1/embeddings",
        "feature-extraction",
        "Embed texts, in OpenAI's format",
        OpenAIEmbeddingsRequest,
        OpenAIEmbeddingsResponse,
        {"input": ["A server answers."], "model": "{model}", "encoding_format": "float"},
    ),
)


def document(manifest: Manifest, variant: str | None, settings: Settings) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server.

    Args:
        manifest: What is served.
        variant: Which variant of it; None while it is not chosen yet.
        settings: Limits, which the document names.

    Returns:
        A JSON object. Endpoints of other tasks are listed too: they answer 400.
    """
    types = [item for row in _INFERENCE for item in row[3:5]]
    _, schemas = msgspec.json.schema_components(
        [*types, OpenAIModels, InfoResponse, StatusResponse, ErrorResponse], ref_template="#/components/schemas/{name}"
    )
    mask = manifest.special_tokens["mask"]
    fill = {"{model}": manifest.model.name, "{mask}": "[MASK]" if mask is None else mask.token}
    secured = settings.api_key is not None

    paths: dict[str, Any] = {}
    for path, task, summary, request, response, example in _INFERENCE:
        note = "" if task == manifest.task else f" Not with this bundle, which is for {manifest.task}: answers 400."
        operation: dict[str, Any] = {
            "operationId": path.strip("/").replace("/", "_").replace("-", "_"),
            "tags": ["inference"],
            "summary": summary,
            "description": f"{request.__doc__}{note}",
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _ref(request), "example": _fill(example, fill)}},
            },
            "responses": {
                "200": {**_json(response, response.__doc__ or ""), "headers": _SERVER_TIMING},
                **_errors([*_INFERENCE_ERRORS, *(["unauthorized"] if secured else [])]),
            },
        }
        if secured:
            operation["security"] = [{"api_key": []}]
        paths[path] = {"post": operation}
    paths["/v1/models"] = {
        "get": {
            "operationId": "v1_models",
            "tags": ["inference"],
            "summary": "The model, in OpenAI's format",
            "responses": {
                "200": _json(OpenAIModels, "The one model of this server."),
                **(_errors(["unauthorized"]) if secured else {}),
            },
            **({"security": [{"api_key": []}]} if secured else {}),
        }
    }
    paths["/info"] = {
        "get": {
            "operationId": "info",
            "tags": ["operation"],
            "summary": "What is served, how, and why",
            "responses": {
                "200": _json(InfoResponse, InfoResponse.__doc__ or ""),
                **_errors(["loading", *(["unauthorized"] if secured else [])]),
            },
            **({"security": [{"api_key": []}]} if secured else {}),
        }
    }
    paths["/health"] = _get("health", "Whether the process lives", {"200": _json(StatusResponse, "It does.")})
    paths["/ready"] = _get(
        "ready",
        "Whether requests are welcome",
        {"200": _json(StatusResponse, "They are."), **_errors(["loading", "draining"])},
    )
    paths["/metrics"] = _get(
        "metrics", "Metrics for Prometheus", {"200": _text("text/plain", "Prometheus' text format, version 0.0.4.")}
    )
    paths["/docs"] = _get("docs", "This description as a page", {"200": _text("text/html", "HTML.")})
    paths["/openapi.json"] = _get(
        "openapi",
        "This description",
        {"200": {"description": "OpenAPI 3.1.", "content": {"application/json": {"schema": {"type": "object"}}}}},
    )

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


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _json(kind: type, description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(kind)}}}


def _text(media_type: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": {"type": "string"}}}}


def _get(name: str, summary: str, responses: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"operationId": name, "tags": ["operation"], "summary": summary, "responses": responses}}


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
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(name, text)
    return value
