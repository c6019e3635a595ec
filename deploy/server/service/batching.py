"""From requests to batches and back: one queue, one engine thread, a token budget.

The event loop puts a `Work` (the texts of one request) into the queue; the engine thread takes what is there, as many
texts as the token budget allows, and runs them; it never waits for more while it is idle. `admission` says who comes
first. Results go back with one wake-up of the event loop per batch, not per request.

A batch takes about `max_batch_s`, by the measured speed, and a part of that while tiny requests would wait for it: on a
small machine the token budget alone would hold a small request up for a second, and larger batches are hardly faster
(MiniLM on 2 cores of Zen 1: 2,979 tokens/s in batches of 256 tokens, 3,019 of 2,048; int8 3,554 and 3,749).

State is split so that no lock is needed: the queue is the only thing that both threads write; what waits (`admission`)
belongs to the event loop, the lines belong to the engine thread. A request that was given up is only marked; the
engine thread drops what is left of it when its turn comes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Any

from ...tasks import Ids
from ..errors import ApiError
from ..limits.callers import Caller, CallerLeft
from .admission import LINES, Admission, too_late
from .engine import Engine
from .work import Item, Work

__all__ = ["Batcher"]

log = logging.getLogger("deploy.server")


REST_AFTER_S = 5.0
"""So long after its last batch an engine frees what it keeps for the next one."""

_TINY_MEMORY = 20
"""For so many batches after a tiny request, more are expected."""


class Batcher:
    """The queue and the engine thread.

    Methods are called on the event loop, except `_main` and what it calls.

    Attributes:
        max_batch_texts: Most texts of a batch.
        admission: The requests that wait or run, and who may join them.
        running: Whether the engine is loaded and takes work.
        failure: Why the engine could not be loaded, or why its thread ended; None while all is well.
        cancel_load: Ends loading early if that can be done; then it raises `variants.LoadCancelled`.
        on_batch: Called on the event loop with the texts of every batch, their tokens, and those of the longest.
        on_death: Called on the event loop when the engine thread has ended by itself; `failure` says why.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        max_batch_tokens: int,
        max_queue_tokens: int,
        on_batch: Callable[[int, int, int], None] = lambda texts, tokens, longest: None,
        *,
        max_queue_s: float = math.inf,
        max_batch_s: float = math.inf,
        max_batch_texts: int | None = None,
    ) -> None:
        """Prepares, without starting a thread.

        Args:
            load: Makes the engine; called on the engine thread.
            max_batch_tokens: Token budget of a batch, in the unit of `Engine.cost`; a single text may exceed it.
            max_queue_tokens: Most that may wait or run, in the same unit.
            on_batch: Called on the event loop with the texts of every batch, their tokens, and those of the longest.
            max_queue_s: How long a request may wait; see `admission`.
            max_batch_s: How long a batch may take, by the speed of those before; a single text may take longer.
            max_batch_texts: Most texts of a batch; None: as the tokens allow.
        """
        self.max_batch_texts = sys.maxsize if max_batch_texts is None else max_batch_texts
        self.admission = Admission(max_batch_tokens, max_queue_tokens, max_queue_s, max_batch_s)
        self.running = False
        self.failure: BaseException | None = None
        self._load = load
        self.cancel_load: Callable[[], None] = lambda: None
        self.on_batch = on_batch
        self.on_death: Callable[[], None] = lambda: None
        self._engine: Engine | None = None
        self._inbox: SimpleQueue[Work | None] = SimpleQueue()
        self._lines: tuple[deque[Work], ...] = tuple(deque() for _ in range(LINES))
        self._stood = [False] * LINES
        self._full = False
        self._since_tiny = _TINY_MEMORY
        self._turn_costs = [0] * LINES
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

    @property
    def queued_tokens(self) -> int:
        """What the texts that wait or run take, in the unit of the token budget."""
        return self.admission.queued_cost

    @property
    def predicted_wait_s(self) -> float:
        """How long what waits or runs will take, by the measured speed; 0.0 while none is known."""
        return self.admission.predicted_wait_s

    def line_of(self, ids: Iterable[Ids]) -> int:
        """In which line texts would stand that make a request; see `admission`."""
        if self._engine is None:
            return 0
        costs = [self._engine.cost(text) for text in ids]
        return self.admission.line_of(sum(costs), len(costs))

    def submit(self, work: Work) -> None:
        """Queues the texts of a request; `work.future` will be done with its results.

        Raises:
            ApiError: It would wait too long (429, 504), or could never run (413), or the engine has stopped (500).
        """
        if not self.running:
            raise self._stopped()
        assert self._engine is not None
        work.costs = [self._engine.cost(text) for text in work.ids]
        work.waiting = sum(work.costs)
        work.submitted_s = time.perf_counter()
        if work.deadline_s is not None and work.deadline_s <= work.submitted_s:
            raise too_late("the texts have waited to be tokenised")
        self.admission.admit(work)
        if work.deadline_s is not None:
            timer = work.future.get_loop().call_later(work.deadline_s - work.submitted_s, self._expire, work)
            work.future.add_done_callback(lambda future: timer.cancel())
        self._inbox.put(work)

    def _expire(self, work: Work) -> None:
        """Ends a request that is not answered by its deadline."""
        self._fail(work, too_late("others were before it"))

    async def compute(self, work: Work, caller: Caller) -> list[Any]:
        """Computes all texts of a request; see `computing.Compute`."""
        self.submit(work)
        caller.on_leave = functools.partial(self.abandon, work)
        try:
            return await work.future
        except asyncio.CancelledError:
            if caller.gone:
                raise CallerLeft from None
            self.abandon(work)
            raise

    def try_later(self, reason: str) -> ApiError:
        """See `Admission.try_later`."""
        return self.admission.try_later(reason)

    def retry_after(self) -> str:
        """See `Admission.retry_after`."""
        return self.admission.retry_after()

    def abandon(self, work: Work) -> None:
        """Drops what is left of a request whose client has left."""
        if not work.abandoned and not work.future.done():
            work.abandoned = True
            self.admission.drop(work)
            work.future.cancel()

    async def close(self) -> None:
        """Runs what is queued, then ends the engine thread."""
        if self._thread.is_alive():
            self._inbox.put(None)
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self.running = False
        self._engine = None  # Its weights go, whoever still knows this batcher.

    def _loaded(self) -> None:
        assert self._ready is not None
        self.running = self.failure is None
        if self._ready.done():
            return
        if self.failure is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(self.failure)

    def _deliver(self, batch: list[Item]) -> None:
        """Hands the results of a batch to the requests that are complete now."""
        lengths = [len(work.ids[index]) for work, index in batch]
        self.on_batch(len(lengths), sum(lengths), max(lengths))
        for work, index in batch:
            if work.abandoned:
                continue
            if isinstance(work.results[index], Exception):
                self._fail(work, _text_error(work.places[index], work.results[index]))
                continue
            self.admission.ran(work, work.costs[index])
            work.left -= 1
            if work.left == 0 and not work.future.done():
                work.future.set_result(work.results)

    def _fail(self, work: Work, error: ApiError) -> None:
        """Ends a request with an error, and drops what is left of it."""
        if not work.abandoned and not work.future.done():
            self.admission.drop(work)
            work.abandoned = True
            work.future.set_exception(error)

    def _died(self) -> None:
        """The engine thread has ended by itself: nothing will be answered any more."""
        self.running = False
        for work in self.admission.all():
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
        try:
            while (items := self._take()) is not None:
                self._run(engine, items)
                del items  # While the thread waits for more, nothing keeps them.
        except BaseException as error:  # What ends a thread: SystemExit, lack of memory, a fault of this class.
            if self._loop.is_closed():  # Nobody is left to answer.
                return
            self.failure = error
            log.critical("the engine thread has ended, and the server with it", exc_info=error)
            self._loop.call_soon_threadsafe(self._died)

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
        costs = [0] * LINES
        for work, index in items:
            costs[work.line] += work.costs[index]
        self.admission.speed.note(costs, self._stood, seconds, self._full)
        self._loop.call_soon_threadsafe(self._deliver, items)

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

    def _wait(self) -> Work | None:
        """Waits for the next request; an engine that has nothing to do for a while rests."""
        assert self._engine is not None
        try:
            return self._inbox.get(timeout=REST_AFTER_S)
        except Empty:
            self._engine.rest()
            return self._inbox.get()

    def _take(self) -> list[Item] | None:
        """The next batch: waits only while there is nothing at all. None: the batcher was closed."""
        inbox, lines = self._inbox, self._lines
        items: list[Item] = []
        while not items:
            if not any(lines):
                if (work := self._wait()) is None:
                    return None
                lines[work.line].append(work)
            for _ in range(inbox.qsize()):
                if (work := inbox.get()) is None:
                    inbox.put(None)  # Closing: what came before is run first.
                    break
                lines[work.line].append(work)
            self._stood = [bool(line) for line in lines]
            line = self._next_line()
            self._since_tiny = 0 if lines[0] else self._since_tiny + 1
            shared = line and self._since_tiny <= _TINY_MEMORY
            budget = self.admission.shared_batch_cost if shared else self.admission.batch_cost
            spent = self._fill(items, lines[line], 0, budget)
            self._turn_costs[line] += spent
            if items:
                for shorter in range(line):
                    spent = self._fill(items, lines[shorter], spent, budget)
            self._full = 2 * spent >= budget or len(items) >= self.max_batch_texts
        return items

    def _next_line(self) -> int:
        """Whose turn it is. Some line has a request.

        A turn is as much as runs at a time of larger requests while tiny ones come, in one batch or several: then it is
        that of the lines behind.
        """
        turn = self.admission.shared_batch_cost
        first, *behind = [line for line, works in enumerate(self._lines) if works]
        while behind and self._turn_costs[first] >= turn:
            self._turn_costs[first] = 0
            first, *behind = behind
        return first

    def _fill(self, items: list[Item], line: deque[Work], spent: int, budget: int) -> int:
        """Adds texts of a line to a batch, and returns what of the budget they have spent."""
        while line:
            work = line[0]
            if work.abandoned:
                line.popleft()
                continue
            cost = work.costs[work.next]
            if items and (spent + cost > budget or len(items) >= self.max_batch_texts):
                break
            items.append((work, work.next))
            spent += cost
            work.next += 1
            work.turn_cost -= cost
            if work.next == len(work.ids):
                line.popleft()
            elif work.turn_cost <= 0:
                work.turn_cost = self.admission.max_batch_cost
                line.rotate(-1)
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
