"""gzip and deflate of bodies that clients send, and gzip of answers where a client asks for it.

Compressing an answer costs about as much as computing it with a small model, and HTTP libraries name gzip in every
request, wanted or not. So an answer is compressed for a client that names gzip alone (`Accept-Encoding: gzip`).
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator

from ..errors import ApiError
from ..limits.bounds import exceeded
from ..limits.budget import MemoryBudget
from ..limits.callers import Caller

__all__ = ["CODINGS", "LEAST_BYTES", "compress", "compressed", "decompress"]

LEAST_BYTES = 1024
"""Shorter answers are sent as they are."""

_GZIP = 31

CODINGS = {b"gzip": _GZIP, b"x-gzip": _GZIP, b"deflate": 15}
"""Codings that bodies may have, with zlib's number for each: deflate is zlib's format (RFC 9110, 8.4.1)."""

_LEVEL = 1
_PART_BYTES = 128 << 10


async def decompress(body: bytes, coding: bytes, limit_bytes: int, budget: MemoryBudget, caller: Caller) -> bytes:
    """A compressed body, decompressed part by part: other requests get their turn in between.

    Args:
        body: As it came.
        coding: Key in `CODINGS`.
        limit_bytes: Longest body, decompressed.
        budget: Where memory for it is held.
        caller: Who sends it.

    Raises:
        ApiError: It is not of this coding (422) or too long (413), or there is no memory for it (429).
    """
    found: list[bytes] = []
    size = 0
    name = coding.decode("ascii")
    coder = zlib.decompressobj(CODINGS[coding])
    ended = False
    try:
        while not ended:
            part = coder.decompress(body, _PART_BYTES)
            body = coder.unconsumed_tail
            ended = coder.eof
            size += len(part)
            if size > limit_bytes:
                raise ApiError("too_large", exceeded("body_bytes", limit_bytes, None, "body, decompressed: "))
            if not part and not ended:
                raise ApiError("invalid_request", f"content-encoding: expected {name} to its end, got a part of it")
            if len(part) == _PART_BYTES:
                budget.hold_body(caller, len(part))
                await asyncio.sleep(0)
            found.append(part)
            if coder.unused_data:  # Another member.
                body, coder, ended = coder.unused_data, zlib.decompressobj(CODINGS[coding]), False
    except zlib.error as error:
        raise ApiError("invalid_request", f"content-encoding: expected {name}, got something else ({error})") from None
    return b"".join(found)


def compress(body: bytes) -> bytes:
    """A body in gzip."""
    coder = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
    return coder.compress(body) + coder.flush()


def compressed(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The same of a body in parts; none of them is empty."""
    coder = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
    for part in parts:
        yield coder.compress(part) + coder.flush(zlib.Z_SYNC_FLUSH)
    yield coder.flush()
