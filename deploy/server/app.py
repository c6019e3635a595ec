"""The ASGI application: the rows of `api/`, made ready for one model or several.

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
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from ..bundle import Manifest
from ..keys import Key
from .api import ROUTES
from .api.openapi import document
from .api.route import NATIVE, Binary, Context, Dialect, Route
from .endpoints import Endpoint, behind, paths_of, rows_of, wrong_task
from .errors import ApiError
from .http.bodies import INLINE_BYTES, Large, decode, decode_in_parts
from .http.coding import LEAST_BYTES, compress, compressed
from .http.cors import Cors
from .http.exchange import Headers, Receive, Response, Scope, Send, error_response, read_body
from .http.leaving import Leaving
from .limits.bounds import Settings
from .limits.budget import MemoryBudget
from .limits.callers import Caller, CallerLeft
from .limits.keys import Keys
from .limits.meters import Meters
from .metrics import Metrics, ModelsMetrics
from .models import Model, Turn
from .observe import Observer
from .observed import Observed
from .service import Batcher, Service, TextTokenizer

__all__ = ["App"]


class App:
    """Serves one model, or several.

    Attributes:
        models: The models; a request that names none is for the first.
        metrics: What is counted.
        budget: Memory of all requests and connections.
        settings: Of the server.
    """

    def __init__(self, settings: Settings, routes: Sequence[Route] = ROUTES) -> None:
        """Serves nothing before `use`."""
        self.models: tuple[Model, ...] = ()
        self.budget = MemoryBudget.of(settings.max_memory_mb, self._retry_after)
        self.settings = settings
        self._rows = routes
        self._counted: list[Metrics] = []
        self._leaving = Leaving(self.budget)
        self._cors = Cors(settings.cors_allow_origin) if settings.cors_allow_origin else None
        self._observer = Observer(settings)
        self._meters = Meters()
        self.admits((), self._meters)
        self._root_path = settings.root_path
        self._draining = False

    def admits(self, keys: Sequence[Key], meters: Meters | None = None) -> None:
        """Lets these API keys in, and that of the settings, from the next `use` on; without any, everybody.

        Args:
            keys: Of the file.
            meters: Where their budgets are counted; None: where they were.
        """
        self._meters = meters or self._meters
        plain = self.settings.api_key
        self._keys = Keys(keys, plain, self._meters) if keys or plain is not None else None

    def model(
        self, manifest: Manifest, tokenizer: TextTokenizer, batcher: Batcher, place: int = 0, **own: Any
    ) -> Model:
        """A model for `use`.

        Args:
            manifest: The bundle.
            tokenizer: Of the bundle.
            batcher: Queue and engine.
            place: Among the models; one that had this place before goes on to be counted with it.
            own: Settings that are not those of the server.
        """
        while len(self._counted) <= place:
            metrics = Metrics()
            self._register(metrics, len(self._counted))
            self._counted.append(metrics)
        settings = dataclasses.replace(self.settings, **own)
        return Model(manifest, tokenizer, batcher, settings, self._counted[place], self.budget)

    def _register(self, metrics: Metrics, place: int) -> None:
        metrics.gauges(
            lambda: self.models[place].batcher.queued_tokens,
            lambda: self.models[place].batcher.predicted_wait_s,
            None if place else lambda: self.budget.held_bytes,
            lambda: self.models[place].service.ready,
        )

    def use(self, models: Sequence[Model]) -> None:
        """Serves these models from now on; requests that ask those of before are still answered."""
        if not self.models:
            several = len(models) > 1
            self.metrics: Metrics | ModelsMetrics = (
                ModelsMetrics(self._counted, lambda: [model.name for model in self.models])
                if several
                else self._counted[0]
            )
        for model in models:
            model.service.draining = self._draining
            model.announce()
        self._dialects = sorted({route.dialect for route in self._rows}, key=lambda dialect: -len(dialect.prefix))
        self._routes = self._table(models)
        self.models = tuple(models)

    def _table(self, models: Sequence[Model]) -> dict[str, dict[str, Endpoint]]:
        """What answers, by path and method."""
        services = tuple(model.service for model in models)
        table: dict[str, dict[str, Endpoint]] = {}
        named: dict[tuple[str, str], dict[str, Endpoint]] = {}
        for model in models:
            first = model is models[0]
            alone = self._endpoints(model, (model.service,), several=len(models) > 1)
            unnamed = self._endpoints(model, services) if first and len(models) > 1 else alone
            rows = rows_of(self._rows, model.service.manifest.task, "{model}")
            for row, endpoint, own in zip(rows, unnamed, alone, strict=True):
                for path, by_name in paths_of(row.path, model.name, first):
                    table.setdefault(self._root_path + path, {})[row.method] = own if by_name else endpoint
                if len(models) > 1 and row.names_model:
                    others = named.setdefault((row.path, row.method), {})
                    others[model.name] = own
                    if first:
                        endpoint.others = others
        return table

    def _endpoints(self, model: Model, services: tuple[Service, ...], several: bool = False) -> list[Endpoint]:
        """The rows of a model, made ready.

        Args:
            model: The model.
            services: Of all models that the rows tell of.
            several: Whether there are others.
        """
        service = model.service
        manifest, settings = service.manifest, service.settings
        rows = rows_of(self._rows, manifest.task, model.name)
        described = rows if services != (service,) or not several else behind(model.name, rows)
        written = functools.cache(
            lambda variant, memory_mb: orjson.dumps(
                document(described, manifest, variant, settings, service.tokenizer, memory_mb)
            )
        )

        def written_now() -> bytes:
            served = service.served
            return written(None if served is None else served.choice.variant, self.budget.limit_mb)

        return [
            Endpoint(
                row,
                Context(service, row.limits(settings), self.metrics, written_now, services),
                model,
                self._keys,
                wrong_task(row, described, manifest),
            )
            for row in rows
        ]

    @property
    def service(self) -> Service:
        """The service of the first model."""
        return self.models[0].service

    @property
    def running(self) -> bool:
        """Whether every engine runs."""
        return all(model.batcher.running for model in self.models)

    @property
    def draining(self) -> bool:
        """Set once on shutdown: /ready answers 503 and every answer closes its connection."""
        return self._draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self._draining = value
        for model in self.models:
            model.service.draining = value

    def _retry_after(self) -> str:
        return max((model.batcher.retry_after() for model in self.models), key=int)

    def refused(self, kind: str) -> None:
        """Told of what the protocol has answered with an error by itself."""
        self.models[0].metrics.refused(kind)

    def close(self) -> None:
        """Ends the helper threads."""
        for model in self.models:
            model.service.close()
        self._observer.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; `HttpProtocol` adds `deploy.headers` and `deploy.caller` to its scope."""
        headers: Headers = scope["deploy.headers"]
        if self._cors is not None and await self._cors.answer(scope, send):
            return
        first = self.models[0]
        observed = self._observer.begin(headers, first.metrics)
        turn = Turn(first, observed)
        try:
            await self._answer(scope, receive, send, observed, turn)
        finally:
            turn.end()

    async def _answer(self, scope: Scope, receive: Receive, send: Send, observed: Observed, turn: Turn) -> None:
        headers: Headers = scope["deploy.headers"]
        path: str = scope["path"]
        caller: Caller = scope["deploy.caller"]
        rest: Iterator[bytes] | None = None
        try:
            methods = self._routes.get(path)
            if methods is None:
                raise self._no_such(path)
            observed.endpoint = path
            method: str = scope["method"]
            endpoint = methods.get("GET" if method == "HEAD" else method)
            if endpoint is None:
                allowed = ", ".join(methods)
                raise ApiError("method_not_allowed", f"{path}: expected {allowed}, got {method}", {"Allow": allowed})
            turn.to(endpoint.model)
            observed.dialect = endpoint.route.dialect.name
            endpoint.admit(headers, caller)
            if (wanted := headers.get(b"x-request-timeout-ms")) is not None:
                caller.deadline_s = observed.started_s + _timeout_s(wanted)
            request = None
            if endpoint.decoder is not None:
                body = await read_body(headers, receive, endpoint.body_bytes, self.budget, caller)
                split = endpoint.route.split
                if split is not None:
                    body, tail = split(headers, body)
                if len(body) <= INLINE_BYTES:
                    request = decode(endpoint.decoder, body)
                else:
                    limits = endpoint.context.limits
                    request = await turn.service.aside(decode_in_parts, endpoint.decoder, body, limits)
                del body
                if endpoint.others is not None:
                    endpoint = endpoint.named(request)
                    turn.to(endpoint.model)
                if split is not None:
                    request = Binary(request, tail)
                caller.values_each = endpoint.route.values(turn.service.manifest, request)
                caller.value_bytes = endpoint.route.value_bytes
            response = await endpoint.handler(endpoint.context, request, caller)
            if isinstance(response.body, Large):
                in_chunks = scope["http_version"] != "1.0"
                data, rest = await self._leaving.begin(response.body, turn.service.aside, in_chunks)
            else:
                data = response.body
            if headers.get(b"accept-encoding") == b"gzip":
                response, data, rest = await self._in_gzip(turn.service, response, data, rest)
        except ApiError as error:
            self._observer.error(observed, error)
            response, data = self._error(error, scope, observed)
            # Frames in it may hold the error, which would all stay until Python's collector comes.
            error.__traceback__ = None
        except CallerLeft:
            observed.metrics.abandoned()
            return
        except Exception:
            self._observer.exception(observed)
            failure = ApiError("internal", "unexpected failure; the server's log says more")
            response, data = self._error(failure, scope, observed)
        finally:
            if rest is None and caller.held_bytes:
                self.budget.release(caller)
        fields = [*response.headers]
        if rest is None:
            fields.append((b"content-length", b"%d" % len(data)))
        if self._cors is not None:
            fields += self._cors.fields(headers)
        if observed.traced:
            fields.append(observed.trace.header)
        if self._draining:
            fields.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": response.status, "headers": fields})
        if rest is None and len(data) <= INLINE_BYTES:
            await send({"type": "http.response.body", "body": data})
        else:
            try:
                if rest is None:
                    await self._leaving.send_whole(data, send, caller)
                else:
                    await self._leaving.send_parts(data, rest, turn.service.aside, send, caller)
            except CallerLeft:
                observed.metrics.abandoned()
                return
            finally:
                self.budget.release(caller)
        self._observer.answered(observed, scope, response.status, caller)

    async def _in_gzip(
        self, service: Service, response: Response, data: bytes, rest: Iterator[bytes] | None
    ) -> tuple[Response, bytes, Iterator[bytes] | None]:
        """An answer in gzip, with the header that says so; a short one as it is."""
        if rest is not None:
            rest = compressed(itertools.chain((data,), rest))
            data = await service.aside(next, rest)
        elif len(data) < LEAST_BYTES:
            return response, data, None
        else:
            data = compress(data) if len(data) <= INLINE_BYTES else await service.aside(compress, data)
        fields = ((b"content-encoding", b"gzip"), (b"vary", b"accept-encoding"))
        return response._replace(headers=(*response.headers, *fields)), data, rest

    def _no_such(self, path: str) -> ApiError:
        """The error for a path that nothing answers: a model that is not there, or no path of any model."""
        if path.removeprefix(self._root_path).startswith(_NAMING):
            names = ", ".join(model.name for model in self.models)
            return ApiError("model_not_found", f"no such path: {path[:200]}; this server has {names}")
        return ApiError("not_found", f"no such path: {path[:200]}; GET {self._root_path}/docs lists what there is")

    def _error(self, error: ApiError, scope: Scope, observed: Observed) -> tuple[Response, bytes]:
        """The answer that tells of an error, and its body; what was charged for it is given back."""
        caller: Caller = scope["deploy.caller"]
        caller.refused = True
        caller.refund()
        dialect = error.dialect or self._dialect(scope["path"], scope["method"])
        observed.dialect = dialect.name
        body = dialect.error(error)
        return error_response(error, body, dialect.status(error.kind)), body

    def _dialect(self, path: str, method: str) -> Dialect:
        """Whose errors a path speaks: those of its rows, or of the longest prefix."""
        rows = self._routes.get(path)
        if rows:
            return (rows.get(method) or next(iter(rows.values()))).route.dialect
        path = path.removeprefix(self._root_path)
        return next((dialect for dialect in self._dialects if path.startswith(dialect.prefix)), NATIVE)


_NAMING = ("/models/", "/v1/models/", "/v2/models/")
"""What paths begin with that name a model."""


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
