"""The Open Inference Protocol v2, as KServe and Triton speak it, with binary tensors."""

from __future__ import annotations

import dataclasses
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from msgspec import Struct

from ...bundle import Manifest
from ...tasks.answers import AnswerOptions
from ...tasks.entities import STRATEGIES
from ...tasks.rows import Mapped
from ..http.bodies import INLINE_VALUES
from ..service import Result, structured
from .oip_tensors import (
    HEADER_LENGTH,
    InferInput,
    InferOutput,
    Parameters,
    Tensor,
    input_names,
    marks_of,
    read_texts,
    split_body,
    write_outputs,
)
from .route import (
    JSON_HEADER,
    ApiError,
    Binary,
    Caller,
    Context,
    Dialect,
    Limits,
    Response,
    Route,
    encode,
    error_text,
    server_timing,
)
from .schemas import bound

__all__ = ["OIP", "ROUTES"]

_ITEM_VALUES = 5
"""Numbers and texts of an entity, an answer, or a weight of a word, at most."""

_VERSION = "1"
_LONGEST_US = 10**15
"""Who waits for longer waits for ever."""


class InferRequest(Struct):
    """Tensors to run; fields that are not listed are ignored. Binary tensors follow the JSON."""

    inputs: Annotated[list[InferInput], bound("tensors")]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[InferOutput] | None = None


class InferResponse(Struct):
    """Tensors that were computed."""

    model_name: str
    model_version: str
    outputs: list[dict[str, Any]]
    id: str | None = None


class OipError(Struct):
    """Every error of the protocol."""

    error: str


