"""One generator in this process: an event loop, a schedule, connections."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loadtest.options import CannotStartError
from loadtest.tasks import TASKS, Traits

from .client import HttpClient
from .clock import LoopClock
from .generator import Generator
from .options import Settings
from .plan import arrivals_of, prepare_requests
from .presets import may_end
from .record import Record

__all__ = ["Load", "Outcome"]

_SAMPLE_S = 0.25
_SPARE_FILES = 64


@dataclass
class Outcome:
    """What one generator, or several together, did.

    Attributes:
        record: What happened to the requests.
        cpu: The part of a core that the busiest process used while it sent, or on the whole if that is more.
        waited: Requests that found no free connection and could not open one.
        peak: Most requests under way at a time.
        in_flight: Most requests under way in each second.
        workers: How many processes made the load.
        lost: Why the run is void, for each worker that was lost.
        interrupted: Whether somebody ended the run before its time.
        ended: Whether it ended itself, since its preset's rules said so.
    """

    record: Record = field(default_factory=Record)
    cpu: float = 0.0
    waited: int = 0
    peak: int = 0
    in_flight: Counter[int] = field(default_factory=Counter)
    workers: int = 1
    lost: list[str] = field(default_factory=list)
    interrupted: bool = False
    ended: bool = False

    def merge(self, other: Outcome) -> None:
        """Adds what another generator did at the same time."""
        self.record.merge(other.record)
        self.cpu = max(self.cpu, other.cpu)
        self.waited += other.waited
        self.peak += other.peak
        self.in_flight.update(other.in_flight)
        self.workers += other.workers
        self.lost += other.lost
        self.interrupted |= other.interrupted
        self.ended |= other.ended

    def to_wire(self) -> dict[str, Any]:
        """A form that JSON carries from a worker."""
        return {
            **{
                name: getattr(self, name)
                for name in ("cpu", "waited", "peak", "workers", "lost", "interrupted", "ended")
            },
            "record": self.record.to_wire(),
            "in_flight": list(self.in_flight.items()),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Outcome:
        """Reads what `to_wire` gave."""
        values = {**wire, "record": Record.from_wire(wire["record"]), "in_flight": Counter(dict(wire["in_flight"]))}
        return cls(**values)


class Load:
    """A run that is ready to start: texts are read, requests made, connections open."""

    def __init__(self, settings: Settings, traits: Traits, index: int = 0, workers: int = 1) -> None:
        """Reads texts and makes requests.

        Args:
            settings: Of the run.
            traits: What was learnt of the server.
            index: Which generator this is.
            workers: How many there are.

        Raises:
            CannotStartError: The texts cannot be read.
        """
        self.settings = settings
        self.traits = dataclasses.replace(traits)
        self.index = index
        self.workers = workers
        self.requests = prepare_requests(settings, traits, index)
        self.generator: Generator | None = None
        self.interrupted = False

    def stop(self) -> None:
        """Ends the run before its time; what is under way still counts."""
        self.interrupted = True
        if self.generator is not None:
            self.generator.stop()

    async def run(self, started: Callable[[Load], None] = lambda _: None) -> Outcome:
        """Runs to the end.

        Args:
            started: Called once the schedule runs.

        Raises:
            CannotStartError: The server cannot be reached.
        """
        settings, task = self.settings, TASKS[self.settings.task]
        loop = asyncio.get_running_loop()
        clock = LoopClock(loop)
        client = HttpClient(
            settings.host,
            clock=clock,
            max_connections=allow_connections(settings.max_connections),
            timeout_s=settings.request_timeout_s,
            trust=settings.trust(),
        )
        finished = asyncio.Event()
        rng = random.Random(f"picks/{settings.seed}/{self.index}")
        requests, traits = self.requests, self.traits
        count = len(requests)
        generator = Generator(
            clock=clock,
            client=client,
            arrivals=arrivals_of(settings, self.index, self.workers),
            pick=lambda: requests[int(rng.random() * count)],
            validate=lambda content, texts: task.validate(content, texts, traits),
            warm_up_s=settings.warm_up_s,
            finished=finished.set,
        )
        outcome = Outcome(generator.record)
        try:
            try:
                await client.start(settings.connections)
            except OSError as error:
                raise CannotStartError(f"cannot connect to {settings.host}: {error.strerror or error}") from error
            # What was made until now stays: looking through it again and again would stop the schedule.
            gc.collect()
            gc.freeze()
            wall_s, cpu_s = time.monotonic(), time.process_time()
            self.generator = generator

            def cpu() -> float:
                return (time.process_time() - cpu_s) / max(1e-9, time.monotonic() - wall_s)

            generator.start()
            started(self)
            if self.interrupted:
                generator.stop()
            while not finished.is_set():
                second = max(0, int(generator.elapsed_s()))
                outcome.in_flight[second] = max(outcome.in_flight[second], client.in_flight)
                if settings.least_s and generator.elapsed_s() >= settings.least_s and not outcome.ended:
                    outcome.ended = may_end(generator.record.collector, settings.bound_ms)
                    if outcome.ended:
                        generator.stop()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(finished.wait(), _SAMPLE_S)
                if generator.sending:
                    outcome.cpu = cpu()
            # Waiting for the last answers costs nothing: a slow server would hide a generator at its limit.
            outcome.cpu = max(outcome.cpu, cpu())
        finally:
            gc.unfreeze()
            await client.close()
        outcome.waited, outcome.peak, outcome.interrupted = client.waited, client.peak, self.interrupted
        return outcome


def allow_connections(wanted: int) -> int:
    """Raises this process's limit of open files as far as it may.

    Args:
        wanted: How many connections are wanted.

    Returns:
        How many may be open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + _SPARE_FILES:
        raised = wanted + _SPARE_FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + _SPARE_FILES)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, raised), hard))
            soft = max(soft, raised)
    return min(wanted, max(1, soft - _SPARE_FILES))
