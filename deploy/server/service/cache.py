"""Results of texts that were computed lately, bounded by bytes; a text that is being computed is not computed again.

A key is all that a result depends on: token ids, token types and options; the variant and the task are those of the
engine that the cache belongs to. Only results are kept, never errors. What one request computes, another may wait
for: if the first one fails, is refused or is given up, the second one computes the text itself, and gets its own answer
or error. It waits for none that stands in the line of larger requests, where it would be behind more than without the
cache.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ...engines.batch import FilledIds, PairIds
from ...tasks.rows import Items
from ..limits.callers import Caller, CallerLeft
from .admission import too_late
from .batching import Batcher
from .work import Work

__all__ = ["Cache"]

Key = tuple[bytes, bytes, Any]

_ENTRY_BYTES = 512
"""What an entry takes besides its numbers."""

_OBJECT_BYTES = 64
_LARGEST_PART = 8
"""A result that takes more than this part of the cache is not kept."""


class _Flight:
    """Texts that are being computed for one request.

    Attributes:
        line: Where that request waits; see `admission`.
        results: By key; filled when it has ended, and empty if it has failed.
    """

    __slots__ = ("ended", "line", "results")

    def __init__(self, line: int, ended: asyncio.Future[None]) -> None:
        self.line = line
        self.ended = ended
        self.results: dict[Key, Any] = {}


class _Entry(NamedTuple):
    value: Any
    size_bytes: int


class Cache:
    """Computes texts that are not known yet. Methods are called on the event loop.

    Attributes:
        held_bytes: What the entries take.
        count: Told of texts: how they were answered (`hit`, `joined`, `computed`), and how many.
    """

    def __init__(self, batcher: Batcher, max_bytes: int, count: Callable[[str, int], None]) -> None:
        """An empty cache.

        Args:
            batcher: Computes.
            max_bytes: Most that entries may take.
            count: See the attributes.
        """
        self.held_bytes = 0
        self.count = count
        self._batcher = batcher
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._flights: dict[Key, _Flight] = {}

    async def compute(self, work: Work, caller: Caller) -> list[Any]:
        """Computes what is not known; see `computing.Compute`."""
        work.submitted_s = work.started_s = time.perf_counter()
        places: dict[Key, list[int]] = {}
        for index, ids in enumerate(work.ids):
            places.setdefault(_key(ids, work.options), []).append(index)
        values: dict[Key, Any] = {}
        for key in places:
            if (entry := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
                values[key] = entry.value
        self.count("hit", sum(len(places[key]) for key in values))
        first = True
        while missing := [key for key in places if key not in values]:
            line = self._batcher.line_of(work.ids[places[key][0]] for key in missing)
            flights = {key: flight for key in missing if (flight := self._joined(key, line)) is not None}
            mine = [key for key in missing if key not in flights]
            if mine:
                part = Work([work.ids[places[key][0]] for key in mine], work.options, _future(), work.deadline_s)
                part.places = [places[key][0] for key in mine]
                values |= await self._fly(mine, part, caller)
                work.started_s = part.started_s if first else work.started_s
                work.infer_s += part.infer_s
                self.count("computed", len(mine))
                first = False
            for flight in dict.fromkeys(flights.values()):
                await _wait(flight, work.deadline_s, caller)
            found = {key: flight.results[key] for key, flight in flights.items() if key in flight.results}
            self.count("joined", len(found))
            values |= found
        for key, indices in places.items():
            for index in indices:
                work.results[index] = values[key]
        return work.results

    def _joined(self, key: Key, line: int) -> _Flight | None:
        """Who computes a text that this request may wait for."""
        flight = self._flights.get(key)
        return flight if flight is not None and flight.line <= line else None

    async def _fly(self, keys: list[Key], part: Work, caller: Caller) -> dict[Key, Any]:
        """Computes texts; others may wait for them meanwhile."""
        flight = _Flight(self._batcher.line_of(part.ids), _future())
        for key in keys:
            self._flights[key] = flight
        try:
            results = await self._batcher.compute(part, caller)
            flight.results = dict(zip(keys, results, strict=True))
            for key, result in flight.results.items():
                self._keep(key, result)
            return flight.results
        finally:
            for key in keys:
                if self._flights.get(key) is flight:  # A smaller request may have begun it again.
                    del self._flights[key]
            flight.ended.set_result(None)

    def _keep(self, key: Key, result: Any) -> None:
        """Adds an entry, and drops those that nobody asked for longest."""
        value, size_bytes = _owned(result)
        size_bytes += _ENTRY_BYTES + len(key[0]) + len(key[1])
        if size_bytes > self._max_bytes // _LARGEST_PART:
            return
        before = self._entries.pop(key, None)
        self._entries[key] = _Entry(value, size_bytes)
        self.held_bytes += size_bytes - (0 if before is None else before.size_bytes)
        while self.held_bytes > self._max_bytes:
            _, entry = self._entries.popitem(last=False)
            self.held_bytes -= entry.size_bytes


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


def _key(ids: Any, options: Any) -> Key:
    if isinstance(ids, PairIds):
        return ids.ids.tobytes(), ids.types.tobytes(), options
    if isinstance(ids, FilledIds):
        return ids.ids.tobytes(), ids.attended.to_bytes(4, "little"), options  # Types take more bytes.
    return ids.tobytes(), b"", options


async def _wait(flight: _Flight, deadline_s: float | None, caller: Caller) -> None:
    """Waits until others have computed, or have failed to.

    Raises:
        ApiError: It takes longer than the client waits (504).
        CallerLeft: The client has left.
    """
    if caller.gone:
        raise CallerLeft
    ended = _future()

    def end(future: asyncio.Future[None] | None = None) -> None:
        if not ended.done():
            ended.set_result(None)

    flight.ended.add_done_callback(end)
    caller.on_leave = end
    timer = None
    if deadline_s is not None:
        timer = asyncio.get_running_loop().call_later(deadline_s - time.perf_counter(), end)
    try:
        await ended
    finally:
        flight.ended.remove_done_callback(end)
        if timer is not None:
            timer.cancel()
    if caller.gone:
        raise CallerLeft
    if not flight.ended.done():
        raise too_late("the same text of another request is being computed")


def _owned(value: Any) -> tuple[Any, int]:
    """A copy of a result that holds no memory of a whole batch, and about how many bytes it takes."""
    if isinstance(value, memoryview):
        return memoryview(value.tobytes()).cast(value.format), value.nbytes + _OBJECT_BYTES  # type: ignore[call-overload]
    if isinstance(value, Items):
        return value.owned()
    if isinstance(value, list):
        values, sizes = _all_owned(value)
        return values, sum(sizes) + _OBJECT_BYTES
    if isinstance(value, tuple):
        values, sizes = _all_owned(value)
        return tuple(values), sum(sizes) + _OBJECT_BYTES
    if isinstance(value, dict):
        values, sizes = _all_owned(value.values())
        return dict(zip(value, values, strict=True)), sum(sizes) + 4 * _OBJECT_BYTES
    return value, _OBJECT_BYTES


def _all_owned(values: Iterable[Any]) -> tuple[list[Any], list[int]]:
    pairs = [_owned(value) for value in values]
    return [value for value, _ in pairs], [size for _, size in pairs]
