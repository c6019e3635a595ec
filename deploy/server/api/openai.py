"""OpenAI's routes, for clients that were written for its server, with the fields that Voyage and Mistral add."""

from __future__ import annotations

import base64
import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from ...tasks.rows import Mapped
from .embedded import MAKERS, check_kind, check_width, prompt_of
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

__all__ = ["OPENAI", "ROUTES"]

_STARTED_S = int(time.time())
_FIELD = re.compile(r"\$\.(\w+)|^(dimensions|input|model|output_dimension|output_dtype)\b")
_DTYPES = ("float", "binary", "ubinary")


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
    output_dimension: Annotated[
        int | None,
        Meta(description="The same, as Voyage and Mistral call it.", extra_json_schema={BOUND: "openai dimensions"}),
    ] = None
    output_dtype: Annotated[
        Annotated[str, Meta(extra_json_schema={"enum": list(_DTYPES)})] | None,
        Meta(
            description="Of Voyage and Mistral. ubinary: a bit for each number, 1 above zero, the first one highest; "
            "binary: these bytes less 128. With base64, the bytes of these."
        ),
    ] = None
    input_type: Annotated[
        Literal["query", "document"] | None,
        Meta(
            description="Of Voyage. The model's prompt of this name goes before each text (query: or `search_query`; "
            "document: or `passage`, `corpus`, `search_document`); if it has none, its default prompt."
        ),
    ] = None
    truncation: Annotated[
        bool | None, Meta(description="Of Voyage. false: a text longer than the model takes is an error.")
    ] = None


class OpenAIEmbedding(Struct):
    """One embedding in OpenAI's format; integers are bytes of bits."""

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


def _bytes_of(kind: str, row: Any) -> str:
    """A row of f32 [width] as bits, in base64."""
    return base64.b64encode(bytes(byte & 0xFF for byte in MAKERS[kind](row))).decode("ascii")


def _maker(request: OpenAIEmbeddingsRequest) -> Callable[[Any], Any] | None:
    """What makes an embedding of its numbers; None: they are it."""
    kind = request.output_dtype or "float"
    check_kind("output_dtype", kind, _DTYPES)
    if request.encoding_format != "base64":
        return MAKERS.get(kind)
    return MAKERS["base64"] if kind == "float" else functools.partial(_bytes_of, kind)


def _width(request: OpenAIEmbeddingsRequest, service: Service) -> int | None:
    """How many numbers an embedding is to have; None: all."""
    check_width("dimensions", request.dimensions, service)
    check_width("output_dimension", request.output_dimension, service)
    if None not in (request.dimensions, request.output_dimension) and request.dimensions != request.output_dimension:
        raise ApiError(
            "invalid_request",
            f"output_dimension: expected {request.dimensions}, what dimensions says, or none, got "
            f"{request.output_dimension}",
        )
    return request.dimensions or request.output_dimension


async def embeddings(context: Context, request: OpenAIEmbeddingsRequest, caller: Caller) -> Response:
    """POST /v1/embeddings."""
    service, limits = context.service, context.limits
    make = _maker(request)
    dimensions = _width(request, service)
    texts, ids = texts_or_ids(request.input, service.settings.accept_token_ids)
    if ids:
        result = await service.embed_ids(ids, caller, limits, dimensions=dimensions)
    else:
        result = await service.embed(
            texts,
            caller,
            limits,
            truncate=context.truncate(request.truncation),
            prompt_name=prompt_of(service.tokenizer.prompts.texts, request.input_type),
            dimensions=dimensions,
        )

    def item(pair: tuple[int, Any]) -> dict[str, Any]:
        index, row = pair
        return {"object": "embedding", "index": index, "embedding": row if make is None else make(row)}

    pairs = enumerate(result.values)
    body = {
        "object": "list",
        "data": [item(pair) for pair in pairs] if make is None else Mapped(item, list(pairs)),
        "model": service.model,
        "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
    }
    return Response(encode_list(body, "data", dimensions or service.width), (JSON_HEADER, server_timing(result)))


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
    values=lambda manifest, request: request.dimensions or request.output_dimension or manifest.width,
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
