"""Sends requests at their times, whether or not the server keeps up. Knows neither sockets nor asyncio.

The latency of a request begins when it was to start. A server that stalls is sent as much as before, and the requests
that wait meanwhile are counted with the time that they waited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loadtest.tasks import InvalidResponseError

from .client import Client, Prepared
from .clock import Clock
from .http import Answer
from .record import Record

__all__ = ["Generator"]

_START_S = 0.02
"""How long before the first arrival the generator is started."""

_MOST_AT_ONCE = 1000
"""Requests that are sent before answers, timeouts and interrupts have their turn."""

Validate = Callable[[bytes, int], "int | None"]


class Generator:
    """One run of one generator.

    Attributes:
        record: What happened.
        done: Whether every request was sent and answered, or given up.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        client: Client,
        arrivals: Iterator[float],
        pick: Callable[[], Prepared],
        validate: Validate,
        warm_up_s: float = 0.0,
        finished: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepares a run.

        Args:
            clock: Real or simulated.
            client: What sends.
            arrivals: Seconds from the start, ascending.
            pick: Gives the next request.
            validate: Takes the body of an answer and the number of texts; gives tokens, or raises
                `InvalidResponseError`.
            warm_up_s: Requests that are to start before that do not count.
            finished: Called once, when `done`.
        """
        self.record = Record(warm_up_s)
        self.done = False
        self._clock = clock
        self._client = client
        self._arrivals = arrivals
        self._pick = pick
        self._validate = validate
        self._finished = finished
        self._start_s = 0.0
        self._next_s: float | None = None
        self._under_way = 0
        self._alarm = clock.alarm(self._ring)

    def start(self) -> None:
        """Starts the schedule."""
        self._start_s = self._clock.time() + _START_S
        self._advance()

    def stop(self) -> None:
        """Sends nothing more; requests under way still count."""
        self._next_s = None
        self._arrivals = iter(())
        self._look_if_done()

    @property
    def sending(self) -> bool:
        """Whether a request is still to be sent."""
        return self._next_s is not None

    def elapsed_s(self) -> float:
        """Seconds since the start of the schedule."""
        return self._clock.time() - self._start_s

    def _advance(self) -> None:
        self._next_s = next(self._arrivals, None)
        if self._next_s is None:
            self._look_if_done()
        else:
            self._alarm.set(self._start_s + self._next_s)

    def _ring(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            if self._next_s is None:
                break
            lag_s = self._clock.time() - (self._start_s + self._next_s)
            if lag_s < 0:
                self._alarm.set(self._start_s + self._next_s)
                return
            intended_s = self._next_s
            self._next_s = next(self._arrivals, None)
            self._send(intended_s, lag_s)
        if self._next_s is not None:
            self._alarm.set(self._start_s + self._next_s)
        self._look_if_done()

    def _send(self, intended_s: float, lag_s: float) -> None:
        request = self._pick()
        self.record.sent(intended_s, lag_s)
        self._under_way += 1
        self._client.send(request, lambda answer: self._answered(intended_s, request.texts, answer))

    def _answered(self, intended_s: float, texts: int, answer: Answer) -> None:
        record, received_s = self.record, answer.received_s - self._start_s
        if answer.failure:
            record.failed(intended_s, received_s, answer.failure)
        elif answer.status == 429:
            record.refused(intended_s, received_s)
        elif answer.status != 200:
            record.failed(intended_s, received_s, f"status {answer.status}")
        else:
            try:
                tokens = self._validate(answer.content, texts)
            except InvalidResponseError as error:
                record.failed(intended_s, received_s, str(error))
            except Exception as error:  # A check that fails itself: the run must end nevertheless, and say so.
                record.failed(intended_s, received_s, f"cannot check the answer: {error!r}")
            else:
                record.good(intended_s, received_s, texts, answer.tokens if tokens is None else tokens, answer.stages)
        self._under_way -= 1
        self._look_if_done()

    def _look_if_done(self) -> None:
        if self._next_s is None and not self._under_way and not self.done:
            self.done = True
            self._alarm.close()
            self._finished()
