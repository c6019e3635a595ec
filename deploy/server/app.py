"""The ASGI application: routes, limits, and the way of a request from its bytes to its answer.

Plain ASGI on uvicorn (httptools, uvloop), since the encoder costs about 1 ms of CPU per text and everything else
counts against it. User and system CPU of the server process per request, without a model, 32 keep-alive connections,
an answer of 384 floats (Xeon with AMX, 2 cores; `python benchmarks/serving.py --frameworks`):

| framework, all on uvicorn | CPU per request |
|---|---|
| plain ASGI (this) | 28 us |
| Starlette | 44 us |
| FastAPI, pydantic checks the request, orjson writes the answer | 119 us |
| FastAPI, the answer as a list of floats | 179 us |

Tried besides, in one run in which plain ASGI on uvicorn took 35 us: granian 46 us (its own interface, RSGI, 35 us), and
a protocol written by hand on uvloop and httptools 14 us, which is not worth a second HTTP server to maintain. All of
this server but the engine takes about 190 us per request of 53 tokens, half of it the tokenizer.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from ..bundle import Manifest
from . import metrics as prometheus
from .batching import Batcher, Work
from .choice import Choice
from .engines import EmbedOptions, FillMaskOptions
from .errors import ERRORS, ApiError, error_body
from .limits import INLINE_CHARS, MASKS_PER_TEXT, Settings
from .openapi import document
from .schemas import EmbedRequest, FillMaskRequest, OpenAIEmbeddingsRequest, PredictRequest
from .speed_cache import versions
from .tokens import TextTokenizer

__all__ = ["TASK_ENDPOINTS", "App", "Response"]

log = logging.getLogger("deploy.server")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
RequestType = TypeVar("RequestType")

TASK_ENDPOINTS: Mapping[str, str] = {
    "feature-extraction": "/embed",
    "text-classification": "/predict",
    "fill-mask": "/fill-mask",
}
"""Which endpoint serves a task; /v1/embeddings serves feature-extraction too."""

_JSON = (b"content-type", b"application/json")
_EMBED_OPTIONS = {value: EmbedOptions(value) for value in (False, True)}
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_TOKENIZE_BACKLOG_CHARS = 16 << 20
_DOCS = Path(__file__).with_name("docs.html")


class _Disconnected(Exception):  # noqa: N818 - nothing went wrong
    """The client has left: there is nobody to answer."""


@dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
        body: Complete body.
        headers: Headers without content-length.
        status: HTTP status.
    """

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = (_JSON,)
    status: int = 200


Handler = Callable[[Scope, Receive], Awaitable[Response]]


