"""The routes of text-embeddings-inference whose answers are other than one vector for each text."""

from __future__ import annotations

import time
from typing import Annotated, Any

from msgspec import Meta, Struct

from ...bundle import Manifest
from ..service import structured
from .route import Caller, Context, Limits, Response, encode_rows
from .schemas import Inputs, texts_of
from .tei import measured, row
from .tei_schemas import Cut, Direction, Prompt, cut_left

__all__ = [
    "ROUTES",
    "TeiEmbedAllResponse",
    "TeiSparseResponse",
    "TeiVectorsRequest",
    "embed_all",
    "embed_sparse",
    "sparse_values",
    "vector_values",
]


class TeiVectorsRequest(Struct):
    """Texts to embed."""

    inputs: Inputs
    truncate: Cut = None
    truncation_direction: Direction = "Right"
    prompt_name: Prompt = None


class TeiSparseValue(Struct):
    """A word of the vocabulary and its weight."""

    index: Annotated[int, Meta(ge=0)]
    value: float


TeiSparseResponse = list[list[TeiSparseValue]]
TeiEmbedAllResponse = list[list[list[float]]]


def _options(context: Context, request: TeiVectorsRequest) -> dict[str, Any]:
    return {
        "truncate": context.truncate(request.truncate),
        "cut_left": cut_left(request.truncation_direction),
        "prompt_name": request.prompt_name,
    }


async def embed_sparse(context: Context, request: TeiVectorsRequest, caller: Caller) -> Response:
    """POST /embed_sparse."""
    started_s = time.perf_counter()
    texts = texts_of(request.inputs)
    result = await structured.embed_sparse(context.service, texts, caller, context.limits, **_options(context, request))
    headers = measured(result, sum(map(len, texts)), started_s)
    return Response(encode_rows(result.values, 2 * max(map(len, result.values))), headers)


async def embed_all(context: Context, request: TeiVectorsRequest, caller: Caller) -> Response:
    """POST /embed_all."""
    started_s = time.perf_counter()
    service = context.service
    texts = texts_of(request.inputs)
    result = await structured.embed_all(service, texts, caller, context.limits, **_options(context, request))
    headers = measured(result, sum(map(len, texts)), started_s)
    width = vector_values(service.manifest, request)
    return Response(encode_rows(result.values, width * max(map(len, result.values))), headers)


def vector_values(manifest: Manifest, request: TeiVectorsRequest) -> int:
    """Numbers in the vector of a token: behind linear stages only if they are for tokens."""
    return manifest.hidden_size if manifest.token_vectors is None else manifest.width


def sparse_values(manifest: Manifest, request: TeiVectorsRequest) -> int:
    """Numbers in a sparse vector: hundreds of words for a text of a trained model."""
    return 2048


ROUTES = (
    row(
        "/embed_sparse",
        "sparse-embedding",
        summary="Weights of words for texts",
        handler=embed_sparse,
        request=TeiVectorsRequest,
        example={"inputs": ["A server answers.", "A second text."]},
        answer=TeiSparseResponse,
        answered="Per text the words with a weight above 0.",
        limits=Limits.of_texts,
        values=sparse_values,
        value_bytes=8,
    ),
    *(
        row(
            "/embed_all",
            task,
            summary="A vector for each token of texts",
            handler=embed_all,
            request=TeiVectorsRequest,
            example={"inputs": "A server answers."},
            answer=TeiEmbedAllResponse,
            answered=answered,
            limits=Limits.of_texts,
            values=vector_values,
        )
        for task, answered in (
            ("feature-extraction", "Per text, per token its vector, special tokens included."),
            ("token-embedding", "Per text, per token its vector, but for tokens that the model gives none."),
        )
    ),
)
