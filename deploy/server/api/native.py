"""The server's own inference routes."""

from __future__ import annotations

from collections.abc import Sequence

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
)

__all__ = ["ROUTES"]


def _texts(inputs: str | list[str]) -> Sequence[str]:
    return [inputs] if isinstance(inputs, str) else inputs


async def embed(context: Context, request: EmbedRequest, caller: Caller) -> Response:
    """POST /api/embed."""
    service = context.service
    result = await service.embed(
        _texts(request.inputs),
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
        _texts(request.inputs), caller, context.limits, truncate=context.truncate(request.truncate)
    )
    return _predictions(context, result, 2 * len(context.service.manifest.labels or ()))


async def fill_mask(context: Context, request: FillMaskRequest, caller: Caller) -> Response:
    """POST /api/fill-mask."""
    result = await context.service.fill(
        _texts(request.inputs), caller, context.limits, top_k=request.top_k, truncate=context.truncate(request.truncate)
    )
    most_masks = max(map(len, result.values))
    return _predictions(context, result, 3 * most_masks * request.top_k)


def _predictions(context: Context, result: Result, values_each: int) -> Response:
    body = {"predictions": result.values, "model": context.service.model, "usage": {"tokens": result.tokens}}
    return Response(encode_list(body, "predictions", values_each), (JSON_HEADER, server_timing(result)))


ROUTES = (
    Route(
        method="POST",
        path="/api/embed",
        summary="Embed texts",
        handler=embed,
        task="feature-extraction",
        request=EmbedRequest,
        example={"inputs": ["A server answers.", "A second text."]},
        answer=EmbedResponse,
        limits=Limits.of_texts,
        values=lambda manifest, request: manifest.width,
        secured=True,
        tag="inference",
    ),
    Route(
        method="POST",
        path="/api/similarity",
        summary="Compare a text with others",
        handler=similarity,
        task="feature-extraction",
        request=SimilarityRequest,
        example={"source": "A server answers.", "texts": ["It replies.", "A fish swims."]},
        answer=SimilarityResponse,
        limits=Limits.of_texts,
        values=lambda manifest, request: manifest.width,
        value_bytes=12,  # The embedding, and its numbers where cosines are computed, one after the other.
        secured=True,
        tag="inference",
    ),
    Route(
        method="POST",
        path="/api/classify",
        summary="Classify texts",
        handler=predict,
        task="text-classification",
        request=PredictRequest,
        example={"inputs": "What a day!"},
        answer=PredictResponse,
        limits=Limits.of_texts,
        values=lambda manifest, request: 2 * len(manifest.labels or ()),
        value_bytes=128,  # Half of a dict.
        secured=True,
        tag="inference",
    ),
    Route(
        method="POST",
        path="/api/fill-mask",
        summary="Fill masked words",
        handler=fill_mask,
        task="fill-mask",
        request=FillMaskRequest,
        example={"inputs": "Paris is the {mask} of France.", "top_k": 3},
        answer=FillMaskResponse,
        limits=Limits.of_masked_texts,
        values=lambda manifest, request: 3 * request.top_k,
        secured=True,
        tag="inference",
    ),
)
