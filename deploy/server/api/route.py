"""`Route`: one row says all that the server knows about a path.

Routing, the request's decoder, the OpenAPI document, the page at `/docs`, labels of metrics, limits, and the message of
`wrong_task` are read from the rows; nothing else names a path. What a file of rows needs is imported from here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, NamedTuple

from ...bundle import Manifest
from ..errors import ERRORS, ApiError, error_body, error_fields, error_text
from ..http.bodies import encode, encode_list, encode_rows, text_values
from ..http.exchange import JSON_HEADER, Response
from ..limits.bounds import Limits, Settings
from ..limits.callers import Caller
from ..metrics import Metrics, ModelsMetrics
from ..service import Result, Service
from .schemas import ErrorResponse

__all__ = [
    "JSON",
    "JSON_HEADER",
    "NATIVE",
    "ApiError",
    "Binary",
    "Caller",
    "Context",
    "Dialect",
    "Handler",
    "Limits",
    "Response",
    "Result",
    "Route",
    "Service",
    "encode",
    "encode_list",
    "encode_rows",
    "error_fields",
    "error_text",
    "server_timing",
    "text_values",
]

JSON = "application/json"


@dataclass(frozen=True)
class Dialect:
    """A family of routes whose clients expect errors of one form.

    Attributes:
        name: What it is called.
        prefix: Unknown paths that begin with it are answered in this dialect.
        error: Body of an error.
        body: Type of that body.
        statuses: HTTP statuses by kind of error, where they are not those of `ERRORS`.
    """

    name: str
    prefix: str
    error: Callable[[ApiError], bytes]
    body: type = ErrorResponse
    statuses: Mapping[str, int] = field(default_factory=dict, hash=False)

    def status(self, kind: str) -> int:
        """HTTP status of a kind of error."""
        return self.statuses.get(kind) or ERRORS[kind].status


NATIVE = Dialect("native", "/", error_body)
"""The server's own routes."""


@dataclass(frozen=True)
class Context:
    """What a handler works with; made once for each route.

    Attributes:
        service: The model.
        limits: What a request of this route may cost.
        metrics: Counters of the server.
        document: The OpenAPI document of all routes.
        services: Of all models that the route tells of: those of the server, or the one that its path names.
    """

    service: Service
    limits: Limits
    metrics: Metrics | ModelsMetrics
    document: Callable[[], bytes]
    services: tuple[Service, ...]

    def truncate(self, wanted: bool | None = None) -> bool:
        """Whether to cut texts that are longer than the model takes: what a request says, else `--auto-truncate`."""
        return self.service.settings.auto_truncate if wanted is None else wanted


def server_timing(result: Result) -> tuple[bytes, bytes]:
    """The Server-Timing header of an inference request."""
    return b"server-timing", b"tokenize;dur=%.3f,queue;dur=%.3f,infer;dur=%.3f" % (
        1e3 * result.tokenize_s,
        1e3 * result.queue_s,
        1e3 * result.infer_s,
    )


class Binary(NamedTuple):
    """A request whose JSON is followed by bytes: what a handler of a row with `split` gets.

    Attributes:
        request: What the JSON says.
        tail: The bytes.
    """

    request: Any
    tail: bytes


Handler = Callable[[Context, Any, Caller], Awaitable[Response]]
"""Answers a request: gets the route's context, the decoded body (None without one), and who waits."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """One row.

    Attributes:
        method: HTTP method; GET answers HEAD, too.
        path: Exact path, in which `{model}` is the name of the model.
        summary: One line for the documentation.
        handler: Answers a request.
        dialect: Whose errors it speaks.
        other: Another one, whose errors some of its requests are answered with.
        task: Task that a bundle must have; None: any. A route with a task runs the engine. Of several rows with one
            path and method, that of the bundle's task is served.
        request: Type of the body, which checks it; None: no body is read.
        example: Body that works; `{model}` and `{mask}` are filled in.
        answer: Type of a JSON body of status 200; None: anything of `media_type`.
        answered: What the answer is, where the type's docstring does not say it.
        media_type: Of the answer.
        errors: Kinds of errors besides those that follow from the other fields.
        limits: What one request may cost, from the server's settings.
        values: Numbers in the answer to each input (fill-mask: to each mask) of a request, before it is run.
        value_bytes: Memory that each of them holds until it is sent.
        secured: Whether the API key is asked for.
        names_model: Whether the body's `model` says which model is asked, where the server has several.
        speaks: Whose errors a body asks for, where a path serves two dialects.
        marks: What marks in the types of its requests stand for; see `openapi`.
        split: Cuts a body into JSON and what follows it; None: it is all JSON.
        tag: Heading in the documentation.
    """

    method: str
    path: str
    summary: str
    handler: Handler
    dialect: Dialect = NATIVE
    other: Dialect | None = None
    task: str | None = None
    request: type | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    answer: type | UnionType | None = None
    answered: str = ""
    media_type: str = JSON
    errors: tuple[str, ...] = ()
    limits: Callable[[Settings], Limits] = Limits.of
    values: Callable[[Manifest, Any], int] = lambda manifest, request: 0
    value_bytes: int = 4
    secured: bool = False
    names_model: bool = False
    speaks: Callable[[Any], Dialect | None] = lambda request: None
    marks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    split: Callable[[Mapping[bytes, bytes], bytes], tuple[bytes, bytes]] | None = None
    tag: str = "operation"

    @property
    def name(self) -> str:
        """Identifier of the operation in the OpenAPI document."""
        words = self.path.strip("/").partition(".")[0].replace("{model}", "model")
        return words.replace("/", "_").replace("-", "_") or f"root_{self.method.lower()}"

    @property
    def error_kinds(self) -> list[str]:
        """Kinds of errors that it answers with."""
        kinds = list(self.errors)
        if self.task is not None:
            kinds += ["wrong_task", "queue_full", "memory_full", "deadline", "internal", "loading", "draining"]
        if self.request is not None:
            kinds += ["timeout", "too_large", "unsupported_media_type", "invalid_request"]
        if self.task is not None and self.request is not None:
            kinds.append("no_inputs")
        if self.names_model:
            kinds.append("model_not_found")
        return kinds
