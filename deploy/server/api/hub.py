"""`POST /` and `/invocations`: what the bundle's task is for, in the words of TEI and of huggingface_hub.

A client of the hub is given the address of the server as its model, and sends `inputs` and `parameters` there as to a
pipeline. TEI answers what its model is for on the same paths; its clients send no `parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from ...tasks.answers import AnswerOptions
from ...tasks.rows import Mapped
from ..limits.bounds import MAX_TOP_K
from ..service import structured
from .hub_masks import FILLINGS, FillMaskParameters, RootFillMaskRequest, encode_fillings, filling_values
from .route import (
    JSON_HEADER,
    ApiError,
    Caller,
    Context,
    Handler,
    Limits,
    Response,
    Route,
    encode,
    encode_rows,
    server_timing,
)
from .schemas import BOUND, Inputs, bound, texts_of
from .tei import embed, predict, rerank, row, similarity
from .tei_schemas import (
    Cut,
    Direction,
    Prompt,
    RerankRequest,
    SimilarityInput,
    SimilarityParameters,
    TeiEmbedRequest,
    TeiPredictRequest,
    TeiSimilarityRequest,
    cut_left,
)
from .tei_vectors import (
    TeiEmbedAllResponse,
    TeiSparseResponse,
    TeiVectorsRequest,
    embed_all,
    embed_sparse,
    sparse_values,
    vector_values,
)

__all__ = ["ROUTES"]

_ENTITY_VALUES = 5
"""Numbers and texts of an entity."""

_MANY = Annotated[int, Meta(ge=1)]


class RootEmbedRequest(Struct):
    """Texts to embed, as /embed has them, or a text to compare with others, as /similarity has them."""

    inputs: Annotated[
        str | list[str | int | list[int]] | SimilarityInput, Meta(extra_json_schema={BOUND: "texts or similarity"})
    ]
    normalize: bool | None = True
    truncate: Cut = None
    truncation_direction: Direction = "Right"
    prompt_name: Prompt = None
    dimensions: Annotated[int | None, Meta(extra_json_schema={BOUND: "dimensions"})] = None
    parameters: SimilarityParameters | None = None


class ClassifyParameters(Struct):
    """How a pipeline answers."""

    top_k: _MANY | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    candidate_labels: Annotated[Any, bound("nothing")] = None


class RootClassifyRequest(Struct):
    """Texts to classify, as /predict has them or, with `parameters`, as a pipeline; or a query and texts to rank."""

    EITHER: ClassVar = (("inputs",), ("query", "texts"))

    inputs: Annotated[str | list[str | list[str]] | None, Meta(extra_json_schema={BOUND: "predict"})] = None
    raw_scores: bool = False
    truncate: Cut = None
    truncation_direction: Direction = "Right"
    parameters: ClassifyParameters | None = None
    query: Annotated[str | None, bound("text if any")] = None
    texts: Annotated[list[str] | None, bound("texts if any")] = None
    return_text: bool = False


async def root_embed(context: Context, request: RootEmbedRequest, caller: Caller) -> Response:
    """Embeddings, or cosines."""
    if isinstance(request.inputs, SimilarityInput):
        return await similarity(context, TeiSimilarityRequest(request.inputs, request.parameters), caller)
    wanted = TeiEmbedRequest(
        request.inputs,
        request.normalize,
        request.truncate,
        request.truncation_direction,
        request.prompt_name,
        request.dimensions,
    )
    return await embed(context, wanted, caller)


def _softmax(logits: Sequence[float]) -> list[float]:
    most = max(logits)
    powers = [math.exp(value - most) for value in logits]
    total = math.fsum(powers)
    return [power / total for power in powers]


def _sigmoids(logits: Sequence[float]) -> list[float]:
    return [0.5 * (1.0 + math.tanh(0.5 * value)) for value in logits]


_FUNCTIONS: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoids,
    "none": list,
}


async def root_classify(context: Context, request: RootClassifyRequest, caller: Caller) -> Response:
    """Labels with scores: as TEI answers, or as a pipeline where there are `parameters`; or ranks."""
    options = request.parameters
    if request.inputs is None:
        if request.query is None or request.texts is None:
            raise ApiError("invalid_request", "expected `inputs`, or `query` and `texts`, got neither")
        return await rerank(
            context,
            RerankRequest(
                request.query,
                request.texts,
                request.raw_scores,
                request.return_text,
                request.truncate,
                request.truncation_direction,
            ),
            caller,
        )
    if options is None:
        wanted = TeiPredictRequest(request.inputs, request.raw_scores, request.truncate, request.truncation_direction)
        return await predict(context, wanted, caller)
    if options.candidate_labels is not None:
        labels = ", ".join((context.service.manifest.labels or ())[:5])
        raise ApiError(
            "invalid_request",
            "parameters.candidate_labels: expected none, this server has no zero-shot classification; its model has "
            f"the labels {labels}",
        )
    if isinstance(request.inputs, list) and all(isinstance(text, str) for text in request.inputs):
        inputs: list[Any] = request.inputs
    elif isinstance(request.inputs, str):
        inputs = [request.inputs]
    else:
        raise ApiError("invalid_request", "inputs: expected a text or a list of texts beside `parameters`")
    chosen = options.function_to_apply
    result = await context.service.classify(
        inputs,
        caller,
        context.limits,
        raw_scores=chosen is not None,
        truncate=context.truncate(request.truncate),
        cut_left=cut_left(request.truncation_direction),
    )
    top_k = options.top_k

    def chosen_labels(labels: Sequence[Any]) -> Sequence[Any]:
        if chosen is not None:
            scores = _FUNCTIONS[chosen]([item["score"] for item in labels])
            labels = [{"label": item["label"], "score": score} for item, score in zip(labels, scores, strict=True)]
        return labels[:top_k]

    answers = Mapped(chosen_labels, result.values)
    values_each = 2 * len(context.service.manifest.labels or ())
    return Response(encode_rows(answers, values_each), (JSON_HEADER, server_timing(result)))


async def root_fill_mask(context: Context, request: RootFillMaskRequest, caller: Caller) -> Response:
    """The best tokens for each mask, as a pipeline: of a single mask without a list around them."""
    options = request.parameters or FillMaskParameters()
    if options.targets is not None:
        raise ApiError("invalid_request", "parameters.targets: expected none, this server ranks the whole vocabulary")
    texts = texts_of(request.inputs)
    result = await context.service.fill(
        texts, caller, context.limits, top_k=options.top_k or 5, truncate=context.truncate()
    )
    mask = context.service.manifest.special_tokens["mask"]
    assert mask is not None  # The manifest was checked.
    single = isinstance(request.inputs, str)
    answer = encode_fillings(texts, result, context.service.tokenizer, mask.id, single)
    return Response(answer, (JSON_HEADER, server_timing(result)))


class TokenClassifyParameters(Struct):
    """How a pipeline answers."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None = None
    ignore_labels: list[str] | None = None


