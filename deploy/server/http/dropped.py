"""What a client sends and nobody looks at: the body of a request that was refused, or what comes behind it."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.flow_control import FlowControl

__all__ = ["DROPPED_BYTES", "DROPPED_BYTES_PER_S", "drop"]

DROPPED_BYTES = 16 << 20
"""How much of it is read as fast as it comes: who has sent it all reads the answer."""

DROPPED_BYTES_PER_S = 4 << 20
"""How fast the rest is read. A client on the same machine sends some GB a second, which would take a core."""

_AT_ONCE = 1 << 20


def drop(dropped_bytes: int, flow: FlowControl, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> int:
    """Some has come: reads no more for a while, if it was much.

    Args:
        dropped_bytes: How much of it has come on the connection, since the last request that was not refused.
        flow: Of the connection.
        transport: Of the connection.
        loop: That of the caller.

    Returns:
        What counts from now on.
    """
    if dropped_bytes > DROPPED_BYTES and not flow.read_paused:
        dropped_bytes -= _AT_ONCE
        flow.pause_reading()
        loop.call_later(_AT_ONCE / DROPPED_BYTES_PER_S, _read_on, flow, transport)
    return dropped_bytes


def _read_on(flow: FlowControl, transport: asyncio.Transport) -> None:
    if not transport.is_closing():
        flow.resume_reading()
