"""The server's own routes whose answers point into texts: labels of tokens, entities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from .route import JSON_HEADER, Caller, Context, Limits, Response, Result, Route, encode_list, server_timing
from .schemas import Inputs, Truncate, Usage

__all__ = ["ROUTES"]


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
    truncate: Truncate = True


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


async def token_classify(context: Context, request: TokenClassifyRequest, caller: Caller) -> Response:
    """POST /api/token-classify."""
    result = await context.service.classify_tokens(
        [request.inputs] if isinstance(request.inputs, str) else request.inputs,
        caller,
        context.limits,
        aggregation_strategy=request.aggregation_strategy,
        truncate=request.truncate,
    )
    return _predictions(context, result, result.values)


def _predictions(context: Context, result: Result, values: Sequence[Any]) -> Response:
    body = {"predictions": result.values, "model": context.service.model, "usage": {"tokens": result.tokens}}
    most = max(map(len, values), default=0)
    return Response(encode_list(body, "predictions", _ENTITY_VALUES * most), (JSON_HEADER, server_timing(result)))


_ENTITY_VALUES = 5
"""Numbers and texts of an entity or an answer."""

ROUTES = (
    Route(
        method="POST",
        path="/api/token-classify",
        summary="Find entities in texts",
        handler=token_classify,
        task="token-classification",
        request=TokenClassifyRequest,
        example={"inputs": "Ada Lovelace lived in London."},
        answer=TokenClassifyResponse,
        limits=Limits.of_texts,
        values=lambda manifest, request: _ENTITY_VALUES,  # Of each token, at worst.
        value_bytes=64,  # A fifth of a dict.
        secured=True,
        tag="inference",
    ),
)
