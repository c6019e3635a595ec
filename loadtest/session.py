"""One run of the closed loop: what a process knows of it, and how it counts an answer."""

# Locust's runners carry no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, field
from typing import Any

import gevent
from locust.runners import MasterRunner

from deploy.texts import TextsError, load_texts, sample
from loadtest.measure import Collector, parse_server_timing
from loadtest.options import CannotStartError, Options
from loadtest.tasks import InvalidResponseError, Task, Traits, insert_mask

logger = logging.getLogger("loadtest")

# Messages between master and workers.
START, FINISH, FINISHED = "loadtest_start", "loadtest_finish", "loadtest_finished"

SILENCE_S = 10.0
"""A worker is lost if its master hears nothing from it for so long; heartbeats come every second."""

PAUSE_AFTER_FAILURE_S = 0.1
"""Pause of a user whose request failed without a word on how long to wait: a busy loop of failures says nothing."""


@dataclass
class Session:
    """What one process knows of the test that it runs.

    Attributes:
        runner: Locust's.
        options: This load test's.
        task: The endpoint under test.
        traits: What was learnt of the server.
        texts: What is sent.
        rng: Picks texts.
        collector: Counts of requests that count; a worker's go to the master and start again from zero.
        users: How many there are.
        starts_s: When requests began to count, on the monotonic clock; None before that.
        ends_s: When requests ceased to be sent; None before that.
        in_flight: Requests that count and have no answer yet.
        warm_up: The greenlet that waits for the end of the warm-up.
        handed_over: Whether this worker has sent its last report.
        finished_workers: Of each worker that has sent its last report, for how many seconds its requests counted.
        cpu: What part of a core each process that sent requests took meanwhile, by worker; "" is this one.
        cpu_from_s: CPU time of this process when requests began to count.
        heard_s: When the master last heard from each worker that takes part, on the monotonic clock.
        lost: Why the run is void, by worker; "" is the load test as a whole.
    """

    runner: Any
    options: Options
    task: Task
    traits: Traits
    texts: list[str]
    rng: random.Random
    collector: Collector = field(default_factory=Collector)
    users: int = 0
    starts_s: float | None = None
    ends_s: float | None = None
    in_flight: int = 0
    warm_up: gevent.Greenlet | None = None
    handed_over: bool = False
    finished_workers: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    cpu_from_s: float = 0.0
    heard_s: dict[str, float] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def counting(self) -> bool:
        """Whether a request that starts now counts."""
        return self.starts_s is not None and self.ends_s is None

    @property
    def measured_s(self) -> float:
        """For how many seconds requests that count were sent; a master's own clock is not that of its workers."""
        if windows := [seconds for seconds in self.finished_workers.values() if seconds]:
            return sum(windows) / len(windows)
        if self.starts_s is None or self.ends_s is None:
            return 0.0
        return self.ends_s - self.starts_s

    def start_counting(self) -> None:
        """Ends the warm-up. Locust's own rates, in its tables, CSV and HTML, start here too."""
        if self.starts_s is None and self.ends_s is None:
            self.runner.stats.reset_all()
            self.starts_s, self.cpu_from_s = time.monotonic(), time.process_time()
            if isinstance(self.runner, MasterRunner):
                self.runner.send_message(START)

    def stop_sending(self) -> None:
        """Ends what is measured; requests under way still count."""
        if self.ends_s is None:
            self.ends_s = time.monotonic()
            if self.starts_s is not None and not isinstance(self.runner, MasterRunner):
                self.cpu[""] = (time.process_time() - self.cpu_from_s) / max(self.ends_s - self.starts_s, 1e-9)

    def hand_over(self) -> None:
        """Ends a worker's part: sends no more, waits for answers, and gives its last report to the master."""
        self.stop_sending()
        self.wait_for_answers()
        self.runner._send_stats()
        self.runner.send_message(FINISHED, {"measured_s": self.measured_s, "cpu": self.cpu.get("", 0.0)})
        self.handed_over = True

    def is_silent(self, worker: str) -> bool:
        """Whether nothing more will come from a worker: it has quit, or was not heard of for too long."""
        return worker not in self.runner.clients or time.monotonic() - self.heard_s[worker] > SILENCE_S

    def lose(self, worker: str, reason: str) -> None:
        """Makes the run void.

        Args:
            worker: Its name, as Locust gives it.
            reason: What happened to it, such as "quit during the run".
        """
        if worker not in self.lost:
            self.lost[worker] = f"worker {worker} {reason}: its part of the load is missing; run the test again"
            logger.error("the run is void: %s", self.lost[worker])

    def look_for_saturation(self) -> None:
        """Makes the run void if a process that sends was busy all the time."""
        busiest = max(self.cpu, key=self.cpu.__getitem__, default=None)
        if busiest is not None and self.cpu[busiest] > self.options.max_cpu:
            self.lost[""] = (
                f"{f'worker {busiest}' if busiest else 'the load test'} used {self.cpu[busiest]:.2f} of a core, more "
                f"than --max-cpu {self.options.max_cpu:g}: it was the limit, not the server; use more --processes "
                "or workers"
            )
            logger.error("the run is void: %s", self.lost[""])

    def look_for_losses(self) -> None:
        """Notes workers that went while the test runs."""
        for worker in self.heard_s.keys() - self.finished_workers.keys():
            if worker not in self.runner.clients:
                self.lose(worker, "quit during the run (its own output says why)")
            elif self.is_silent(worker):
                self.lose(worker, f"was not heard of for {SILENCE_S:g} s (killed, halted, or cut off from the master)")

    def wait_for_answers(self) -> None:
        """Waits until no request that counts is under way."""
        deadline_s = time.monotonic() + self.options.request_timeout_s + 1
        while self.in_flight and time.monotonic() < deadline_s:
            gevent.sleep(0.02)
        # Answers that trickle in for ever: their users are about to be stopped.
        self.collector.errors += self.in_flight


