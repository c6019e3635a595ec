"""Between ASGI and handlers: the bytes of a body, and errors as answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from ..errors import ERRORS, ApiError
from ..limits.bounds import exceeded
from ..limits.budget import SMALL_BODY_BYTES, MemoryBudget
from ..limits.callers import Caller, CallerLeft
from .bodies import Large
from .coding import CODINGS, decompress

__all__ = [
    "JSON_HEADER",
    "Headers",
    "Receive",
    "Response",
    "Scope",
    "Send",
    "error_response",
    "read_body",
]

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = dict[bytes, bytes]
"""Lower-case names to values; of a name that came several times, the last."""

_PART_BYTES = 64 << 10

JSON_HEADER = (b"content-type", b"application/json")


class Response(NamedTuple):
    """An answer.

    Attributes:
        body: Complete body, or what it is to be made of.
        headers: Headers without content-length.
        status: HTTP status.
    """

    body: bytes | Large
    headers: tuple[tuple[bytes, bytes], ...] = (JSON_HEADER,)
    status: int = 200


def error_response(error: ApiError, body: bytes, status: int) -> Response:
    """The answer that tells of an error, with the body and the status that its dialect gives it."""
    headers = [JSON_HEADER, *((name.lower().encode(), value.encode()) for name, value in error.headers.items())]
    if ERRORS[error.kind].retry and "Retry-After" not in error.headers:
        headers.append((b"retry-after", b"1"))
    return Response(body, tuple(headers), status)


async def read_body(
    headers: Headers, receive: Receive, limit_bytes: int, budget: MemoryBudget, caller: Caller
) -> bytes:
    """Reads a request body.

    Args:
        headers: Of the request.
        receive: Gives its parts.
        limit_bytes: Longest body, decompressed too.
        budget: Where memory for it is held before it is read.
        caller: Who sends it.

    The rest of a body that is too large is not kept: the server takes and drops it, so that the client, which reads
    only after it has written, gets the answer.

    Raises:
        ApiError: The body is too large (413) or in another coding (415), or there is no memory for it (429).
        CallerLeft: The client has left.
    """
    told = int(headers.get(b"content-length", b"0"))
    if told > limit_bytes:
        raise _too_large(limit_bytes, told)
    coding = headers.get(b"content-encoding", b"identity").lower()
    if coding != b"identity" and coding not in CODINGS:
        raise ApiError("unsupported_media_type", "content-encoding: expected gzip, deflate or none")
    if told > SMALL_BODY_BYTES:
        budget.hold_body(caller, told)
    message = await receive()
    if message["type"] == "http.disconnect":
        raise CallerLeft
    body: bytes = message["body"]
    if message["more_body"]:
        parts = [body]
        size = len(body)
        held = told
        while message["more_body"]:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise CallerLeft
            size += len(message["body"])
            if size > limit_bytes:
                raise _too_large(limit_bytes)
            if size - held >= _PART_BYTES:  # Chunked: its length is not known before.
                budget.hold_body(caller, size - held)
                held = size
            parts.append(message["body"])
        body = b"".join(parts)
    if len(body) > limit_bytes:
        raise _too_large(limit_bytes, len(body))
    return body if coding == b"identity" else await decompress(body, coding, limit_bytes, budget, caller)


def _too_large(limit_bytes: int, found: int | None = None) -> ApiError:
    return ApiError("too_large", exceeded("body_bytes", limit_bytes, found, "body: "))