class RootTokenClassifyRequest(Struct):
    """Texts in which to find entities."""

    inputs: Inputs
    parameters: TokenClassifyParameters | None = None


class AnswerParameters(Struct):
    """How a pipeline answers."""

    top_k: Annotated[int, Meta(ge=1, le=MAX_TOP_K)] | None = None
    max_answer_len: Annotated[int, Meta(ge=1, le=512)] | None = None
    max_seq_len: Annotated[int, Meta(ge=3, extra_json_schema={BOUND: "window"})] | None = None
    doc_stride: Annotated[int, Meta(ge=0)] | None = None
    handle_impossible_answer: bool | None = None
    align_to_words: bool | None = None


class AskedQuestion(Struct):
    """A question, and the text in which to look for an answer."""

    question: Annotated[str, bound("some text")]
    context: Annotated[str, bound("some text")]


class RootAnswerRequest(Struct):
    """A question about a text."""

    inputs: AskedQuestion
    parameters: AnswerParameters | None = None


async def root_token_classify(context: Context, request: RootTokenClassifyRequest, caller: Caller) -> Response:
    """Entities, as a pipeline: of a single text without a list around them."""
    options = request.parameters or TokenClassifyParameters()
    texts = texts_of(request.inputs)
    strategy = options.aggregation_strategy or "simple"
    result = await structured.classify_tokens(
        context.service, texts, caller, context.limits, aggregation_strategy=strategy, truncate=context.truncate()
    )
    ignored = frozenset(options.ignore_labels or ())

    def wanted(entities: Sequence[Any]) -> Sequence[Any]:
        return [item for item in entities if item.get("entity", item.get("entity_group")) not in ignored]

    if isinstance(request.inputs, str):
        answer = encode_rows(wanted(result.values[0]), _ENTITY_VALUES)
    else:
        most = max(map(len, result.values))
        answer = encode_rows(Mapped(wanted, result.values), _ENTITY_VALUES * most)
    return Response(answer, (JSON_HEADER, server_timing(result)))