class App:
    """Serves one model.

    Attributes:
        draining: Set once on shutdown: /ready answers 503 and every answer closes its connection.
    """

    def __init__(self, manifest: Manifest, tokenizer: TextTokenizer, batcher: Batcher, settings: Settings) -> None:
        self.draining = False
        self._info: bytes | None = None
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._batcher = batcher
        self._settings = settings
        self._model = manifest.model.name
        self._normalize = manifest.pooling is not None and manifest.pooling.normalize
        mask = manifest.special_tokens["mask"]
        self._mask_id = -1 if mask is None else mask.id
        self._mask_token = "" if mask is None else mask.token
        self._api_key = None if settings.api_key is None else settings.api_key.encode()
        self._metrics = prometheus.Metrics()
        self._metrics.gauges(lambda: batcher.queued_tokens, lambda: self.ready)
        self._created_s = int(time.time())
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._tokenizing_chars = 0
        self._openapi = functools.cache(lambda variant: orjson.dumps(document(manifest, variant, settings)))
        self._variant: str | None = None
        self._routes: dict[str, dict[str, Handler]] = {
            "/embed": {"POST": self._embed},
            "/predict": {"POST": self._predict},
            "/fill-mask": {"POST": self._fill_mask},
            "/v1/embeddings": {"POST": self._openai_embeddings},
            "/v1/models": {"GET": self._openai_models},
            "/info": {"GET": self._show_info},
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
            "/metrics": {"GET": self._show_metrics},
            "/docs": {"GET": self._docs},
            "/openapi.json": {"GET": self._show_openapi},
        }
        self._decoders: dict[Any, Any] = {
            kind: msgspec.json.Decoder(kind)
            for kind in (EmbedRequest, PredictRequest, FillMaskRequest, OpenAIEmbeddingsRequest)
        }

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self._batcher.running and not self.draining

    def serves(self, choice: Choice, isa: str) -> None:
        """Told once, when the engine is loaded, what is served; on any thread.

        Args:
            choice: The variant, and why it was taken.
            isa: What runs it.
        """
        manifest, settings = self._manifest, self._settings
        labels = manifest.labels or ()
        model_type: dict[str, Any] = {"fill-mask": {}}
        if manifest.pooling is not None:
            model_type = {"embedding": {"pooling": manifest.pooling.mode}}
        elif labels:
            names = {str(index): label for index, label in enumerate(labels)}
            model_type = {"classifier": {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}}
        dtype = manifest.variants[choice.variant].dtype
        installed = versions()
        accuracies = {name: manifest.variants[name].accuracy for name in choice.texts_per_s or (choice.variant,)}
        info = {
            "model_id": self._model,
            "model_sha": manifest.model.revision,
            "model_dtype": _DTYPES.get(dtype, dtype),
            "served_model_name": self._model,
            "model_type": model_type,
            "max_concurrent_requests": settings.max_queue_tokens,
            "max_input_length": manifest.max_tokens,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_inputs,
            "auto_truncate": True,
            "tokenization_workers": 1,
            "version": installed["torch_ext"],
            "task": manifest.task,
            "variant": choice.variant,
            "isa": isa,
            "threads": settings.threads,
            "limits": {
                "max_tokens": manifest.max_tokens,
                "max_batch_tokens": settings.max_batch_tokens,
                "max_queue_tokens": settings.max_queue_tokens,
                "max_inputs": settings.max_inputs,
                "max_chars": settings.max_chars,
                "max_body_bytes": settings.max_body_bytes,
            },
            "versions": installed,
            "chosen_by": choice.by,
            "candidates": [
                {
                    "variant": name,
                    "texts_per_s": choice.texts_per_s.get(name),
                    "mean": accuracy.mean,
                    "min": accuracy.min,
                }
                for name, accuracy in accuracies.items()
            ],
            "left_out": dict(choice.left_out),
        }
        self._info = orjson.dumps(info)
        self._variant = choice.variant
        self._metrics.serves(self._model, choice.variant, manifest.task)

    def count_batch(self, texts: int, tokens: int) -> None:
        """Told of every batch."""
        self._metrics.batch(texts, tokens)

    def close(self) -> None:
        """Ends the helper thread."""
        self._helper.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        started_s = time.perf_counter()
        path: str = scope["path"]
        endpoint = "other"
        try:
            methods = self._routes.get(path)
            if methods is None:
                raise ApiError("not_found", f"no such path: {path[:200]}; GET /docs lists what there is")
            endpoint = path
            method: str = scope["method"]
            handler = methods.get("GET" if method == "HEAD" else method)
            if handler is None:
                allowed = ", ".join(methods)
                raise ApiError("method_not_allowed", f"{path}: expected {allowed}, got {method}", {"Allow": allowed})
            response = await handler(scope, receive)
        except ApiError as error:
            response = self._error(error, path)
        except _Disconnected:
            self._metrics.abandoned()
            return
        except Exception:
            log.exception("%s failed", path)
            response = self._error(ApiError("internal", "unexpected failure; the server's log says more"), path)
        headers = [*response.headers, (b"content-length", b"%d" % len(response.body))]
        if self.draining:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})
        self._metrics.answered(endpoint, response.status, time.perf_counter() - started_s)

    @staticmethod
    def _error(error: ApiError, path: str) -> Response:
        headers = [_JSON, *((name.lower().encode(), value.encode()) for name, value in error.headers.items())]
        if ERRORS[error.kind].retry and "Retry-After" not in error.headers:
            headers.append((b"retry-after", b"1"))
        return Response(error_body(error, openai=path.startswith("/v1/")), tuple(headers), error.status)

    # From bytes to a checked request.

    def _admit(self, scope: Scope, task: str) -> None:
        """Refuses, before the body is read, what will not be served anyway."""
        self._authorize(scope)
        if task != self._manifest.task:
            endpoint = TASK_ENDPOINTS[self._manifest.task]
            raise ApiError(
                "wrong_task",
                f"{scope['path']} needs a bundle for {task}, and {self._model} is for {self._manifest.task}: "
                f"POST to {endpoint}",
            )
        if not self._batcher.running:
            if self.draining:
                raise ApiError("draining", "the server is shutting down; send the request elsewhere")
            raise ApiError("loading", "the model is being loaded; wait until /ready answers 200")

    def _authorize(self, scope: Scope) -> None:
        if self._api_key is None:
            return
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, key = value.partition(b" ")
                if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._api_key):
                    return
        raise ApiError(
            "unauthorized", "expected the header Authorization: Bearer <API key>", {"WWW-Authenticate": "Bearer"}
        )

    async def _read(self, scope: Scope, receive: Receive, kind: type[RequestType]) -> RequestType:
        """Reads, decodes and checks a request body.

        The rest of a body that is too large is not kept: the server takes and drops it, so that the client, which reads
        only after it has written, gets the answer.
        """
        limit = self._settings.max_body_bytes
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > limit:
                raise self._body_too_large(f"{int(value)} bytes")
            if name == b"content-encoding" and value.lower() != b"identity":
                raise ApiError("unsupported_media_type", "content-encoding: expected none, send plain JSON in UTF-8")
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Disconnected
        body: bytes = message["body"]
        if message["more_body"]:
            parts = [body]
            size = len(body)
            while message["more_body"]:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Disconnected
                size += len(message["body"])
                if size > limit:
                    raise self._body_too_large("more")
                parts.append(message["body"])
            body = b"".join(parts)
        if len(body) > limit:
            raise self._body_too_large(f"{len(body)} bytes")
        try:
            request: RequestType = self._decoders[kind].decode(body)
        except msgspec.ValidationError as error:
            raise ApiError("invalid_request", str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            hint = ""
            if b"\\ud" in body or b"\\uD" in body:
                hint = "; escapes from \\ud800 to \\udfff have to come in pairs"
            raise ApiError("invalid_request", f"expected one JSON object in UTF-8: {error}{hint}") from None
        return request

    def _body_too_large(self, found: str) -> ApiError:
        return ApiError("too_large", f"body: expected at most {self._settings.max_body_bytes} bytes, got {found}")

    def _check_texts(self, texts: Sequence[str]) -> int:
        """Checks texts against the limits and returns how many characters they have."""
        if len(texts) > self._settings.max_inputs:
            raise ApiError(
                "too_large", f"expected at most {self._settings.max_inputs} inputs in one request, got {len(texts)}"
            )
        if not texts:
            raise ApiError("invalid_request", "expected at least one input, got an empty list")
        total = 0
        for index, text in enumerate(texts):
            size = len(text)
            if size > self._settings.max_chars:
                raise ApiError(
                    "too_large",
                    f"input {index}: expected at most {self._settings.max_chars} characters, got {size}; the model "
                    f"reads {self._tokenizer.max_tokens} tokens only",
                )
            if "\0" in text:
                raise ApiError("invalid_request", f"input {index}: expected text, got a NUL character")
            total += size
        return total

    # From a request to its results.

    async def _tokenize(self, scope: Scope, texts: Sequence[str], truncate: bool) -> list[NDArray[np.int64]]:
        """Token ids of texts, checked against the limits; long requests go to the helper thread."""
        chars = self._check_texts(texts)
        if chars <= INLINE_CHARS:
            return self._tokenizer.encode(texts, truncate)
        if self._tokenizing_chars and self._tokenizing_chars + chars > _TOKENIZE_BACKLOG_CHARS:
            raise self._batcher.queue_full()

        def encode() -> list[NDArray[np.int64]]:
            if scope.get("deploy.disconnected"):
                raise _Disconnected
            return self._tokenizer.encode(texts, truncate)

        self._tokenizing_chars += chars
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self._helper, encode)
        finally:
            self._tokenizing_chars -= chars
        if scope.get("deploy.disconnected"):
            raise _Disconnected
        return ids

    async def _run(
        self, scope: Scope, ids: Sequence[NDArray[np.int64]], options: Any, started_s: float
    ) -> tuple[list[Any], int, tuple[bytes, bytes]]:
        """Runs texts through the engine.

        Args:
            scope: Of the request.
            ids: Per text token ids.
            options: For the engine's head.
            started_s: When tokenisation began, by `time.perf_counter`.

        Returns:
            Per text its result, tokens in all, and the Server-Timing header.
        """
        work = Work(ids, options, asyncio.get_running_loop().create_future())
        self._batcher.submit(work)
        scope["deploy.on_disconnect"] = functools.partial(self._batcher.abandon, work)
        try:
            results = await work.future
        except asyncio.CancelledError:
            if scope.get("deploy.disconnected"):
                raise _Disconnected from None
            self._batcher.abandon(work)
            raise
        tokenize_s = work.submitted_s - started_s
        queue_s = work.started_s - work.submitted_s
        self._metrics.stages(tokenize_s, queue_s, work.infer_s)
        timing = b"tokenize;dur=%.3f,queue;dur=%.3f,infer;dur=%.3f" % (
            1e3 * tokenize_s,
            1e3 * queue_s,
            1e3 * work.infer_s,
        )
        return results, work.tokens, (b"server-timing", timing)

    async def _embed(self, scope: Scope, receive: Receive) -> Response:
        self._admit(scope, "feature-extraction")
        request = await self._read(scope, receive, EmbedRequest)
        started_s = time.perf_counter()
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        ids = await self._tokenize(scope, texts, request.truncate)
        normalize = self._normalize if request.normalize is None else request.normalize
        rows, tokens, timing = await self._run(scope, ids, _EMBED_OPTIONS[normalize], started_s)
        body = {"embeddings": rows, "model": self._model, "usage": {"tokens": tokens}}
        return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), (_JSON, timing))

    async def _predict(self, scope: Scope, receive: Receive) -> Response:
        self._admit(scope, "text-classification")
        request = await self._read(scope, receive, PredictRequest)
        started_s = time.perf_counter()
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        ids = await self._tokenize(scope, texts, request.truncate)
        return self._predictions(*await self._run(scope, ids, None, started_s))

    async def _fill_mask(self, scope: Scope, receive: Receive) -> Response:
        self._admit(scope, "fill-mask")
        request = await self._read(scope, receive, FillMaskRequest)
        started_s = time.perf_counter()
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        ids = await self._tokenize(scope, texts, request.truncate)
        for index, text in enumerate(ids):
            masks = int((text == self._mask_id).sum())
            if not 1 <= masks <= MASKS_PER_TEXT:
                raise ApiError(
                    "invalid_request",
                    f"input {index}: expected 1 to {MASKS_PER_TEXT} {self._mask_token} among the first "
                    f"{self._tokenizer.max_tokens} tokens, got {masks}",
                )
        return self._predictions(*await self._run(scope, ids, FillMaskOptions(request.top_k), started_s))

    def _predictions(self, results: list[Any], tokens: int, timing: tuple[bytes, bytes]) -> Response:
        body = {"predictions": results, "model": self._model, "usage": {"tokens": tokens}}
        return Response(orjson.dumps(body), (_JSON, timing))

    async def _openai_embeddings(self, scope: Scope, receive: Receive) -> Response:
        self._admit(scope, "feature-extraction")
        request = await self._read(scope, receive, OpenAIEmbeddingsRequest)
        started_s = time.perf_counter()
        width = self._manifest.hidden_size
        if request.dimensions not in (None, width):
            raise ApiError(
                "invalid_request", f"dimensions: expected {width}, the width of {self._model}, got {request.dimensions}"
            )
        given = [request.input] if isinstance(request.input, str) else request.input
        kinds = set(map(type, given))
        if kinds <= {str}:
            ids = await self._tokenize(scope, given, True)  # type: ignore[arg-type]
        elif kinds == {int} or kinds == {list}:
            lists: Sequence[Any] = [given] if kinds == {int} else given
            if len(lists) > self._settings.max_inputs:
                self._check_texts([""] * len(lists))
            ids = [self._tokenizer.check_ids(index, value) for index, value in enumerate(lists)]
        else:
            raise ApiError("invalid_request", "input: expected only texts, only token ids, or only lists of token ids")
        rows, tokens, timing = await self._run(scope, ids, _EMBED_OPTIONS[self._normalize], started_s)
        if request.encoding_format == "base64":
            rows = [base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode("ascii") for row in rows]
        body = {
            "object": "list",
            "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
            "model": self._model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), (_JSON, timing))

    # Everything that is not inference.

    async def _openai_models(self, scope: Scope, receive: Receive) -> Response:
        self._authorize(scope)
        model = {"id": self._model, "object": "model", "created": self._created_s, "owned_by": "torch-ext"}
        return Response(orjson.dumps({"object": "list", "data": [model]}))

    async def _show_info(self, scope: Scope, receive: Receive) -> Response:
        self._authorize(scope)
        if self._info is None:
            raise ApiError("loading", "the model is being loaded")
        return Response(self._info)

    async def _health(self, scope: Scope, receive: Receive) -> Response:
        return Response(b'{"status":"ok"}')

    async def _ready(self, scope: Scope, receive: Receive) -> Response:
        if self.ready:
            return Response(b'{"status":"ready"}')
        if self.draining:
            raise ApiError("draining", "the server is shutting down")
        raise ApiError("loading", "the model is being loaded")

    async def _show_metrics(self, scope: Scope, receive: Receive) -> Response:
        return Response(self._metrics.render(), ((b"content-type", prometheus.CONTENT_TYPE.encode()),))

    async def _docs(self, scope: Scope, receive: Receive) -> Response:
        return Response(_DOCS.read_bytes(), ((b"content-type", b"text/html; charset=utf-8"),))

    async def _show_openapi(self, scope: Scope, receive: Receive) -> Response:
        return Response(self._openapi(self._variant))
