"""OpenAI's routes, for clients that were written for its server."""

from __future__ import annotations

import base64
import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from .route import (
    JSON_HEADER,
    ApiError,
    Caller,
    Context,
    Dialect,
    Limits,
    Response,
    Route,
    Service,
    encode,
    encode_list,
    error_text,
    server_timing,
)
from .schemas import BOUND
from .tei_schemas import texts_or_ids

__all__ = ["OPENAI", "ROUTES", "base64_row", "check_width"]

_STARTED_S = int(time.time())
_FIELD = re.compile(r"\$\.(\w+)|^(dimensions|input|model)\b")
_INLINE_ROWS = 512


class OpenAIEmbeddingsRequest(Struct):
    """OpenAI's request; fields that are not listed are ignored, as its own server does with most."""

    input: Annotated[
        str | list[str | int | list[int]],
        Meta(
            description="A text or a list of texts. With --accept-token-ids also token ids of the model's tokenizer, "
            "or a list of those; ids that do not start with its first special token get its special tokens added.",
            examples=["A server answers.", ["One text.", "Another one."]],
            extra_json_schema={BOUND: "texts or ids"},
        ),
    ]
    model: Annotated[
        str | None,
        Meta(
            description="Which model, where the server has several; not checked where it has one. The answer names it."
        ),
    ] = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None, Meta(description="base64: little-endian float32; null: float.")
    ] = "float"
    dimensions: Annotated[
        int | None,
        Meta(
            description="Keep so many leading numbers and normalise them, if the model was trained for it, or with "
            "--any-dimensions.",
            extra_json_schema={BOUND: "openai dimensions"},
        ),
    ] = None


class OpenAIEmbedding(Struct):
    """One embedding in OpenAI's format."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class OpenAIUsage(Struct):
    """OpenAI's token counts."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddingsResponse(Struct):
    """OpenAI's answer."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class OpenAIModel(Struct):
    """A model that this server has."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenAIModels(Struct):
    """OpenAI's list of models."""

    object: Literal["list"]
    data: list[OpenAIModel]


class OpenAIErrorDetail(Struct):
    """What went wrong.

    Attributes:
        message: What was expected, what came, what to do.
        type: `invalid_request_error`, `authentication_error`, `rate_limit_error` or `server_error`.
        param: The field that is wrong, or null.
        code: Kind of error, the same for all errors of that kind.
    """

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(Struct):
    """Every error of these routes."""

    error: OpenAIErrorDetail


_STATUSES = {"invalid_request": 400, "no_inputs": 400}


def _error(error: ApiError) -> bytes:
    status = _STATUSES.get(error.kind, error.status)
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message = error_text(error)
    field = _FIELD.search(message) if status in (400, 404, 413) else None
    param = None if field is None else field[1] or field[2]
    return encode({"error": {"message": message, "type": kind, "param": param, "code": error.kind}})


OPENAI = Dialect("openai", "/v1/", _error, OpenAIError, _STATUSES)


def base64_row(row: Any) -> str:
    """A row of f32 [width] in base64, little-endian."""
    return base64.b64encode(row).decode("ascii")


def _base64(rows: Sequence[Any]) -> list[str]:
    return [base64_row(row) for row in rows]


async def embeddings(context: Context, request: OpenAIEmbeddingsRequest, caller: Caller) -> Response:
    """POST /v1/embeddings."""
    service, limits = context.service, context.limits
    dimensions = request.dimensions
    check_width("dimensions", dimensions, service)
    texts, ids = texts_or_ids(request.input, service.settings.accept_token_ids)
    if ids:
        result = await service.embed_ids(ids, caller, limits, dimensions=dimensions)
    else:
        result = await service.embed(texts, caller, limits, truncate=context.truncate(), dimensions=dimensions)
    rows = result.values
    if request.encoding_format == "base64":
        rows = _base64(rows) if len(rows) <= _INLINE_ROWS else await service.aside(_base64, rows)
    body = {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "model": service.model,
        "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
    }
    return Response(encode_list(body, "data", dimensions or service.width), (JSON_HEADER, server_timing(result)))


def check_width(field: str, found: int | None, service: Service) -> None:
    """Checks to how many numbers embeddings are to be cut.

    Args:
        field: What the request calls it.
        found: What it says; None: nothing.
        service: The model.

    Raises:
        ApiError: The model was not trained for so many (400).
    """
    known = service.dimensions
    if found is None or found in known:
        return
    if found > service.width or isinstance(known, range):
        message = f"{field}: expected 1 to {service.width}, the width of {service.model}, got {found}"
    else:
        widths = ", ".join(map(str, known))
        message = (
            f"{field}: expected {widths}, which {service.model} was trained for, got {found}; the option "
            "--any-dimensions cuts embeddings to any width"
        )
    raise ApiError("invalid_request", message)


async def models(context: Context, request: None, caller: Caller) -> Response:
    """GET /v1/models."""
    return Response(encode({"object": "list", "data": [_model(service) for service in context.services]}))


async def model(context: Context, request: None, caller: Caller) -> Response:
    """GET /v1/models/{model}."""
    return Response(encode(_model(context.service)))


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.model, "object": "model", "created": _STARTED_S, "owned_by": "torch-ext"}


_EMBEDDINGS = Route(
    method="POST",
    path="/v1/embeddings",
    summary="Embed texts, in OpenAI's format",
    handler=embeddings,
    dialect=OPENAI,
    task="feature-extraction",
    request=OpenAIEmbeddingsRequest,
    example={"input": ["A server answers."], "model": "{model}", "encoding_format": "float"},
    answer=OpenAIEmbeddingsResponse,
    limits=Limits.of_texts_or_ids,
    values=lambda manifest, request: request.dimensions or manifest.width,
    value_bytes=10,  # 4, and 6 of base64.
    secured=True,
    names_model=True,
    tag="openai",
)

ROUTES = (
    _EMBEDDINGS,
    dataclasses.replace(_EMBEDDINGS, path="/embeddings", summary="The same as /v1/embeddings"),
    Route(
        method="GET",
        path="/v1/models",
        summary="The models, in OpenAI's format",
        handler=models,
        dialect=OPENAI,
        answer=OpenAIModels,
        answered="The models of this server.",
        secured=True,
        tag="openai",
    ),
    Route(
        method="GET",
        path="/v1/models/{model}",
        summary="One model, in OpenAI's format",
        handler=model,
        dialect=OPENAI,
        answer=OpenAIModel,
        secured=True,
        tag="openai",
    ),
)
