"""A request as it is observed: when it began, what it asks, and its place in a trace."""

from __future__ import annotations

import time

from .http.exchange import Headers
from .http.trace import TRACEPARENT, Trace, trace_of
from .metrics import Metrics

__all__ = ["Observed"]


class Observed:
    """A request that is being answered.

    Attributes:
        started_s: When its headers were there, by `time.perf_counter`.
        endpoint: Path of its route; `other`: there is none.
        dialect: Name of the dialect that its answer speaks.
        metrics: Of the model that it asks.
    """

    __slots__ = ("_headers", "_trace", "dialect", "endpoint", "metrics", "started_s")

    def __init__(self, headers: Headers, metrics: Metrics) -> None:
        self.metrics = metrics
        self.started_s = time.perf_counter()
        self.endpoint = "other"
        self.dialect = "native"
        self._headers = headers
        self._trace: Trace | None = None

    @property
    def traced(self) -> bool:
        """Whether the client has named a trace, or the log or a span has this one's."""
        return self._trace is not None or TRACEPARENT in self._headers

    @property
    def trace(self) -> Trace:
        """Its place in a trace; begun by whoever asks first."""
        if self._trace is None:
            self._trace = trace_of(self._headers)
        return self._trace
