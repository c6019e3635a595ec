"""The transport as an answer sees it: its head leaves with the first part of its body, by one call of the system."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

__all__ = ["Writer"]


class Writer:
    """Where one answer is written to.

    uvloop hands each write to the system at once. A head of its own is a call and a packet more for each answer, and a
    worker that is killed between both leaves a client with an answer that has begun.
    """

    __slots__ = ("_cycle", "_head", "_transport")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        """Puts itself in the place of the transport.

        Args:
            cycle: A request that has not been answered.
        """
        self._cycle = weakref.ref(cycle)  # Which has this: requests would stay until Python's collector comes.
        self._transport: asyncio.Transport = cycle.transport
        self._head: bytes | None = None
        cycle.transport = self  # type: ignore[assignment]

    def write(self, data: bytes) -> None:
        """Writes a part of the body, or keeps the head until there is one."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.writelines((head, data))
        elif self._head is None and self._is_head_of_body():
            self._head = data
        else:
            self._transport.write(data)

    def _is_head_of_body(self) -> bool:
        """Whether what is written is the head of an answer with a body, and no interim answer."""
        cycle = self._cycle()
        return cycle is not None and cycle.response_started and cycle.scope["method"] != "HEAD"

    def close(self) -> None:
        """Closes the connection, once all is written."""
        if self._head:
            self.write(b"")
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