def read_texts(options: Options, endpoint: Task, traits: Traits, rng: random.Random) -> list[str]:
    """The texts that are sent, in random order.

    Raises:
        CannotStartError: The file is missing, empty, or no text.
    """
    try:
        if options.texts:
            texts = load_texts(options.texts, limit=options.text_count)
        else:
            texts = sample(options.text_count, seed=options.seed)
    except TextsError as error:
        raise CannotStartError(str(error)) from error
    if endpoint.needs_mask and traits.mask_token is not None:
        texts = [insert_mask(text, traits.mask_token, rng) for text in texts]
    return [text[: options.max_chars] for text in texts]


def judge(response: Any, count: int, session: Session, collector: Collector) -> float:
    """Counts one answer, or the lack of one.

    Args:
        response: Locust's, within its ``with`` block.
        count: How many texts were sent.
        session: The test.
        collector: Where it counts.

    Returns:
        For how many seconds the user should pause.
    """
    latency_ms = response.request_meta["response_time"]
    if response.status_code == 429:
        collector.refused += 1
        response.failure("refused: status 429 (full)")
        return _retry_after_s(response.headers.get("retry-after"))
    if response.status_code != 200:
        collector.errors += 1
        # Status 0: no connection, or no answer in time.
        response.failure(f"status {response.status_code}" if response.status_code else f"no answer: {response.error!r}")
        return PAUSE_AFTER_FAILURE_S
    if latency_ms > 1000 * session.options.request_timeout_s:
        # The socket's timeout is between two reads; an answer that trickles in takes longer.
        collector.errors += 1
        response.failure("no answer in time")
        return 0.0
    try:
        tokens = session.task.validate(response.content, count, session.traits)
    except InvalidResponseError as error:
        collector.errors += 1
        response.failure(f"wrong answer: {error}")
        return 0.0
    collector.add_good(latency_ms, count, tokens, parse_server_timing(response.headers.get("server-timing")))
    response.success()
    return 0.0


def _retry_after_s(header: str | None) -> float:
    try:
        return min(max(float(header or ""), 0.0), 1.0)
    except ValueError:
        return PAUSE_AFTER_FAILURE_S
