"""From requests to batches and back: one queue, one engine thread, a token budget.

The event loop puts a `Work` (the texts of one request) into the queue; the engine thread takes what is there, as many
texts as the token budget allows, and runs them; it never waits for more while it is idle. A batch goes round the
requests, one text of each in turn. Small requests have a round of their own, which takes turns with that of large ones:
however many large requests there are, they delay a small one by one batch, and the batch that it is in is small, too.
Results go back with one wake-up of the event loop per batch, not per request.

State is split so that no lock is needed: the queue is the only thing that both threads write; counts of waiting tokens
belong to the event loop, the round belongs to the engine thread. A request that was given up is only marked; the engine
thread drops what is left of it when its turn comes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

from ...tasks import Ids
from ..errors import ApiError
from ..limits.bounds import exceeded

__all__ = ["Batcher", "Engine", "Item", "Work"]

log = logging.getLogger("deploy.server")


class Work:
    """The texts of one request on their way through the engine.

    Attributes:
        ids: Per text its token ids.
        options: What the engine's head needs to know; the same for all texts of the request.
        results: Per text what the engine made of it.
        small: Whether it has its place in the round of small requests.
        tokens: Tokens of all texts.
        future: Done when every text has its result.
        costs: Per text what it takes of a token budget; set when the work is queued.
        waiting: What the texts without a result take of a token budget.
        abandoned: Nobody waits any more; what did not run yet is dropped.
        submitted_s: When it was queued, by `time.perf_counter`.
        started_s: When its first batch started.
        infer_s: How long the batches took that held a text of it.
    """

    __slots__ = (
        "abandoned",
        "costs",
        "future",
        "ids",
        "infer_s",
        "left",
        "next",
        "options",
        "results",
        "small",
        "started_s",
        "submitted_s",
        "tokens",
        "waiting",
    )

    def __init__(self, ids: Sequence[Ids], options: Any, future: asyncio.Future[list[Any]]) -> None:
        self.ids = ids
        self.options = options
        self.future = future
        self.costs: list[int] = []
        self.results: list[Any] = [None] * len(ids)
        self.tokens = sum(map(len, ids))
        self.waiting = 0
        self.left = len(ids)
        self.next = 0
        self.abandoned = False
        self.small = True
        self.submitted_s = 0.0
        self.started_s = 0.0
        self.infer_s = 0.0


SMALL_PART = 4
"""A request is small if that many like it fit in a batch."""

RESERVED_PART = 8
"""This part of the queue is for small requests, while anything waits."""

Item = tuple[Work, int]
"""One text of a batch: its request and its index there."""


class Engine(Protocol):
    """Runs batches, on the engine thread."""

    def cost(self, ids: Ids) -> int:
        """What a text takes of a token budget: its tokens, or more. Called on the event loop.

        Args:
            ids: Its token ids.
        """
        ...

    def run(self, ids: Sequence[Ids], options: Sequence[Any]) -> Sequence[Any]:
        """Runs a batch.

        Args:
            ids: Per text its token ids.
            options: Per text the options of its request.

        Returns:
            Per text its result, or an exception: then the request of that text fails, and no other.
        """
        ...


class Batcher:
    """The queue and the engine thread.

    Methods are called on the event loop, except `_main` and what it calls.

    Attributes:
        queued_tokens: What the texts that wait or run take, in the unit of the token budget.
        running: Whether the engine is loaded and takes work.
        failure: Why the engine could not be loaded, or why its thread ended; None while all is well.
        cancel_load: Ends loading early if that can be done; then it raises `variants.LoadCancelled`.
        on_batch: Called on the event loop with the texts and tokens of every batch.
        on_death: Called on the event loop when the engine thread has ended by itself; `failure` says why.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        max_batch_tokens: int,
        max_queue_tokens: int,
        on_batch: Callable[[int, int], None] = lambda texts, tokens: None,
    ) -> None:
        """Prepares, without starting a thread.

        Args:
            load: Makes the engine; called on the engine thread.
            max_batch_tokens: Token budget of a batch, in the unit of `Engine.cost`; a single text may exceed it.
            max_queue_tokens: Most that may wait or run, in the same unit.
            on_batch: Called on the event loop with the texts and tokens of every batch.
        """
        self.max_batch_tokens = max_batch_tokens
        self.max_queue_tokens = max_queue_tokens
        self.queued_tokens = 0
        self.running = False
        self.failure: BaseException | None = None
        self._load = load
        self.cancel_load: Callable[[], None] = lambda: None
        self.on_batch = on_batch
        self.on_death: Callable[[], None] = lambda: None
        self._engine: Engine | None = None
        self._inbox: SimpleQueue[Work | None] = SimpleQueue()
        self._small: deque[Work] = deque()
        self._large: deque[Work] = deque()
        self._small_ran = False
        self._cost_per_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: asyncio.Future[None] | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    # Event loop.

    async def start(self) -> None:
        """Starts the engine thread and waits until the engine is loaded.

        Raises:
            BaseException: Whatever the loading raised.
        """
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._thread.start()
        await self._ready

    def submit(self, work: Work) -> None:
        """Queues the texts of a request; `work.future` will be done with its results.

        Raises:
            ApiError: The queue is full (429), or could never hold this request (413), or the engine has stopped (500).
        """
        if not self.running:
            raise self._stopped()
        assert self._engine is not None
        work.costs = [self._engine.cost(text) for text in work.ids]
        work.waiting = sum(work.costs)
        work.small = work.waiting <= self.max_batch_tokens // SMALL_PART
        reserved = 0 if work.small or not self.queued_tokens else self.max_queue_tokens // RESERVED_PART
        if self.queued_tokens + work.waiting > self.max_queue_tokens - reserved:
            if work.waiting > self.max_queue_tokens:
                added = work.waiting - work.tokens
                more = f"; masks add {added} to {work.tokens} tokens" if added else ""
                raise ApiError(
                    "too_large",
                    f"{exceeded('tokens', self.max_queue_tokens, work.waiting)}{more}; send fewer texts at a time",
                )
            raise self.try_later(f"{self.queued_tokens} tokens are waiting and the queue holds {self.max_queue_tokens}")
        self.queued_tokens += work.waiting
        work.submitted_s = time.perf_counter()
        self._inbox.put(work)

    def try_later(self, reason: str) -> ApiError:
        """The error of a request that there is no room for now, with a Retry-After from the measured speed."""
        return ApiError("queue_full", f"{reason}; try again later", {"Retry-After": self.retry_after()})

    def retry_after(self) -> str:
        """How many seconds what is queued now will take, for the header Retry-After: 1 to 60."""
        wait_s = math.ceil(self.queued_tokens / self._cost_per_s) if self._cost_per_s else 1
        return str(min(max(wait_s, 1), 60))

    def abandon(self, work: Work) -> None:
        """Drops what is left of a request whose client has left."""
        if not work.abandoned and not work.future.done():
            work.abandoned = True
            self.queued_tokens -= work.waiting
            work.waiting = 0
            work.future.cancel()

    async def close(self) -> None:
        """Runs what is queued, then ends the engine thread."""
        if self._thread.is_alive():
            self._inbox.put(None)
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self.running = False

    def _loaded(self) -> None:
        assert self._ready is not None
        self.running = self.failure is None
        if self._ready.done():
            return
        if self.failure is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(self.failure)

    def _deliver(self, batch: list[Item], seconds: float) -> None:
        """Hands the results of a batch to the requests that are complete now."""
        rate = sum(work.costs[index] for work, index in batch) / max(seconds, 1e-9)
        self._cost_per_s = rate if not self._cost_per_s else 0.9 * self._cost_per_s + 0.1 * rate
        self.on_batch(len(batch), sum(len(work.ids[index]) for work, index in batch))
        for work, index in batch:
            if work.abandoned:
                continue
            if isinstance(work.results[index], Exception):
                self._fail(work, _text_error(index, work.results[index]))
                continue
            work.waiting -= work.costs[index]
            self.queued_tokens -= work.costs[index]
            work.left -= 1
            if work.left == 0 and not work.future.done():
                work.future.set_result(work.results)

    def _fail(self, work: Work, error: ApiError) -> None:
        """Ends a request with an error, and drops what is left of it."""
        if not work.abandoned and not work.future.done():
            self.queued_tokens -= work.waiting
            work.waiting = 0
            work.abandoned = True
            work.future.set_exception(error)

    def _died(self, batch: list[Item]) -> None:
        """The engine thread has ended by itself: nothing will be answered any more."""
        self.running = False
        unfinished = [work for work, _ in batch] + [*self._small, *self._large]
        while not self._inbox.empty():
            if (work := self._inbox.get()) is not None:
                unfinished.append(work)
        for work in unfinished:
            self._fail(work, self._stopped())
        self.on_death()

    @staticmethod
    def _stopped() -> ApiError:
        return ApiError("internal", "the engine has stopped; the server's log says why")

    # Engine thread.

    def _main(self) -> None:
        assert self._loop is not None
        try:
            engine = self._engine = self._load()
        except BaseException as error:
            self.failure = error
            self._loop.call_soon_threadsafe(self._loaded)
            return
        self._loop.call_soon_threadsafe(self._loaded)
        items: list[Item] = []
        try:
            while (taken := self._take()) is not None:
                items = taken
                self._run(engine, items)
        except BaseException as error:  # What ends a thread: SystemExit, lack of memory, a fault of this class.
            if self._loop.is_closed():  # Nobody is left to answer.
                return
            self.failure = error
            log.critical("the engine thread has ended, and the server with it", exc_info=error)
            self._loop.call_soon_threadsafe(self._died, items)

    def _run(self, engine: Engine, items: list[Item]) -> None:
        """Runs a batch and hands its results to the event loop."""
        assert self._loop is not None
        started_s = time.perf_counter()
        try:
            self._call(engine, items)
        except Exception:
            tokens = sum(len(work.ids[index]) for work, index in items)
            log.exception("the engine failed on a batch of %d texts, %d tokens", len(items), tokens)
            self._call_by_request(engine, items)
        seconds = time.perf_counter() - started_s
        for work in {work for work, _ in items}:
            if work.started_s == 0.0:
                work.started_s = started_s
            work.infer_s += seconds
        self._loop.call_soon_threadsafe(self._deliver, items, seconds)

    @staticmethod
    def _call(engine: Engine, items: list[Item]) -> None:
        results = engine.run([work.ids[index] for work, index in items], [work.options for work, _ in items])
        if len(results) != len(items):
            raise RuntimeError(f"engine: expected {len(items)} results, got {len(results)}")
        for (work, index), result in zip(items, results, strict=True):
            work.results[index] = result

    def _call_by_request(self, engine: Engine, items: list[Item]) -> None:
        """Runs the requests of a batch that failed each for itself, so that only those fail that have to."""
        requests: dict[Work, list[Item]] = {}
        for item in items:
            requests.setdefault(item[0], []).append(item)
        for alone in requests.values():
            if len(requests) > 1:
                try:
                    self._call(engine, alone)
                    continue
                except Exception:
                    log.exception("the engine failed on a request of %d texts of that batch", len(alone))
            for work, index in alone:
                work.results[index] = _BatchError()

    def _take(self) -> list[Item] | None:
        """The next batch: waits only while there is nothing at all. None: the batcher was closed."""
        inbox, small, large = self._inbox, self._small, self._large
        items: list[Item] = []
        while not items:
            if not small and not large:
                if (work := inbox.get()) is None:
                    return None
                (small if work.small else large).append(work)
            for _ in range(inbox.qsize()):
                if (work := inbox.get()) is None:
                    inbox.put(None)  # Closing: what came before is run first.
                    break
                (small if work.small else large).append(work)
            spent = 0
            if not self._small_ran or not large:
                spent = self._fill(items, small, spent)
            self._small_ran = bool(items) and bool(large)
            if not items:
                spent = self._fill(items, large, spent)
                self._fill(items, small, spent)
        return items

    def _fill(self, items: list[Item], ready: deque[Work], spent: int) -> int:
        """Adds texts to a batch, one of each request in turn, and returns what of the budget they have spent."""
        while ready:
            work = ready.popleft()
            if work.abandoned:
                continue
            cost = work.costs[work.next]
            if items and spent + cost > self.max_batch_tokens:
                ready.appendleft(work)
                break
            items.append((work, work.next))
            spent += cost
            work.next += 1
            if work.next < len(work.ids):
                ready.append(work)
        return spent


class _BatchError(Exception):
    """The engine failed on a batch that held this text."""


def _text_error(index: int, error: Exception) -> ApiError:
    """The error for the client of a text on which the engine failed."""
    if isinstance(error, _BatchError):
        return ApiError("internal", "the engine failed on the batch of this request; see the server's log")
    log.error("the engine failed on a text: %s", error, exc_info=error)
    if isinstance(error, FloatingPointError):
        return ApiError("internal", f"input {index}: {error}")
    return ApiError("internal", f"input {index}: the engine failed on this text; see the server's log")
