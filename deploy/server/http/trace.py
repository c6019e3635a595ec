"""W3C Trace Context: which request of whose trace this is, taken from its header `traceparent` or begun here."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["TRACEPARENT", "Trace", "trace_of"]

TRACEPARENT = b"traceparent"
_FORM = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_SAMPLED = 1


class Trace(NamedTuple):
    """The place of a request in a trace.

    Attributes:
        trace_id: Of the trace.
        span_id: Of this request.
        parent_id: Of the span that asked; 0: there is none.
        flags: As they came; 1: the one who asked records its spans.
    """

    trace_id: int
    span_id: int
    parent_id: int = 0
    flags: int = 0

    @property
    def id(self) -> str:
        """The trace's id as logs and headers have it."""
        return f"{self.trace_id:032x}"

    @property
    def header(self) -> tuple[bytes, bytes]:
        """The header that tells a client of this request's place."""
        return TRACEPARENT, b"00-%032x-%016x-%02x" % (self.trace_id, self.span_id, self.flags & _SAMPLED)


def trace_of(headers: Mapping[bytes, bytes]) -> Trace:
    """The place of a request, by its headers; a header that is malformed counts as none."""
    span_id = random.getrandbits(64) or 1
    found = _FORM.fullmatch(headers.get(TRACEPARENT, b""))
    if found is not None:
        version, trace_id, parent_id, flags, rest = found.groups()
        known = version != b"ff" and (rest is None or version != b"00")  # Later versions may say more.
        if known and int(trace_id, 16) and int(parent_id, 16):
            return Trace(int(trace_id, 16), span_id, int(parent_id, 16), int(flags, 16))
    return Trace(random.getrandbits(128) or 1, span_id)