async def root_answer(context: Context, request: RootAnswerRequest, caller: Caller) -> Response:
    """The best answer, or a list of them where `top_k` asks for several."""
    options = request.parameters or AnswerParameters()
    top_k = options.top_k or 1
    result = await structured.answer(
        context.service,
        [(request.inputs.question, request.inputs.context)],
        caller,
        context.limits,
        AnswerOptions(
            top_k,
            options.max_answer_len or 15,
            options.handle_impossible_answer is True,
            options.align_to_words is not False,
        ),
        max_seq_len=options.max_seq_len,
        doc_stride=options.doc_stride,
    )
    (found,) = result.values
    if top_k == 1:
        found = found[0] if found else {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    return Response(encode(found), (JSON_HEADER, server_timing(result)))


def _rows(
    task: str, handler: Handler, request: type, example: dict[str, Any], answer: Any, **fields: Any
) -> tuple[Route, ...]:
    return tuple(
        row(
            path,
            task,
            summary=f"What {task} is for, as TEI and pipelines of transformers answer it",
            handler=handler,
            request=request,
            example=example,
            answer=answer,
            answered="What the task answers.",
            **fields,
        )
        for path in ("/", "/invocations")
    )


ROUTES = (
    *_rows(
        "feature-extraction",
        root_embed,
        RootEmbedRequest,
        {"inputs": "A server answers."},
        list[list[float] | float],
        limits=Limits.of_texts_or_ids,
        values=lambda manifest, request: request.dimensions or manifest.width,
        value_bytes=12,
    ),
    *_rows(
        "text-classification",
        root_classify,
        RootClassifyRequest,
        {"inputs": "What a day!"},
        list[msgspec.Raw],
        limits=Limits.of_texts,
        values=lambda manifest, request: 2 * len(manifest.labels or ()),
        value_bytes=128,
    ),
    *_rows(
        "fill-mask",
        root_fill_mask,
        RootFillMaskRequest,
        {"inputs": "Paris is the {mask} of France.", "parameters": {"top_k": 3}},
        FILLINGS,
        limits=Limits.of_masked_texts,
        values=filling_values,
        value_bytes=16,
    ),
    *_rows(
        "sparse-embedding",
        embed_sparse,
        TeiVectorsRequest,
        {"inputs": "A server answers."},
        TeiSparseResponse,
        limits=Limits.of_texts,
        values=sparse_values,
        value_bytes=8,
    ),
    *_rows(
        "token-embedding",
        embed_all,
        TeiVectorsRequest,
        {"inputs": "A server answers."},
        TeiEmbedAllResponse,
        limits=Limits.of_texts,
        values=vector_values,
    ),
    *_rows(
        "token-classification",
        root_token_classify,
        RootTokenClassifyRequest,
        {"inputs": "Ada Lovelace lived in London."},
        list[msgspec.Raw],
        limits=Limits.of_texts,
        values=lambda manifest, request: _ENTITY_VALUES,
        value_bytes=64,
    ),
    *_rows(
        "question-answering",
        root_answer,
        RootAnswerRequest,
        {"inputs": {"question": "Where did she live?", "context": "Ada Lovelace lived in London."}},
        msgspec.Raw,
        limits=Limits.of_texts,
        values=lambda manifest, request: 4 * ((request.parameters and request.parameters.top_k) or 1),
        value_bytes=96,
    ),
)
