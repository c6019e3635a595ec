"""OpenAI's routes, for clients that were written for its server."""

from __future__ import annotations

import base64
import time
from typing import Any, cast

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
    error_fields,
    server_timing,
)
from .schemas import OpenAIEmbeddingsRequest, OpenAIEmbeddingsResponse, OpenAIModels

__all__ = ["OPENAI", "ROUTES"]

_STARTED_S = int(time.time())


def _error(error: ApiError) -> bytes:
    return encode({"error": {**error_fields(error), "param": None, "code": error.status}})


OPENAI = Dialect("openai", "/v1/", _error)


async def embeddings(context: Context, request: OpenAIEmbeddingsRequest, caller: Caller) -> Response:
    """POST /v1/embeddings."""
    service, limits = context.service, context.limits
    if request.dimensions not in (None, service.width):
        raise ApiError(
            "invalid_request",
            f"dimensions: expected {service.width}, the width of {service.model}, got {request.dimensions}",
        )
    given = [request.input] if isinstance(request.input, str) else request.input
    kinds = set(map(type, given))
    if kinds <= {str}:
        result = await service.embed(cast(list[str], given), caller, limits)
    elif kinds == {int}:
        result = await service.embed_ids([cast(list[int], given)], caller, limits)
    elif kinds == {list}:
        result = await service.embed_ids(cast(list[list[int]], given), caller, limits)
    else:
        raise ApiError("invalid_request", "input: expected only texts, only token ids, or only lists of token ids")
    rows = result.values
    if request.encoding_format == "base64":
        rows = [base64.b64encode(row).decode("ascii") for row in rows]
    body = {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "model": service.model,
        "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
    }
    return Response(encode_list(body, "data", service.width), (JSON_HEADER, server_timing(result)))


async def models(context: Context, request: None, caller: Caller) -> Response:
    """GET /v1/models."""
    model: dict[str, Any] = {
        "id": context.service.model,
        "object": "model",
        "created": _STARTED_S,
        "owned_by": "torch-ext",
    }
    return Response(encode({"object": "list", "data": [model]}))


ROUTES = (
    Route(
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
        values=lambda manifest, request: manifest.hidden_size,
        value_bytes=10,  # 4, and 6 of base64.
        secured=True,
        tag="inference",
    ),
    Route(
        method="GET",
        path="/v1/models",
        summary="The model, in OpenAI's format",
        handler=models,
        dialect=OPENAI,
        answer=OpenAIModels,
        answered="The one model of this server.",
        secured=True,
        tag="inference",
    ),
)
