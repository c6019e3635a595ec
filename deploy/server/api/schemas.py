"""Requests and answers of the API as types: they validate what comes, and describe both in the OpenAPI document.

msgspec decodes and checks a request in one pass (under 1 us for one text). Answers are written by orjson, and rows of
fp32 by `torch_ext.runtime.json_row`; their types here serve the description and the tests.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from ..limits.bounds import MAX_TOP_K

__all__ = [
    "BOUND",
    "EmbedRequest",
    "EmbedResponse",
    "ErrorResponse",
    "FillMaskRequest",
    "FillMaskResponse",
    "InfoResponse",
    "ModelResponse",
    "PredictRequest",
    "PredictResponse",
    "SimilarityRequest",
    "SimilarityResponse",
    "StatusResponse",
    "bound",
    "texts_of",
]
BOUND = "x-bound"
"""Marks a part of a type for `openapi`, which writes there what the server takes, its limits included. Where one of
several sets of fields is needed, the type's `EITHER` lists them."""


def bound(name: str) -> Meta:
    """Metadata of a part of a type whose bounds are the server's; see `openapi`."""
    return Meta(extra_json_schema={BOUND: name})


_Text = Annotated[str, bound("text")]
_Masked = Annotated[str, bound("masked")]
_INPUTS = Meta(
    description="One text, or a list of at least one. Text may be empty; it may not hold NUL or lone surrogates.",
    examples=["A server answers.", ["One text.", "Another one."]],
)
Inputs = Annotated[_Text | Annotated[list[_Text], bound("texts")], _INPUTS]
MaskedInputs = Annotated[_Masked | Annotated[list[_Masked], bound("texts")], _INPUTS]
Truncate = Annotated[
    bool | None,
    Meta(
        description="Cut texts that are longer than the model takes; false: such a text is an error (422); null: what "
        "`auto_truncate` of /info says."
    ),
]


def texts_of(inputs: str | list[str]) -> list[str]:
    """The texts of `Inputs` or `MaskedInputs`."""
    return [inputs] if isinstance(inputs, str) else inputs


class EmbedRequest(Struct, forbid_unknown_fields=True):
    """Texts to embed."""

    inputs: Inputs
    normalize: Annotated[
        bool | None, Meta(description="Divide embeddings by their L2 norm; null: as the model was trained.")
    ] = None
    truncate: Truncate = None


class PredictRequest(Struct, forbid_unknown_fields=True):
    """Texts to classify."""

    inputs: Inputs
    truncate: Truncate = None


class SimilarityRequest(Struct, forbid_unknown_fields=True):
    """A text to compare with others."""

    source: _Text
    texts: Annotated[list[_Text], bound("texts")]
    truncate: Truncate = None


class FillMaskRequest(Struct, forbid_unknown_fields=True):
    """Texts with at least one mask token each."""

    inputs: MaskedInputs
    top_k: Annotated[int, Meta(ge=1, le=MAX_TOP_K, description="Predictions per mask token.")] = 5
    truncate: Truncate = None


class Usage(Struct):
    """What a request cost.

    Attributes:
        tokens: Tokens that were run, special tokens included.
    """

    tokens: int


class EmbedResponse(Struct):
    """One embedding per text, in order."""

    embeddings: list[list[float]]
    model: str
    usage: Usage


class SimilarityResponse(Struct):
    """Per text the cosine of its embedding and that of the source, from -1 to 1."""

    similarities: list[float]
    model: str
    usage: Usage


class LabelScore(Struct):
    """A class and its probability; for a regression model, and a cross-encoder without an activation, its raw logit."""

    label: str
    score: float


class PredictResponse(Struct):
    """Per text every class, best first."""

    predictions: list[list[LabelScore]]
    model: str
    usage: Usage


class TokenScore(Struct):
    """A token that may stand at the mask."""

    token: str
    token_id: int
    score: float


class FillMaskResponse(Struct):
    """Per text, per mask token: the best tokens, best first."""

    predictions: list[list[list[TokenScore]]]
    model: str
    usage: Usage


class StatusResponse(Struct):
    """State of the server."""

    status: str


class MeasuredVariant(Struct):
    """A variant that could be served here.

    Attributes:
        texts_per_s: Measured on this machine, tokenisation not included; null if it was not measured.
        mean: Accuracy against transformers in fp32 by the bundle's metric, measured by the export; null for one that
            was not exported.
        min: That of the worst text.
    """

    variant: str
    texts_per_s: float | None
    mean: float | None
    min: float | None


class InfoLimits(Struct):
    """What a request may cost."""

    max_tokens: int
    max_batch_tokens: int
    max_queue_tokens: int
    max_inputs: int
    max_chars: int
    max_body_bytes: int
    max_values: int
    max_memory_mb: int


class InfoResponse(Struct):
    """What is served, how, and why.

    Fields up to `version` are those of text-embeddings-inference.

    Attributes:
        model_id: Name of the model in its bundle.
        model_sha: Its commit on the hub, or null.
        model_dtype: `bfloat16`, `float32` or `int8`.
        served_model_name: Name in answers.
        model_type: `{"embedding": {"pooling": ...}}`, `{"classifier": {"id2label", "label2id"}}`, `{"reranker": ...}`
            or `{"token-classification": ...}` with the same, or the name of another task: `{"fill-mask": {}}`.
        max_concurrent_requests: Most requests that may wait or run; without such an option, as many as tokens, which
            `limits.max_queue_tokens` counts.
        max_input_length: Longest text in tokens.
        max_batch_tokens: Token budget of a batch.
        max_batch_requests: Most texts of a batch; null: as the tokens allow.
        max_client_batch_size: Texts that clients should send in a request; one with more is split.
        auto_truncate: Whether longer texts are cut unless a request says otherwise.
        tokenization_workers: Threads that tokenize.
        version: Of torch_ext.
        task: Task of the bundle.
        variant: Which of its variants is served.
        isa: What runs it: kernels of torch_ext, or a version of ONNX Runtime.
        workers: Processes that serve together.
        threads: Threads of the engine, in each of them.
        limits: What a request may cost.
        versions: Of the packages that compute.
        chosen_by: `option` (`--variant`), `measurement` at this start, `cache` (one of an earlier start), `only` (no
            other variant can be served), `default` (nothing could be measured).
        candidates: Variants that could be served here, the fastest first.
        left_out: Variants that are not among them, and why.
        models: Names of the models of the server, this one's first; at `/models/{model}/info`, of that one alone.
    """

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[str, dict[str, str | dict[str, str | int]]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    task: str
    variant: str
    isa: str
    workers: int
    threads: int
    limits: InfoLimits
    versions: dict[str, str]
    chosen_by: Literal["option", "measurement", "cache", "only", "default"]
    candidates: list[MeasuredVariant]
    left_out: dict[str, str]
    models: list[str]


class ModelResponse(Struct):
    """What a page has to know to ask the model; no API key is needed.

    Attributes:
        model: Name of the model.
        task: Task of the bundle.
        variant: Which of its variants is served; null while it is being loaded.
        labels: How many labels a classifier has; one: it reranks.
        mask: The mask token, or null.
        secured: Whether an API key is asked for.
    """

    model: str
    task: str
    variant: str | None
    labels: int
    mask: str | None
    secured: bool


class ErrorDetail(Struct):
    """What went wrong.

    Attributes:
        type: Kind of error, the same for all errors of that kind.
        message: What was expected, what came, what to do.
    """

    type: str
    message: str


class ErrorResponse(Struct):
    """Every error of the server's own routes."""

    error: ErrorDetail
