"""The one table of errors: kind, HTTP status, and what a client should make of it.

Every error of the server has one of these kinds; its JSON says which: `{"error": {"type": kind, "message": ...}}`.
Dialects of other servers have bodies of their own (`api/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

__all__ = ["ERRORS", "ApiError", "ErrorKind", "error_body", "error_fields", "error_text"]


@dataclass(frozen=True)
class ErrorKind:
    """One row of the table.

    Attributes:
        status: HTTP status.
        meaning: What happened, in general; shown in the OpenAPI description.
        retry: Whether the same request may succeed later; then the answer has a Retry-After header.
    """

    status: int
    meaning: str
    retry: bool = False


ERRORS: Mapping[str, ErrorKind] = {
    "wrong_task": ErrorKind(400, "the bundle's task does not serve this endpoint; the message names the one that fits"),
    "unauthorized": ErrorKind(401, "the API key is missing or wrong"),
    "not_found": ErrorKind(404, "no such path"),
    "model_not_found": ErrorKind(404, "no such model; the message names those that there are"),
    "method_not_allowed": ErrorKind(405, "the path exists, with another method"),
    "timeout": ErrorKind(408, "the request did not arrive completely in time"),
    "too_large": ErrorKind(
        413, "body, inputs, length of a text, tokens, or numbers of the answer above a limit, which the message names"
    ),
    "unsupported_media_type": ErrorKind(415, "the body is in a coding other than gzip and deflate"),
    "no_inputs": ErrorKind(422, "an empty list of inputs"),
    "invalid_request": ErrorKind(422, "not JSON in UTF-8, a missing or unknown field, a wrong type, or an empty list"),
    "queue_full": ErrorKind(
        429, "the request would wait for too long, or more tokens are waiting than the queue holds", retry=True
    ),
    "memory_full": ErrorKind(429, "other requests hold the memory that this one needs", retry=True),
    "rate_limit_exceeded": ErrorKind(429, "the API key has used up its requests or tokens of a minute", retry=True),
    "malformed_http": ErrorKind(400, "not HTTP/1.1; the connection is closed"),
    "headers_too_large": ErrorKind(
        431, "more header lines, or more bytes of them, than the server takes; the connection is closed"
    ),
    "unknown_transfer_encoding": ErrorKind(
        501, "the body is sent in an encoding other than chunked; the connection is closed"
    ),
    "internal": ErrorKind(500, "the engine failed on this request; the server's log says why"),
    "deadline": ErrorKind(504, "not answered, or not to be, within the time that X-Request-Timeout-Ms gives"),
    "loading": ErrorKind(503, "the model is being loaded", retry=True),
    "draining": ErrorKind(503, "the server is shutting down; send the request elsewhere", retry=True),
}


class ApiError(Exception):
    """An error that a client is told about.

    Attributes:
        kind: Key in `ERRORS`.
        message: What was expected, what came, what to do.
        headers: More response headers.
        dialect: Whose form the answer has, where a path serves two; None: that of its route.
    """

    def __init__(self, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.headers = dict(headers or {})
        self.dialect: Any = None

    @property
    def status(self) -> int:
        """HTTP status of this error."""
        return ERRORS[self.kind].status


def error_text(error: ApiError) -> str:
    """Message of an error.

    Characters that UTF-8 cannot hold are replaced: a message may quote what a client sent.
    """
    return error.message.encode("utf-8", "replace").decode("utf-8")


def error_fields(error: ApiError) -> dict[str, object]:
    """Kind and message of an error."""
    return {"type": error.kind, "message": error_text(error)}


def error_body(error: ApiError) -> bytes:
    """The JSON of an error."""
    return orjson.dumps({"error": error_fields(error)})
