"""Bodies of text-embeddings-inference (TEI), as its OpenAPI document has them; fields that are not here are ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from .rerank import RerankDocument
from .route import ApiError
from .schemas import BOUND, LabelScore, bound

__all__ = [
    "RerankRequest",
    "TeiDecodeRequest",
    "TeiDecodeResponse",
    "TeiEmbedRequest",
    "TeiEmbedResponse",
    "TeiError",
    "TeiPredictRequest",
    "TeiPredictResponse",
    "TeiRerankResponse",
    "TeiSimilarityRequest",
    "TeiSimilarityResponse",
    "TeiTokenizeRequest",
    "TeiTokenizeResponse",
    "cut_left",
    "predict_inputs",
    "texts_or_ids",
]

_Text = Annotated[str, bound("text")]
_Texts = Annotated[list[_Text], bound("texts")]
Direction = Annotated[
    Literal["Left", "Right", "left", "right"], Meta(description="Which end of a text that is too long is cut off.")
]
Cut = Annotated[bool | None, Meta(description="Cut texts that are too long; null: what `auto_truncate` of /info says.")]
Prompt = Annotated[
    str | None,
    Meta(
        description="Name of a prompt of the model to put before each text; null: its default prompt.",
        extra_json_schema={BOUND: "prompt"},
    ),
]
Count = Annotated[int, Meta(ge=0)]


def cut_left(direction: str) -> bool | None:
    """The side that a request wants cut; None: that of the model, where it says nothing else than the default."""
    return True if direction in ("Left", "left") else None


class TeiEmbedRequest(Struct):
    """Texts to embed."""

    inputs: Annotated[
        str | list[str | int | list[int]],
        Meta(
            description="A text or a list of texts; token ids only where --accept-token-ids allows them.",
            examples=["A server answers.", ["One text.", "Another one."]],
            extra_json_schema={BOUND: "texts or ids"},
        ),
    ]
    normalize: Annotated[bool | None, Meta(description="Divide embeddings by their L2 norm.")] = True
    truncate: Cut = None
    truncation_direction: Direction = "Right"
    prompt_name: Prompt = None
    dimensions: Annotated[
        int | None, Meta(description="Keep so many leading numbers.", extra_json_schema={BOUND: "dimensions"})
    ] = None


class TeiPredictRequest(Struct):
    """Texts or pairs of texts to classify."""

    inputs: Annotated[
        str | list[str | list[str]],
        Meta(
            description="A text; a list of two texts is one pair; a list of lists of one or two texts is a batch.",
            examples=["One text.", ["A text", "and its pair."], [["One text."], ["A text", "and its pair."]]],
            extra_json_schema={BOUND: "predict"},
        ),
    ]
    raw_scores: Annotated[bool, Meta(description="Answer logits.")] = False
    truncate: Cut = None
    truncation_direction: Direction = "Right"


class SimilarityInput(Struct):
    """A text and those that it is compared with."""

    source_sentence: _Text
    sentences: _Texts


class SimilarityParameters(Struct):
    """How the texts are read."""

    truncate: Cut = None
    truncation_direction: Direction = "Right"
    prompt_name: Prompt = None


class TeiSimilarityRequest(Struct):
    """A text to compare with others."""

    inputs: SimilarityInput
    parameters: SimilarityParameters | None = None


class TeiTokenizeRequest(Struct):
    """Texts to tokenize."""

    inputs: Annotated[_Text | _Texts, Meta(description="A text, or a list of texts.")]
    add_special_tokens: bool = True
    prompt_name: Prompt = None


class TeiDecodeRequest(Struct):
    """Token ids to write as text."""

    ids: Annotated[
        list[int | list[int]],
        Meta(description="Token ids, or a list of lists of them.", extra_json_schema={BOUND: "ids"}),
    ]
    skip_special_tokens: bool = True


class RerankRequest(Struct):
    """A query, and what is ranked by it: `texts` of TEI, or `documents` of Cohere, Jina and vLLM."""

    EITHER: ClassVar = (("texts",), ("documents",))

    query: _Text
    texts: _Texts | UnsetType = UNSET
    raw_scores: Annotated[bool, Meta(description="Answer logits.")] = False
    return_text: bool = False
    truncate: Cut = None
    truncation_direction: Direction = "Right"
    documents: Annotated[list[_Text | RerankDocument], bound("texts")] | UnsetType = UNSET
    model: str | None = None
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None


class Rank(Struct):
    """A text, by its place in the request, and its score."""

    index: Count
    score: float
    text: str | UnsetType = UNSET


class SimpleToken(Struct):
    """A token, and where it is in its text, in characters; special tokens are nowhere."""

    id: Count
    text: str
    special: bool
    start: Count | None
    stop: Count | None


TeiEmbedResponse = list[list[float]]
TeiPredictResponse = list[LabelScore | list[LabelScore]]
TeiRerankResponse = list[Rank]
TeiSimilarityResponse = list[float]
TeiTokenizeResponse = list[list[SimpleToken]]
TeiDecodeResponse = list[str]


class TeiError(Struct):
    """Every error, in the words of TEI."""

    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]


def texts_or_ids(given: str | Sequence[str | int | list[int]], allowed: bool) -> tuple[list[str], list[list[int]]]:
    """Texts, or token ids, as a request has them; the other list is empty.

    Args:
        given: A text, texts, the token ids of a text, or lists of those of several.
        allowed: Whether the operator takes token ids.

    Raises:
        ApiError: There is nothing, or both, or token ids that are not taken.
    """
    if isinstance(given, str):
        return [given], []
    kinds = set(map(type, given))
    if kinds == {str}:
        return given, []  # type: ignore[return-value]
    if not kinds:
        raise ApiError("no_inputs", "expected at least one input, got an empty list")
    if len(kinds) > 1:
        raise ApiError("invalid_request", "expected only texts, only token ids, or only lists of token ids")
    if not allowed:
        raise ApiError(
            "invalid_request",
            "expected texts, got token ids, which are those of the client's tokenizer and seldom this model's; send "
            "texts (langchain's OpenAIEmbeddings: check_embedding_ctx_length=False), or start the server with "
            "--accept-token-ids",
        )
    return [], [given] if kinds == {int} else given  # type: ignore[list-item, return-value]


def predict_inputs(given: str | Sequence[str | list[str]]) -> tuple[list[str | tuple[str, str]], bool]:
    """Texts and pairs of texts of a request, and whether it is a batch.

    Raises:
        ApiError: There is nothing, or something that is neither a text nor a pair.
    """
    if isinstance(given, str):
        return [given], False
    if not given:
        raise ApiError("no_inputs", "expected a text, a pair of texts or a batch of both, got an empty list")
    batch = isinstance(given[0], list)
    found: list[str | tuple[str, str]] = []
    for item in given if batch else [given]:
        if not isinstance(item, list) or not 1 <= len(item) <= 2 or not all(isinstance(text, str) for text in item):
            raise ApiError(
                "invalid_request",
                'inputs: expected a text, a pair ["a", "b"], or a batch [["a"], ["b", "c"]] of texts and pairs',
            )
        found.append(item[0] if len(item) == 1 else (item[0], item[1]))
    return found, batch
