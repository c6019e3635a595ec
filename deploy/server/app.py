"""The ASGI application: the rows of `api/`, made ready for one model.

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

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import orjson

from ..bundle import Manifest
from .api import ROUTES
from .api.openapi import document
from .api.route import NATIVE, Binary, Context, Dialect, Route
from .errors import ApiError
from .http.bodies import INLINE_BYTES, Large, decode, decode_in_parts, encode_in_parts, parts
from .http.coding import LEAST_BYTES, compress, compressed
from .http.cors import Cors
from .http.exchange import Headers, Receive, Response, Scope, Send, authorize, error_response, read_body
from .limits.bounds import Settings
from .limits.callers import Caller, CallerLeft
from .metrics import Metrics
from .service import Batcher, Service, TextTokenizer
from .variants import Choice

__all__ = ["App"]

log = logging.getLogger("deploy.server")


class _Endpoint:
    """A row, made ready: what every request of it needs is looked up once."""

    __slots__ = ("_api_key", "_running", "_wrong_task", "body_bytes", "context", "decoder", "handler", "route")

    def __init__(self, route: Route, context: Context, api_key: bytes | None, wrong_task: str | None) -> None:
        self.route = route
        self.context = context
        self.handler = route.handler
        self.decoder: Any = None if route.request is None else msgspec.json.Decoder(route.request)
        self.body_bytes = context.limits.body_bytes
        self._running = route.task is not None
        self._api_key = api_key if route.secured else None
        self._wrong_task = wrong_task

    def admit(self, headers: Headers) -> None:
        """Refuses, before the body is read, what will not be served anyway."""
        if self._api_key is not None:
            authorize(headers, self._api_key)
        if self._wrong_task is not None:
            raise ApiError("wrong_task", self._wrong_task)
        if self._running:
            self.context.service.check_running()


class App:
    """Serves one model.

    Attributes:
        metrics: What it counts.
        service: The model.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: TextTokenizer,
        batcher: Batcher,
        settings: Settings,
        routes: Sequence[Route] = ROUTES,
    ) -> None:
        self.metrics = self._metrics = Metrics()
        self._cors = Cors(settings.cors_allow_origin) if settings.cors_allow_origin else None
        self.service = Service(manifest, tokenizer, batcher, settings, self._metrics)
        self._metrics.gauges(
            lambda: batcher.queued_tokens,
            lambda: batcher.predicted_wait_s,
            lambda: self.service.budget.held_bytes,
            lambda: self.service.ready,
        )
        routes = rows_of(routes, manifest.task, self.service.model)
        self._dialects = sorted({route.dialect for route in routes}, key=lambda dialect: -len(dialect.prefix))
        written = functools.cache(
            lambda variant, memory_mb: orjson.dumps(document(routes, manifest, variant, settings, tokenizer, memory_mb))
        )
        key = None if settings.api_key is None else settings.api_key.encode()
        self._root_path = settings.root_path
        self._routes: dict[str, dict[str, _Endpoint]] = {}
        for route in routes:
            context = Context(
                self.service,
                route.limits(settings),
                self._metrics,
                lambda: written(self._variant, self.service.budget.limit_mb),
            )
            endpoint = _Endpoint(route, context, key, _wrong_task(route, routes, manifest))
            for path in _paths(route.path, self.service.model):
                self._routes.setdefault(settings.root_path + path, {})[route.method] = endpoint

    @property
    def _variant(self) -> str | None:
        served = self.service.served
        return None if served is None else served.choice.variant

    @property
    def draining(self) -> bool:
        """Set once on shutdown: /ready answers 503 and every answer closes its connection."""
        return self.service.draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self.service.draining = value

    def serves(self, choice: Choice, isa: str) -> None:
        """Told once, when the engine is loaded, what is served; on any thread.

        Args:
            choice: The variant, and why it was taken.
            isa: What runs it.
        """
        self.service.serves(choice, isa)
        self._metrics.serves(self.service.model, choice.variant, self.service.manifest.task)

    def count_batch(self, texts: int, tokens: int) -> None:
        """Told of every batch."""
        self._metrics.batch(texts, tokens)

    def close(self) -> None:
        """Ends the helper threads."""
        self.service.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; `HttpProtocol` adds `deploy.headers` and `deploy.caller` to its scope."""
        started_s = time.perf_counter()
        if self._cors is not None and await self._cors.answer(scope, send):
            return
        path: str = scope["path"]
        caller: Caller = scope["deploy.caller"]
        label = "other"
        rest: Iterator[bytes] | None = None
        try:
            methods = self._routes.get(path)
            if methods is None:
                docs = f"{self._root_path}/docs"
                raise ApiError("not_found", f"no such path: {path[:200]}; GET {docs} lists what there is")
            label = path
            method: str = scope["method"]
            endpoint = methods.get("GET" if method == "HEAD" else method)
            if endpoint is None:
                allowed = ", ".join(methods)
                raise ApiError("method_not_allowed", f"{path}: expected {allowed}, got {method}", {"Allow": allowed})
            headers: Headers = scope["deploy.headers"]
            endpoint.admit(headers)
            if (wanted := headers.get(b"x-request-timeout-ms")) is not None:
                caller.deadline_s = started_s + _timeout_s(wanted)
            request = None
            if endpoint.decoder is not None:
                body = await read_body(headers, receive, endpoint.body_bytes, self.service.budget, caller)
                split = endpoint.route.split
                if split is not None:
                    body, tail = split(headers, body)
                if len(body) <= INLINE_BYTES:
                    request = decode(endpoint.decoder, body)
                else:
                    request = await self.service.aside(decode_in_parts, endpoint.decoder, body, endpoint.context.limits)
                del body
                if split is not None:
                    request = Binary(request, tail)
                caller.values_each = endpoint.route.values(self.service.manifest, request)
                caller.value_bytes = endpoint.route.value_bytes
            response = await endpoint.handler(endpoint.context, request, caller)
            data = response.body
            if isinstance(data, Large):
                if scope["http_version"] == "1.0":  # It knows no chunks.
                    data = await self.service.aside(encode_in_parts, data)
                else:
                    rest = parts(data)
                    data = await self.service.aside(next, rest)
            if headers.get(b"accept-encoding") == b"gzip" and isinstance(data, bytes):
                response, data, rest = await self._in_gzip(response, data, rest)
        except ApiError as error:
            response, data = self._error(error, scope)
        except CallerLeft:
            self._metrics.abandoned()
            return
        except Exception:
            log.exception("%s failed", path)
            response, data = self._error(ApiError("internal", "unexpected failure; the server's log says more"), scope)
        finally:
            if rest is None and caller.held_bytes:
                self.service.budget.release(caller)
        fields = [*response.headers]
        if rest is None:
            fields.append((b"content-length", b"%d" % len(data)))
        if self._cors is not None:
            fields += self._cors.fields(scope["deploy.headers"])
        if self.service.draining:
            fields.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": response.status, "headers": fields})
        if rest is None:
            await send({"type": "http.response.body", "body": data})
        elif isinstance(data, bytes):
            try:
                await self._send_parts(data, rest, send, caller)
            except CallerLeft:
                self._metrics.abandoned()
                return
            finally:
                self.service.budget.release(caller)
        self._metrics.answered(label, response.status, time.perf_counter() - started_s)

    async def _in_gzip(
        self, response: Response, data: bytes, rest: Iterator[bytes] | None
    ) -> tuple[Response, bytes, Iterator[bytes] | None]:
        """An answer in gzip, with the header that says so; a short one as it is."""
        if rest is not None:
            rest = compressed(itertools.chain((data,), rest))
            data = await self.service.aside(next, rest)
        elif len(data) < LEAST_BYTES:
            return response, data, None
        else:
            data = compress(data) if len(data) <= INLINE_BYTES else await self.service.aside(compress, data)
        fields = ((b"content-encoding", b"gzip"), (b"vary", b"accept-encoding"))
        return response._replace(headers=(*response.headers, *fields)), data, rest

    async def _send_parts(self, part: bytes, rest: Iterator[bytes], send: Send, caller: Caller) -> None:
        """Sends a large answer, each part as soon as the client has read most of those before.

        Raises:
            CallerLeft: The client has left.
        """
        while part:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            if caller.gone:
                raise CallerLeft
            part = await self.service.aside(next, rest, b"")
        await send({"type": "http.response.body", "body": b""})

    def _error(self, error: ApiError, scope: Scope) -> tuple[Response, bytes]:
        """The answer that tells of an error, and its body."""
        dialect = error.dialect or self._dialect(scope["path"], scope["method"])
        body = dialect.error(error)
        return error_response(error, body, dialect.status(error.kind)), body

    def _dialect(self, path: str, method: str) -> Dialect:
        """Whose errors a path speaks: those of its rows, or of the longest prefix."""
        rows = self._routes.get(path)
        if rows:
            return (rows.get(method) or next(iter(rows.values()))).route.dialect
        path = path.removeprefix(self._root_path)
        return next((dialect for dialect in self._dialects if path.startswith(dialect.prefix)), NATIVE)


def _timeout_s(value: bytes) -> float:
    """How long a client waits, in seconds, by its header X-Request-Timeout-Ms.

    Raises:
        ApiError: It is no number of milliseconds (422).
    """
    if not (value.isdigit() and len(value) <= 9 and int(value)):
        raise ApiError(
            "invalid_request", f"x-request-timeout-ms: expected whole milliseconds from 1, got {value[:40]!r}"
        )
    return 1e-3 * int(value)


def _paths(path: str, model: str) -> tuple[str, ...]:
    """A path, and the same behind the name of the model, where the dialect has no place for that name."""
    return (path,) if path.startswith(("/v1/", "/v2")) else (path, f"/models/{model}{path}")


def rows_of(routes: Sequence[Route], task: str, model: str) -> list[Route]:
    """The rows that serve a bundle, with the name of its model in their paths.

    Args:
        routes: All rows; of those with one path and method, the one of the bundle's task is taken, else the first.
        task: Of the bundle.
        model: Name that it is served under.
    """
    found: dict[tuple[str, str], Route] = {}
    for route in routes:
        key = (route.path, route.method)
        if key not in found or (route.task == task and found[key].task != task):
            found[key] = route
    return [
        dataclasses.replace(route, path=route.path.replace("{model}", model)) if "{model}" in route.path else route
        for route in found.values()
    ]


def _wrong_task(route: Route, routes: Sequence[Route], manifest: Manifest) -> str | None:
    """Why a route does not serve a bundle, and which one does; None if it does."""
    if route.task in (None, manifest.task):
        return None
    fitting = next((other.path for other in routes if other.task == manifest.task), None)
    return (
        f"{route.path} needs a bundle for {route.task}, and {manifest.model.name} is for {manifest.task}"
        f"{'' if fitting is None else f': POST to {fitting}'}"
    )
