"""The server's own inference routes."""

from __future__ import annotations

from typing import Any

from ..service.similarity import similarity as similarities
from .route import JSON_HEADER, Caller, Context, Limits, Response, Result, Route, encode_list, server_timing
from .schemas import (
    EmbedRequest,
    EmbedResponse,
    FillMaskRequest,
    FillMaskResponse,
    PredictRequest,
    PredictResponse,
    SimilarityRequest,
    SimilarityResponse,
    texts_of,
)

__all__ = ["ROUTES", "predictions", "row"]


async def embed(context: Context, request: EmbedRequest, caller: Caller) -> Response:
    """POST /api/embed."""
    service = context.service
    result = await service.embed(
        texts_of(request.inputs),
        caller,
        context.limits,
        normalize=request.normalize,
        truncate=context.truncate(request.truncate),
    )
    body = {"embeddings": result.values, "model": service.model, "usage": {"tokens": result.tokens}}
    return Response(encode_list(body, "embeddings", service.width), (JSON_HEADER, server_timing(result)))


async def similarity(context: Context, request: SimilarityRequest, caller: Caller) -> Response:
    """POST /api/similarity."""
    service = context.service
    result = await similarities(
        service, request.source, request.texts, caller, context.limits, truncate=context.truncate(request.truncate)
    )
    body = {"similarities": result.values, "model": service.model, "usage": {"tokens": result.tokens}}
    return Response(encode_list(body, "similarities", 1), (JSON_HEADER, server_timing(result)))


async def predict(context: Context, request: PredictRequest, caller: Caller) -> Response:
    """POST /api/classify."""
    result = await context.service.classify(
        texts_of(request.inputs), caller, context.limits, truncate=context.truncate(request.truncate)
    )
    return predictions(context, result, 2 * len(context.service.manifest.labels or ()))


async def fill_mask(context: Context, request: FillMaskRequest, caller: Caller) -> Response:
    """POST /api/fill-mask."""
    result = await context.service.fill(
        texts_of(request.inputs),
        caller,
        context.limits,
        top_k=request.top_k,
        truncate=context.truncate(request.truncate),
    )
    most_masks = max(map(len, result.values))
    return predictions(context, result, 3 * most_masks * request.top_k)


def predictions(context: Context, result: Result, values_each: int) -> Response:
    """The answer of a route that predicts.

    Args:
        context: Of the request.
        result: What the model answered.
        values_each: Numbers and texts for each input, at most.
    """
    body = {"predictions": result.values, "model": context.service.model, "usage": {"tokens": result.tokens}}
    return Response(encode_list(body, "predictions", values_each), (JSON_HEADER, server_timing(result)))


def row(path: str, task: str, **fields: Any) -> Route:
    """A row of this dialect."""
    return Route(method="POST", path=path, task=task, secured=True, tag="inference", **fields)


ROUTES = (
    row(
        "/api/embed",
        "feature-extraction",
        summary="Embed texts",
        handler=embed,
        request=EmbedRequest,
        example={"inputs": ["A server answers.", "A second text."]},
        answer=EmbedResponse,
        limits=Limits.of_texts,
        values=lambda manifest, request: manifest.width,
    ),
    row(
        "/api/similarity",
        "feature-extraction",
        summary="Compare a text with others",
        handler=similarity,
        request=SimilarityRequest,
        example={"source": "A server answers.", "texts": ["It replies.", "A fish swims."]},
        answer=SimilarityResponse,
        limits=Limits.of_texts,
        values=lambda manifest, request: manifest.width,
        value_bytes=12,  # The embedding, and its numbers where cosines are computed, one after the other.
    ),
    row(
        "/api/classify",
        "text-classification",
        summary="Classify texts",
        handler=predict,
        request=PredictRequest,
        example={"inputs": "What a day!"},
        answer=PredictResponse,
        limits=Limits.of_texts,
        values=lambda manifest, request: 2 * len(manifest.labels or ()),
        value_bytes=128,  # Half of a dict.
    ),
    row(
        "/api/fill-mask",
        "fill-mask",
        summary="Fill masked words",
        handler=fill_mask,
        request=FillMaskRequest,
        example={"inputs": "Paris is the {mask} of France.", "top_k": 3},
        answer=FillMaskResponse,
        limits=Limits.of_masked_texts,
        values=lambda manifest, request: 3 * request.top_k,
    ),
)
