"""The server's own routes whose answers point into texts: entities, and answers to questions."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from ...tasks.answers import AnswerOptions
from ..limits.bounds import MAX_TOP_K
from ..service import structured
from .native import predictions, row
from .route import Caller, Context, Limits, Response, Result
from .schemas import BOUND, Inputs, Truncate, Usage, bound, texts_of

__all__ = ["ROUTES"]


_MAX_ANSWER_LEN = 512
_SomeText = Annotated[str, bound("some text")]


class TokenClassifyRequest(Struct, forbid_unknown_fields=True):
    """Texts in which to find entities."""

    inputs: Inputs
    aggregation_strategy: Annotated[
        Literal["none", "simple", "first", "average", "max"],
        Meta(
            description="How tokens become entities, as in transformers' pipeline. none: each token is one. simple: "
            "neighbours with one label are one. The others make words of tokens before, with the label of the first "
            "token, of the mean of their probabilities, or of the surest one."
        ),
    ] = "simple"
    truncate: Truncate = None


class Entity(Struct):
    """A part of a text with a label.

    Attributes:
        entity_group: Kind of the entity, without `B-` or `I-`; not where each token is one.
        entity: Label of the token, where each is one.
        score: Its probability, the mean over the entity's parts.
        index: Place of the token, where each is one.
        word: How its tokens read; the text itself is from start to end.
        start: Where it begins in the text, in code points.
        end: Where it ends.
    """

    score: float
    word: str
    start: int
    end: int
    entity_group: str | UnsetType = UNSET
    entity: str | UnsetType = UNSET
    index: int | UnsetType = UNSET


class TokenClassifyResponse(Struct):
    """Per text its entities, in the order of the text; label `O` is none."""

    predictions: list[list[Entity]]
    model: str
    usage: Usage


class Question(Struct, forbid_unknown_fields=True):
    """A question, and the text in which to look for an answer."""

    question: _SomeText
    context: _SomeText


class AnswerRequest(Struct, forbid_unknown_fields=True):
    """Questions about texts; the options are those of transformers' pipeline."""

    inputs: Annotated[
        Question | Annotated[list[Question], bound("texts")],
        Meta(description="One question with its context, or a list of at least one."),
    ]
    top_k: Annotated[int, Meta(ge=1, le=MAX_TOP_K, description="Answers to each question, at most.")] = 1
    max_answer_len: Annotated[int, Meta(ge=1, le=_MAX_ANSWER_LEN, description="Longest answer, in tokens.")] = 15
    max_seq_len: Annotated[
        Annotated[int, Meta(ge=3, extra_json_schema={BOUND: "window"})] | None,
        Meta(description="Tokens read at a time, the question included; null: 384, or what the model takes."),
    ] = None
    doc_stride: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="Tokens that two parts of a long context have in common; null: 128, or half of a part."),
    ] = None
    handle_impossible_answer: Annotated[
        bool, Meta(description="Whether the empty answer is one: that the context has none.")
    ] = False
    align_to_words: Annotated[bool, Meta(description="Whether answers begin and end with whole words.")] = True


class Answer(Struct):
    """A part of a context.

    Attributes:
        score: Its probability.
        start: Where it begins in the context, in code points.
        end: Where it ends.
        answer: The part.
    """

    score: float
    start: int
    end: int
    answer: str


class AnswerResponse(Struct):
    """Per question its answers, best first."""

    predictions: list[list[Answer]]
    model: str
    usage: Usage


async def token_classify(context: Context, request: TokenClassifyRequest, caller: Caller) -> Response:
    """POST /api/token-classify."""
    result = await structured.classify_tokens(
        context.service,
        texts_of(request.inputs),
        caller,
        context.limits,
        aggregation_strategy=request.aggregation_strategy,
        truncate=context.truncate(request.truncate),
    )
    return _predictions(context, result)


async def answer(context: Context, request: AnswerRequest, caller: Caller) -> Response:
    """POST /api/answer."""
    inputs = [request.inputs] if isinstance(request.inputs, Question) else request.inputs
    options = AnswerOptions(
        request.top_k, request.max_answer_len, request.handle_impossible_answer, request.align_to_words
    )
    result = await structured.answer(
        context.service,
        [(one.question, one.context) for one in inputs],
        caller,
        context.limits,
        options,
        max_seq_len=request.max_seq_len,
        doc_stride=request.doc_stride,
    )
    return _predictions(context, result)


def _predictions(context: Context, result: Result) -> Response:
    return predictions(context, result, _ENTITY_VALUES * max(map(len, result.values), default=0))


_ENTITY_VALUES = 5
"""Numbers and texts of an entity or an answer."""

ROUTES = (
    row(
        "/api/token-classify",
        "token-classification",
        summary="Find entities in texts",
        handler=token_classify,
        request=TokenClassifyRequest,
        example={"inputs": "Ada Lovelace lived in London."},
        answer=TokenClassifyResponse,
        limits=Limits.of_texts,
        values=lambda manifest, request: _ENTITY_VALUES,  # Of each token, at worst.
        value_bytes=64,  # A fifth of a dict.
    ),
    row(
        "/api/answer",
        "question-answering",
        summary="Answer questions about texts",
        handler=answer,
        request=AnswerRequest,
        example={"inputs": {"question": "Where did she live?", "context": "Ada Lovelace lived in London."}},
        answer=AnswerResponse,
        limits=Limits.of_texts,
        values=lambda manifest, request: 4 * request.top_k,
        value_bytes=96,  # A quarter of a dict and its text.
    ),
)
