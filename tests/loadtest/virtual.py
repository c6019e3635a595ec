"""Simulated time, and a simulated server: hours of load take a second, and give the same numbers on every machine."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from loadtest.openloop.client import Prepared
from loadtest.openloop.engine import Outcome
from loadtest.openloop.generator import Generator
from loadtest.openloop.http import Answer
from loadtest.openloop.options import Settings
from loadtest.openloop.plan import arrivals_of
from loadtest.tasks import Traits

REQUEST = Prepared(b"", 1)


class VirtualClock:
    """A clock that jumps to the next event."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(when_s, self.now_s), next(self._numbers), function))

    def alarm(self, ring: Callable[[], None]) -> VirtualAlarm:
        return VirtualAlarm(self, ring)

    def run(self) -> None:
        while self._events:
            self.now_s, _, function = heapq.heappop(self._events)
            function()


class VirtualAlarm:
    def __init__(self, clock: VirtualClock, ring: Callable[[], None]) -> None:
        self._clock, self._ring = clock, ring

    def set(self, when_s: float) -> None:
        self._clock.call_at(when_s, self._ring)

    def close(self) -> None:
        pass


class QueueServer:
    """Answers one request after another, each in the same time, on some workers; it may stand still for a while.

    Args:
        clock: Simulated.
        service_s: How long a request takes.
        workers: How many are answered at a time.
        pause_s: How long it stands still each time.
        every_s: How often, from the start; 0 for never.
        full: With so many requests waiting, one more is refused with status 429; 0 for never.
    """

    def __init__(
        self,
        clock: VirtualClock,
        service_s: float,
        *,
        workers: int = 1,
        pause_s: float = 0.0,
        every_s: float = 0.0,
        full: int = 0,
    ) -> None:
        self._clock, self._service_s = clock, service_s
        self._free_s = [clock.time()] * workers
        self._pause_s, self._every_s, self._start_s = pause_s, every_s, clock.time()
        self._full, self._waiting = full, 0

    def send(self, request: Prepared, done: Callable[[Answer], None]) -> None:
        now_s = self._clock.time()
        if self._full and self._waiting >= self._full:
            done(Answer(now_s, 429))
            return
        begin_s = max(now_s, heapq.heappop(self._free_s))
        if self._every_s and (into_s := (begin_s - self._start_s) % self._every_s) < self._pause_s:
            begin_s += self._pause_s - into_s
        end_s = begin_s + self._service_s
        heapq.heappush(self._free_s, end_s)
        self._waiting += 1

        def answer() -> None:
            self._waiting -= 1
            done(Answer(self._clock.time(), 200, stages={"infer": 1e3 * self._service_s}))

        self._clock.call_at(end_s, answer)


def run_virtually(settings: Settings, **server: float) -> Outcome:
    """An open run against a simulated server."""
    clock = VirtualClock()
    service_s = server.pop("service_s")
    generator = Generator(
        clock=clock,
        client=QueueServer(clock, service_s, **server),  # type: ignore[arg-type]
        arrivals=arrivals_of(settings),
        pick=lambda: REQUEST,
        validate=lambda content, texts: 3,
        warm_up_s=settings.warm_up_s,
    )
    generator.start()
    clock.run()
    assert generator.done
    return Outcome(generator.record)


class VirtualTeam:
    """Makes loads in simulated time, as `Team` does in real time."""

    def __init__(self, **server: float) -> None:
        self.server = server
        self.rates: list[float] = []

    async def run(self, settings: Settings, traits: Traits) -> Outcome:
        self.rates.append(settings.rate)
        return run_virtually(settings, **self.server)


def closed_loop(users: int, duration_s: float, **server: float) -> list[float]:
    """Latencies in milliseconds of users that each wait for their answer, as Locust's do."""
    clock = VirtualClock()
    queue = QueueServer(clock, server.pop("service_s"), **server)  # type: ignore[arg-type]
    end_s = clock.time() + duration_s
    found: list[float] = []

    def send() -> None:
        sent_s = clock.time()
        if sent_s < end_s:
            queue.send(REQUEST, lambda answer: (found.append(1e3 * (answer.received_s - sent_s)), send())[0])

    for _ in range(users):
        send()
    clock.run()
    return found
