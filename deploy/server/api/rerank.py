"""Reranking as Cohere, Jina and vLLM have it."""

from __future__ import annotations

import math
import secrets
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from .route import (
    JSON_HEADER,
    ApiError,
    Caller,
    Context,
    Dialect,
    Limits,
    Response,
    Route,
    encode,
    encode_list,
    error_text,
    server_timing,
    text_values,
)
from .schemas import bound

__all__ = ["RERANK", "ROUTES", "RerankMeta", "documents"]

_Text = Annotated[str, bound("text")]


class RerankDocument(Struct):
    """A text to rank."""

    text: _Text


class DocumentsRequest(Struct):
    """A query, and documents to rank by how well they answer it; fields that are not listed are ignored."""

    query: _Text
    documents: Annotated[list[_Text | RerankDocument], bound("texts")]
    model: Annotated[
        str | None, Meta(description="Which model, where the server has several; not checked where it has one.")
    ] = None
    top_n: Annotated[int, Meta(ge=1, description="How many of the best are answered.")] | None = None
    return_documents: Annotated[bool | None, Meta(description="Answer the documents, too.")] = None


class RerankResult(Struct):
    """A document, by its place in the request, and its score from 0 to 1."""

    index: int
    relevance_score: float
    document: RerankDocument | UnsetType = UNSET


class RerankUsage(Struct):
    """What a request cost, in tokens."""

    prompt_tokens: int
    total_tokens: int


class RerankMeta(Struct):
    """What Cohere's clients expect to be told."""

    api_version: dict[str, str]
    billed_units: dict[str, int]


class DocumentsResponse(Struct):
    """The documents, best first."""

    id: str
    model: str
    object: str
    results: list[RerankResult]
    usage: RerankUsage
    meta: RerankMeta


class RerankError(Struct):
    """Every error: the message twice, since Cohere's clients and Jina's look in different places."""

    message: str
    detail: str


def _error(error: ApiError) -> bytes:
    text = error_text(error)
    return encode({"message": text, "detail": text})


RERANK = Dialect("rerank", "/v1/rerank", _error, RerankError, {"no_inputs": 400, "invalid_request": 400})


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1.0 + power)


async def documents(context: Context, request: Any, caller: Caller) -> Response:
    """POST /v1/rerank, /v2/rerank, and /rerank with `documents`.

    Args:
        context: Of the route.
        request: Its body: what `DocumentsRequest` has.
        caller: Who waits.
    """
    service = context.service
    texts = [found if isinstance(found, str) else found.text for found in request.documents]
    try:
        result = await service.rerank(
            request.query, texts, caller, context.limits, raw_scores=True, truncate=context.truncate()
        )
    except ApiError as error:
        error.dialect = RERANK
        raise
    scores = [_sigmoid(logit) for logit in result.values]
    order = sorted(range(len(scores)), key=result.values.__getitem__, reverse=True)[: request.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if request.return_documents:
        for item in results:
            item["document"] = {"text": texts[item["index"]]}
    body = {
        "id": secrets.token_hex(16),
        "model": service.model,
        "object": "list",
        "results": results,
        "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }
    values_each = 2 + (text_values(texts) if request.return_documents else 0)
    return Response(encode_list(body, "results", values_each), (JSON_HEADER, server_timing(result)))


ROUTES = tuple(
    Route(
        method="POST",
        path=path,
        summary=f"Rank documents by a query, in the format of {of}",
        handler=documents,
        dialect=RERANK,
        task="text-classification",
        request=DocumentsRequest,
        example={
            "model": "{model}",
            "query": "What is a quota?",
            "documents": ["A part of the CPU time.", "A fish."],
            "top_n": 1,
        },
        answer=DocumentsResponse,
        limits=Limits.of_texts,
        values=lambda manifest, request: 2,
        value_bytes=256,
        secured=True,
        names_model=True,
        tag="rerank",
    )
    for path, of in (("/v1/rerank", "Jina, vLLM and Cohere v1"), ("/v2/rerank", "Cohere v2"))
)
