"""How large answers leave: encoded before their first byte where that takes little memory, else part by part.

An answer that has begun to leave is lost if its worker is killed. Of 1.4 MB the parts leave for as long as it takes to
encode them, tens of milliseconds beside a busy engine; encoded before, the whole leaves in a few.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

from ..limits.budget import MemoryBudget
from ..limits.callers import Caller, CallerLeft
from .bodies import Large, encode_in_parts, parts
from .exchange import Send

Aside = Callable[..., Awaitable[bytes]]

__all__ = ["WHOLE_BYTES", "Leaving"]

WHOLE_BYTES = 4 << 20
"""About the longest answer that is encoded before it leaves."""

ALL_BYTES = 32 << 20
"""So much of such answers may wait for their clients to read, or an eighth of `--max-memory-mb`, if that is less; those
that come then leave in parts."""

_VALUE_BYTES = 12
"""Of a number of an answer in JSON, about."""


class Leaving:
    """The large answers of a server that are leaving. Methods are called on the event loop."""

    def __init__(self, budget: MemoryBudget) -> None:
        """None yet.

        Args:
            budget: What requests and connections may hold.
        """
        self._budget = budget
        self._waiting_bytes = 0

    async def begin(self, large: Large, aside: Aside, in_chunks: bool) -> tuple[bytes, Iterator[bytes] | None]:
        """Encodes an answer, or its beginning.

        Args:
            large: The answer.
            aside: Calls a function on a helper thread.
            in_chunks: Whether the client takes an answer whose length is not known when it begins to leave.

        Returns:
            What leaves first, and what makes the rest; None: that is all.
        """
        about_bytes = _VALUE_BYTES * large.values
        room_bytes = min(ALL_BYTES, self._budget.limit_bytes // 8) - self._waiting_bytes
        if not in_chunks or about_bytes <= min(WHOLE_BYTES, room_bytes):
            return await aside(encode_in_parts, large), None
        rest = parts(large)
        return await aside(next, rest), rest

    async def send_whole(self, data: bytes, send: Send, caller: Caller) -> None:
        """Sends an answer, and waits until its client has read most of it.

        Args:
            data: The answer.
            send: Takes messages of ASGI.
            caller: Who reads.

        Raises:
            CallerLeft: The client has left.
        """
        self._waiting_bytes += len(data)
        try:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._waiting_bytes -= len(data)
        if caller.gone:
            raise CallerLeft

    @staticmethod
    async def send_parts(part: bytes, rest: Iterator[bytes], aside: Aside, send: Send, caller: Caller) -> None:
        """Sends an answer in parts, each as soon as its client has read most of those before.

        Args:
            part: The first one.
            rest: Makes the others.
            aside: Calls a function on a helper thread.
            send: Takes messages of ASGI.
            caller: Who reads.

        Raises:
            CallerLeft: The client has left.
        """
        while part:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            if caller.gone:
                raise CallerLeft
            part = await aside(next, rest, b"")
        await send({"type": "http.response.body", "body": b""})