OIP = Dialect(
    "oip",
    "/v2",
    lambda error: encode({"error": error_text(error)}),
    OipError,
    {"invalid_request": 400, "no_inputs": 400},
)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Parameters of a request, each of its kind or absent."""

    values: Mapping[str, Any]

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(name, default)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ApiError("invalid_request", f"parameters.{name}: expected {kind.__name__}, got {str(value)[:40]}")
        return value

    def truncate(self, context: Context) -> bool:
        """Whether to cut texts that are longer than the model takes."""
        return context.truncate(self.get("truncate", bool))


async def _embed(
    context: Context, texts: list[str], pairs: list[str] | None, options: _Options, caller: Caller
) -> tuple[Result, list[Tensor]]:
    if pairs is not None:
        raise ApiError("invalid_request", "text_pair: expected none, this model embeds texts")
    result = await context.service.embed(
        texts,
        caller,
        context.limits,
        normalize=options.get("normalize", bool),
        truncate=options.truncate(context),
        prompt_name=options.get("prompt_name", str),
        dimensions=options.get("dimensions", int),
    )
    rows = result.values
    return result, [Tensor("embedding", "FP32", (len(rows), len(rows[0])), rows)]


async def _classify(
    context: Context, texts: list[str], pairs: list[str] | None, options: _Options, caller: Caller
) -> tuple[Result, list[Tensor]]:
    inputs: Sequence[Any] = texts
    if pairs is not None:
        if len(pairs) != len(texts):
            raise ApiError("invalid_request", f"text_pair: expected {len(texts)} texts as in text, got {len(pairs)}")
        inputs = list(zip(texts, pairs, strict=True))
    result = await context.service.classify(
        inputs,
        caller,
        context.limits,
        raw_scores=options.get("raw_scores", bool, False),
        truncate=options.truncate(context),
    )
    labels = list(context.service.manifest.labels or ())

    def scores_of(answer: Sequence[Any]) -> Any:
        scores = {item["label"]: item["score"] for item in answer}
        return array("f", [scores[label] for label in labels])

    rows = Mapped(scores_of, result.values)
    shape = (len(rows), len(labels))
    return result, [Tensor("scores", "FP32", shape, rows), Tensor("labels", "BYTES", shape, [labels] * len(rows))]


async def _fill(
    context: Context, texts: list[str], pairs: list[str] | None, options: _Options, caller: Caller
) -> tuple[Result, list[Tensor]]:
    top_k = options.get("top_k", int, 5)
    if pairs is not None or not 1 <= top_k <= 100:
        raise ApiError("invalid_request", "expected texts without text_pair, and parameters.top_k from 1 to 100")
    result = await context.service.fill(texts, caller, context.limits, top_k=top_k, truncate=options.truncate(context))
    for index, masks in enumerate(result.values):
        if len(masks) != 1:
            raise ApiError("invalid_request", f"input {index}: expected 1 mask in each text, got {len(masks)}")
    found = [masks[0] for masks in result.values]
    shape = (len(found), len(found[0]))
    scores = Mapped(lambda tokens: array("f", [item["score"] for item in tokens]), found)
    words = Mapped(lambda tokens: [item["token"] for item in tokens], found)
    return result, [Tensor("scores", "FP32", shape, scores), Tensor("tokens", "BYTES", shape, words)]


def _written(result: Result) -> tuple[Result, list[Tensor]]:
    """Answers that are no tensors, as JSON."""
    rows = Mapped(lambda answer: [encode(answer).decode()], result.values)
    values = _ITEM_VALUES * sum(map(len, result.values))
    return result, [Tensor("answers", "BYTES", (len(rows), 1), rows, values)]


async def _classify_tokens(
    context: Context, texts: list[str], pairs: list[str] | None, options: _Options, caller: Caller
) -> tuple[Result, list[Tensor]]:
    strategy = options.get("aggregation_strategy", str, "simple")
    if pairs is not None or strategy not in STRATEGIES:
        raise ApiError(
            "invalid_request",
            f"expected texts without text_pair, and parameters.aggregation_strategy of {', '.join(STRATEGIES)}",
        )
    return _written(
        await structured.classify_tokens(
            context.service,
            texts,
            caller,
            context.limits,
            aggregation_strategy=strategy,
            truncate=options.truncate(context),
        )
    )


async def _answer(
    context: Context, texts: list[str], pairs: list[str] | None, options: _Options, caller: Caller
) -> tuple[Result, list[Tensor]]:
    top_k = options.get("top_k", int, 1)
    if pairs is None or len(pairs) != len(texts) or not 1 <= top_k <= 100:
        raise ApiError(
            "invalid_request",
            "expected questions as text, as many contexts as text_pair, and parameters.top_k from 1 to 100",
        )
    questions = list(zip(texts, pairs, strict=True))
    return _written(await structured.answer(context.service, questions, caller, context.limits, AnswerOptions(top_k)))


async def _embed_sparse(
    context: Context, texts: list[str], pairs: list[str] | None, options: _Options, caller: Caller
) -> tuple[Result, list[Tensor]]:
    if pairs is not None:
        raise ApiError("invalid_request", "text_pair: expected none, this model embeds texts")
    return _written(
        await structured.embed_sparse(
            context.service,
            texts,
            caller,
            context.limits,
            truncate=options.truncate(context),
            prompt_name=options.get("prompt_name", str),
        )
    )


_Run = Callable[..., Any]
_TASKS: dict[str, tuple[_Run, tuple[tuple[str, str], ...], Callable[[Manifest], int], Callable[[Manifest], int]]] = {
    "feature-extraction": (
        _embed,
        (("embedding", "FP32"),),
        lambda manifest: manifest.width,
        lambda manifest: manifest.width,
    ),
    "text-classification": (
        _classify,
        (("scores", "FP32"), ("labels", "BYTES")),
        lambda manifest: len(manifest.labels or ()),
        lambda manifest: 2 * len(manifest.labels or ()),
    ),
    "fill-mask": (_fill, (("scores", "FP32"), ("tokens", "BYTES")), lambda manifest: -1, lambda manifest: 300),
    "token-classification": (_classify_tokens, (("answers", "BYTES"),), lambda manifest: 1, lambda manifest: 5),
    "question-answering": (_answer, (("answers", "BYTES"),), lambda manifest: 1, lambda manifest: 400),
    "sparse-embedding": (_embed_sparse, (("answers", "BYTES"),), lambda manifest: 1, lambda manifest: 2048),
}
"""By task: what runs it, its outputs, how wide they are, and how many numbers an answer to one input has."""


async def infer(context: Context, request: Binary, caller: Caller) -> Response:
    """POST /v2/models/{model}/infer."""
    service, body = context.service, request.request
    names = [name for name, _ in _TASKS[service.manifest.task][1]]
    wanted = [(output.name, output.parameters or {}) for output in body.outputs or ()]
    for name, _ in wanted:
        if name not in names:
            raise ApiError("invalid_request", f"outputs: expected some of {', '.join(names)}, got {name[:40]!r}")
    options = _Options(body.parameters or {})
    if (timeout_us := options.get("timeout", int)) is not None and timeout_us > 0:
        deadline_s = time.perf_counter() + 1e-6 * min(timeout_us, _LONGEST_US)
        caller.deadline_s = deadline_s if caller.deadline_s is None else min(deadline_s, caller.deadline_s)
    inputs = read_texts(body.inputs, request.tail, context.limits.inputs)
    if unknown := sorted(set(inputs) - {"text", "text_pair"}):
        raise ApiError("invalid_request", f"inputs: expected text and perhaps text_pair, got {unknown[0][:40]!r}")
    if "text" not in inputs:
        raise ApiError("invalid_request", "inputs: expected text, a BYTES tensor, got none")
    run = _TASKS[service.manifest.task][0]
    result, tensors = await run(context, inputs["text"], inputs.get("text_pair"), options, caller)
    by_name = {tensor.name: tensor for tensor in tensors}
    in_binary = options.get("binary_data_output", bool, False)
    if wanted:
        tensors = [by_name[name] for name, _ in wanted]
        binary = [_Options(values).get("binary_data", bool, in_binary) for _, values in wanted]
    else:
        binary = [in_binary] * len(tensors)
    head = {"model_name": service.model, "model_version": _VERSION}
    if body.id is not None:
        head["id"] = body.id
    if sum(tensor.values for tensor in tensors) <= INLINE_VALUES:
        data, length = write_outputs(head, tensors, binary)
    else:
        data, length = await service.aside(write_outputs, head, tensors, binary)
    if length is None:
        return Response(data, (JSON_HEADER, server_timing(result)))
    return Response(
        data,
        (
            (b"content-type", b"application/octet-stream"),
            (HEADER_LENGTH, b"%d" % length),
            server_timing(result),
        ),
    )


async def server_metadata(context: Context, request: None, caller: Caller) -> Response:
    """GET /v2."""
    version = context.service.manifest.created_with.get("torch_ext", "0")
    return Response(encode({"name": "torch-ext", "version": version, "extensions": ["binary_tensor_data"]}))


async def model_metadata(context: Context, request: None, caller: Caller) -> Response:
    """GET /v2/models/{model}."""
    manifest = context.service.manifest
    inputs = input_names(manifest.task)
    outputs: list[dict[str, Any]] = []
    if manifest.task in _TASKS:
        _, names, width, _ = _TASKS[manifest.task]
        outputs = [{"name": name, "datatype": kind, "shape": [-1, width(manifest)]} for name, kind in names]
    body = {
        "name": context.service.model,
        "versions": [_VERSION],
        "platform": "torch_ext",
        "inputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in inputs],
        "outputs": outputs,
    }
    return Response(encode(body))


async def live(context: Context, request: None, caller: Caller) -> Response:
    """GET /v2/health/live."""
    return Response(b'{"live":true}')


async def ready(context: Context, request: None, caller: Caller) -> Response:
    """GET /v2/health/ready."""
    for service in context.services:
        service.check_ready()
    return Response(b'{"ready":true}')


async def model_ready(context: Context, request: None, caller: Caller) -> Response:
    """GET /v2/models/{model}/ready."""
    context.service.check_ready()
    return Response(encode({"name": context.service.model, "ready": True}))


def _get(path: str, summary: str, handler: Any, **fields: Any) -> Route:
    return Route(
        method="GET",
        path=path,
        summary=summary,
        handler=handler,
        dialect=OIP,
        answered=summary,
        tag="OIP",
        **fields,
    )


def _example(task: str) -> dict[str, Any]:
    texts = {"text": "of {mask}"}
    if task == "question-answering":
        texts["text_pair"] = "A quota of CPU time."
    return {
        "inputs": [{"name": name, "shape": [1], "datatype": "BYTES", "data": [text]} for name, text in texts.items()]
    }


def _models(version: str) -> tuple[Route, ...]:
    path = f"/v2/models/{{model}}{version}"
    return (
        _get(path, "Inputs and outputs of the model", model_metadata, secured=True),
        _get(f"{path}/ready", "Whether the model is ready", model_ready, errors=("loading", "draining")),
        *(
            Route(
                method="POST",
                path=f"{path}/infer",
                summary="Run tensors, in JSON or in binary",
                handler=infer,
                dialect=OIP,
                task=task,
                request=InferRequest,
                example=_example(task),
                answer=InferResponse,
                limits=Limits.of_masked_texts if task == "fill-mask" else Limits.of_texts,
                values=lambda manifest, request: _TASKS[manifest.task][3](manifest),
                value_bytes=18,  # 4, and what is written of it.
                secured=True,
                marks=marks_of(task, [name for name, _ in _TASKS[task][1]]),
                split=split_body,
                tag="OIP",
            )
            for task in _TASKS
        ),
    )


ROUTES = (
    _get("/v2", "The server", server_metadata),
    _get("/v2/health/live", "Whether the process lives", live),
    _get("/v2/health/ready", "Whether requests are welcome", ready, errors=("loading", "draining")),
    *_models(""),
    *_models(f"/versions/{_VERSION}"),
)
