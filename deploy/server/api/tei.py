"""The routes of text-embeddings-inference (TEI): a client that was written for it needs another address only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..service.similarity import similarity as similarities
from ..service.words import decode as decoded
from ..service.words import tokenize as tokenized
from .rerank import RERANK, DocumentsResponse, documents
from .route import (
    JSON_HEADER,
    ApiError,
    Caller,
    Context,
    Dialect,
    Limits,
    Response,
    Result,
    Route,
    encode,
    encode_rows,
    error_text,
    server_timing,
    text_values,
)
from .schemas import texts_of
from .tei_schemas import (
    RerankRequest,
    TeiDecodeRequest,
    TeiDecodeResponse,
    TeiEmbedRequest,
    TeiEmbedResponse,
    TeiError,
    TeiPredictRequest,
    TeiPredictResponse,
    TeiRerankResponse,
    TeiSimilarityRequest,
    TeiSimilarityResponse,
    TeiTokenizeRequest,
    TeiTokenizeResponse,
    cut_left,
    predict_inputs,
    texts_or_ids,
)

__all__ = ["ROUTES", "TEI", "embed", "measured", "predict", "rerank", "similarity"]

_TYPES = {
    "no_inputs": "Empty",
    "queue_full": "Overloaded",
    "memory_full": "Overloaded",
    "rate_limit_exceeded": "Overloaded",
    "deadline": "Overloaded",
    "loading": "Unhealthy",
    "draining": "Unhealthy",
    "internal": "Backend",
    "wrong_task": "Backend",
}
"""Types of errors by our kinds; what is not here is `Validation`."""


def _error(error: ApiError) -> bytes:
    return encode({"error": error_text(error), "error_type": _TYPES.get(error.kind, "Validation")})


TEI = Dialect("tei", "/models/", _error, TeiError, {"no_inputs": 400, "wrong_task": 424, "internal": 424})


def measured(result: Result, chars: int, started_s: float) -> tuple[tuple[bytes, bytes], ...]:
    """Headers that tell what an answer cost, times in ms.

    Args:
        result: What was computed.
        chars: Characters of the inputs.
        started_s: When the request was there, by `time.perf_counter`.
    """
    total_ms = b"%d" % (1e3 * (time.perf_counter() - started_s))
    return (
        JSON_HEADER,
        (b"x-compute-type", b"cpu"),
        (b"x-compute-time", total_ms),
        (b"x-compute-characters", b"%d" % chars),
        (b"x-compute-tokens", b"%d" % result.tokens),
        (b"x-total-time", total_ms),
        (b"x-tokenization-time", b"%d" % (1e3 * result.tokenize_s)),
        (b"x-queue-time", b"%d" % (1e3 * result.queue_s)),
        (b"x-inference-time", b"%d" % (1e3 * result.infer_s)),
        server_timing(result),
    )


async def embed(context: Context, request: TeiEmbedRequest, caller: Caller) -> Response:
    """POST /embed."""
    started_s = time.perf_counter()
    service, limits = context.service, context.limits
    texts, ids = texts_or_ids(request.inputs, service.settings.accept_token_ids)
    normalize = request.normalize is not False
    if ids:
        result = await service.embed_ids(ids, caller, limits, normalize=normalize, dimensions=request.dimensions)
    else:
        result = await service.embed(
            texts,
            caller,
            limits,
            normalize=normalize,
            truncate=context.truncate(request.truncate),
            cut_left=cut_left(request.truncation_direction),
            prompt_name=request.prompt_name,
            dimensions=request.dimensions,
        )
    width = request.dimensions or service.width
    return Response(encode_rows(result.values, width), measured(result, sum(map(len, texts)), started_s))


async def predict(context: Context, request: TeiPredictRequest, caller: Caller) -> Response:
    """POST /predict."""
    started_s = time.perf_counter()
    inputs, batch = predict_inputs(request.inputs)
    result = await context.service.classify(
        inputs,
        caller,
        context.limits,
        raw_scores=request.raw_scores,
        truncate=context.truncate(request.truncate),
        cut_left=cut_left(request.truncation_direction),
    )
    chars = sum(len(item) if isinstance(item, str) else len(item[0]) + len(item[1]) for item in inputs)
    headers = measured(result, chars, started_s)
    if not batch:
        return Response(encode(result.values[0]), headers)
    return Response(encode_rows(result.values, 2 * len(context.service.manifest.labels or ())), headers)


async def rerank(context: Context, request: RerankRequest, caller: Caller) -> Response:
    """POST /rerank."""
    if isinstance(request.documents, list) and not isinstance(request.texts, list):
        return await documents(context, request, caller)
    started_s = time.perf_counter()
    texts = request.texts
    if not isinstance(texts, list):
        raise ApiError("invalid_request", "expected `texts`, or `documents`, got neither")
    result = await context.service.rerank(
        request.query,
        texts,
        caller,
        context.limits,
        raw_scores=request.raw_scores,
        truncate=context.truncate(request.truncate),
        cut_left=cut_left(request.truncation_direction),
    )
    scores: Sequence[float] = result.values
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    if request.return_text:
        ranks: list[dict[str, Any]] = [{"index": i, "text": texts[i], "score": scores[i]} for i in order]
    else:
        ranks = [{"index": i, "score": scores[i]} for i in order]
    chars = len(texts) * len(request.query) + sum(map(len, texts))
    values_each = 2 + (text_values(texts) if request.return_text else 0)
    return Response(encode_rows(ranks, values_each), measured(result, chars, started_s))


async def similarity(context: Context, request: TeiSimilarityRequest, caller: Caller) -> Response:
    """POST /similarity."""
    started_s = time.perf_counter()
    source, texts = request.inputs.source_sentence, request.inputs.sentences
    options = request.parameters
    result = await similarities(
        context.service,
        source,
        texts,
        caller,
        context.limits,
        truncate=context.truncate(None if options is None else options.truncate),
        cut_left=None if options is None else cut_left(options.truncation_direction),
        prompt_name=None if options is None else options.prompt_name,
    )
    chars = len(source) + sum(map(len, texts))
    return Response(encode_rows(result.values, 1), measured(result, chars, started_s))


async def tokenize(context: Context, request: TeiTokenizeRequest, caller: Caller) -> Response:
    """POST /tokenize."""
    texts = texts_of(request.inputs)
    found = await tokenized(
        context.service,
        texts,
        caller,
        context.limits,
        special=request.add_special_tokens,
        prompt_name=request.prompt_name,
    )
    # A token that takes four characters has four fields.
    return Response(encode_rows(found, 8 + sum(map(len, texts)) // len(texts)))


async def decode(context: Context, request: TeiDecodeRequest, caller: Caller) -> Response:
    """POST /decode."""
    texts = await decoded(context.service, request.ids, skip_special_tokens=request.skip_special_tokens)
    return Response(encode_rows(texts, 1 + text_values(texts)))


def row(path: str, task: str | None, **fields: Any) -> Route:
    """A row of this dialect."""
    return Route(
        method="POST", path=path, task=task, dialect=TEI, secured=True, tag="text-embeddings-inference", **fields
    )


_QUERY = {"query": "What is a quota?", "texts": ["A part of the CPU time.", "A fish."]}
_SIMILAR = {"inputs": {"source_sentence": "A server answers.", "sentences": ["It replies.", "A fish swims."]}}

ROUTES = (
    row(
        "/embed",
        "feature-extraction",
        summary="Embed texts",
        handler=embed,
        request=TeiEmbedRequest,
        example={"inputs": ["A server answers.", "A second text."]},
        answer=TeiEmbedResponse,
        answered="Per text its embedding.",
        limits=Limits.of_texts_or_ids,
        values=lambda manifest, request: request.dimensions or manifest.width,
    ),
    row(
        "/predict",
        "text-classification",
        summary="Classify texts, or pairs of texts",
        handler=predict,
        request=TeiPredictRequest,
        example={"inputs": "What a day!"},
        answer=TeiPredictResponse,
        answered="Every class with its score, best first; for a batch, a list of these.",
        limits=Limits.of_texts,
        values=lambda manifest, request: 2 * len(manifest.labels or ()),
        value_bytes=128,
    ),
    row(
        "/rerank",
        "text-classification",
        names_model=True,
        speaks=lambda request: RERANK if isinstance(request.documents, list) else None,
        summary="Rank texts by a query; with `documents`, in the format of Cohere, Jina and vLLM",
        handler=rerank,
        request=RerankRequest,
        example=_QUERY,
        answered="Index and score of each text, best first; to `documents`, what /v1/rerank answers.",
        answer=TeiRerankResponse | DocumentsResponse,
        other=RERANK,
        limits=Limits.of_texts,
        values=lambda manifest, request: 2,
        value_bytes=256,
    ),
    row(
        "/similarity",
        "feature-extraction",
        summary="Compare a text with others",
        handler=similarity,
        request=TeiSimilarityRequest,
        example=_SIMILAR,
        answer=TeiSimilarityResponse,
        answered="The cosine of each of them.",
        limits=Limits.of_texts,
        values=lambda manifest, request: manifest.width,
        value_bytes=12,
    ),
    row(
        "/tokenize",
        None,
        summary="Tokens of texts",
        handler=tokenize,
        request=TeiTokenizeRequest,
        example={"inputs": "A server answers."},
        answer=TeiTokenizeResponse,
        answered="Per text its tokens.",
        limits=Limits.of_whole_texts,
        errors=("no_inputs",),
    ),
    row(
        "/decode",
        None,
        summary="Texts of token ids",
        handler=decode,
        request=TeiDecodeRequest,
        example={"ids": [5, 6, 7]},
        answer=TeiDecodeResponse,
        answered="Per list of ids its text.",
        limits=Limits.of_texts_or_ids,
        errors=("no_inputs",),
    ),
)
