"""CORS: pages of other origins that may read answers. Nothing is said of it unless the operator names origins."""

from __future__ import annotations

from collections.abc import Sequence

from .exchange import Headers, Scope, Send

__all__ = ["Cors"]


class Cors:
    """The origins that an operator allows."""

    def __init__(self, origins: Sequence[str]) -> None:
        """`*` allows all."""
        self._all = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def fields(self, headers: Headers) -> tuple[tuple[bytes, bytes], ...]:
        """What is added to the headers of an answer.

        Args:
            headers: Of the request.
        """
        if self._all:
            return ((b"access-control-allow-origin", b"*"),)
        origin = headers.get(b"origin", b"")
        if origin not in self._origins:
            return ((b"vary", b"origin"),)
        return (b"access-control-allow-origin", origin), (b"vary", b"origin")

    async def answer(self, scope: Scope, send: Send) -> bool:
        """Answers the question what a page may ask; returns whether this is one."""
        headers: Headers = scope["deploy.headers"]
        if scope["method"] != "OPTIONS" or b"access-control-request-method" not in headers:
            return False
        fields = [
            *self.fields(headers),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type, x-request-timeout-ms"),
            (b"access-control-max-age", b"600"),
            (b"content-length", b"0"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": b""})
        return True
