"""Embeddings as Cohere has them, and vLLM in Cohere's words; its rerankers are in `rerank.py`."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from ...tasks.rows import Mapped
from .embedded import KINDS, MAKERS, check_kind, check_width, prompt_of
from .rerank import RERANK, RerankMeta
from .route import (
    JSON_HEADER,
    ApiError,
    Caller,
    Context,
    Limits,
    Response,
    Route,
    encode_list,
    server_timing,
    text_values,
)
from .schemas import BOUND, bound

__all__ = ["COHERE", "ROUTES"]

COHERE = dataclasses.replace(RERANK, name="cohere", prefix="/v2/embed")


class CohereEmbedRequest(Struct):
    """Texts to embed, in Cohere's format; fields that are not listed are ignored."""

    texts: Annotated[list[Annotated[str, bound("text")]], bound("texts")]
    model: Annotated[
        str | None, Meta(description="Which model, where the server has several; not checked where it has one.")
    ] = None
    input_type: Annotated[
        Literal["search_document", "search_query", "classification", "clustering"] | None,
        Meta(
            description="The model's prompt of this name goes before each text (search_query: or `query`; "
            "search_document: or `document`, `passage`, `corpus`); if it has none, its default prompt."
        ),
    ] = None
    embedding_types: Annotated[
        list[Annotated[str, Meta(extra_json_schema={"enum": list(KINDS)})]] | None,
        Meta(
            description="base64: little-endian float32. ubinary: a bit for each number, 1 above zero, the first one "
            "highest; binary: these bytes less 128."
        ),
    ] = None
    truncate: Annotated[
        Literal["NONE", "START", "END"] | None,
        Meta(description="Which end of a text that is too long is cut off; NONE: it is an error."),
    ] = None
    output_dimension: Annotated[
        int | None,
        Meta(
            description="Keep so many leading numbers and normalise them, if the model was trained for it, or with "
            "--any-dimensions.",
            extra_json_schema={BOUND: "openai dimensions"},
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        Meta(
            description="Texts are cut at the model's limit, and at no other.",
            extra_json_schema={BOUND: "whole window"},
        ),
    ] = None


class CohereEmbeddings(Struct):
    """Per type that was asked for, the embedding of each text."""

    floats: list[list[float]] | UnsetType = field(default=UNSET, name="float")
    base64: list[str] | UnsetType = UNSET
    binary: list[list[int]] | UnsetType = UNSET
    ubinary: list[list[int]] | UnsetType = UNSET


class CohereResponse(Struct):
    """Embeddings by their types; without `embedding_types`, floats."""

    id: str
    response_type: Literal["embeddings_by_type"]
    model: str
    texts: list[str]
    embeddings: CohereEmbeddings
    meta: RerankMeta


class CohereV1Response(Struct):
    """Embeddings as floats; with `embedding_types`, by their types."""

    id: str
    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    model: str
    texts: list[str]
    embeddings: list[list[float]] | CohereEmbeddings
    meta: RerankMeta


async def embed(context: Context, request: CohereEmbedRequest, caller: Caller) -> Response:
    """POST /v2/embed: embeddings by their types."""
    return await _embed(context, request, caller, "2", request.embedding_types or ["float"])


async def embed_v1(context: Context, request: CohereEmbedRequest, caller: Caller) -> Response:
    """POST /v1/embed: without `embedding_types`, bare floats."""
    return await _embed(context, request, caller, "1", request.embedding_types)


async def _embed(
    context: Context, request: CohereEmbedRequest, caller: Caller, version: str, types: Sequence[str] | None
) -> Response:
    service = context.service
    check_width("output_dimension", request.output_dimension, service)
    for kind in types or ():
        check_kind("embedding_types", kind)
    longest = service.manifest.max_tokens
    if request.max_tokens is not None and request.max_tokens < longest:
        raise ApiError(
            "invalid_request",
            f"max_tokens: expected none, or at least {longest}, where {service.model} cuts texts, got "
            f"{request.max_tokens}",
        )
    result = await service.embed(
        request.texts,
        caller,
        context.limits,
        truncate=context.truncate(None if request.truncate is None else request.truncate != "NONE"),
        cut_left=True if request.truncate == "START" else None,
        prompt_name=prompt_of(service.tokenizer.prompts.texts, request.input_type),
        dimensions=request.output_dimension,
    )
    rows = result.values
    found = {kind: Mapped(MAKERS[kind], rows) if kind in MAKERS else rows for kind in types or ()}
    body = {
        "id": secrets.token_hex(16),
        "response_type": "embeddings_by_type" if types else "embeddings_floats",
        "model": service.model,
        "texts": request.texts,
        "embeddings": found if types else rows,
        "meta": {"api_version": {"version": version}, "billed_units": {"input_tokens": result.tokens}},
    }
    width = request.output_dimension or service.width
    return Response(encode_list(body, "embeddings", width), (JSON_HEADER, server_timing(result)))


_V2 = Route(
    method="POST",
    path="/v2/embed",
    summary="Embed texts, in the format of Cohere v2 and vLLM",
    handler=embed,
    dialect=COHERE,
    task="feature-extraction",
    request=CohereEmbedRequest,
    example={
        "model": "{model}",
        "texts": ["A server answers."],
        "input_type": "search_document",
        "embedding_types": ["float"],
    },
    answer=CohereResponse,
    limits=Limits.of_texts,
    values=lambda manifest, request: (
        (request.output_dimension or manifest.width) * len(set(request.embedding_types or ("float",)))
        + text_values(request.texts)
    ),
    value_bytes=10,  # 4, and 6 of base64.
    secured=True,
    names_model=True,
    tag="cohere",
)

ROUTES = (
    _V2,
    dataclasses.replace(
        _V2,
        path="/v1/embed",
        summary="Embed texts, in the format of Cohere v1",
        handler=embed_v1,
        answer=CohereV1Response,
    ),
)
