"""What is told of an answered request: metrics, a line of the log, and spans, where they are asked for."""

from __future__ import annotations

import logging
import time
from typing import Any

from .errors import ApiError
from .http.exchange import Headers, Scope
from .limits.bounds import Settings
from .limits.callers import Caller
from .logs import ACCESS
from .metrics import Metrics
from .observed import Observed

__all__ = ["Observer"]

_access = logging.getLogger(ACCESS)
_log = logging.getLogger("deploy.server")


class Observer:
    """Tells of requests."""

    def __init__(self, settings: Settings) -> None:
        """Prepares.

        Args:
            settings: Say what is told.
        """
        self._access_log = settings.access_log
        self._spans: Any = None
        if settings.otlp_endpoint is not None:
            from .otel import Spans  # Takes 0.3 s and 20 MB, for those who ask for it.

            self._spans = Spans(settings.otlp_endpoint, settings.otlp_service_name)

    def begin(self, headers: Headers, metrics: Metrics) -> Observed:
        """A request whose headers are there; `metrics` count it until it is known which model it asks."""
        request = Observed(headers, metrics)
        if self._spans is not None or self._access_log:
            _ = request.trace  # The answer names it.
        return request

    def error(self, request: Observed, error: ApiError) -> None:
        """A request is answered with an error; faults of the server are in the log."""
        request.metrics.refused(error.kind)
        if error.kind == "internal":
            _log.error("%s failed: %s", request.endpoint, error.message, extra=_fields(trace_id=request.trace.id))

    def exception(self, request: Observed) -> None:
        """A request is answered with 500 for the exception that is being handled."""
        request.metrics.refused("internal")
        _log.exception("%s failed", request.endpoint, extra=_fields(trace_id=request.trace.id))

    def answered(self, request: Observed, scope: Scope, status: int, caller: Caller) -> None:
        """The answer is sent."""
        seconds = time.perf_counter() - request.started_s
        request.metrics.answered(request.endpoint, status, seconds, request.dialect)
        if self._access_log:
            self._tell(request, scope, status, seconds, caller)
        if self._spans is not None:
            self._spans.add(request, scope["method"], status, caller)

    def close(self) -> None:
        """Sends what is left to send."""
        if self._spans is not None:
            self._spans.close()

    @staticmethod
    def _tell(request: Observed, scope: Scope, status: int, seconds: float, caller: Caller) -> None:
        fields: dict[str, Any] = {
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "ms": round(1e3 * seconds, 3),
            "trace_id": request.trace.id,
        }
        result = caller.result
        if result is not None:
            fields["tokens"] = result.tokens
            for stage in ("tokenize", "queue", "infer"):
                fields[f"{stage}_ms"] = round(1e3 * getattr(result, f"{stage}_s"), 3)
        line = '"%s %s" %d %.3f ms'
        _access.info(line, *(fields[name] for name in ("method", "path", "status", "ms")), extra={"fields": fields})


def _fields(**fields: Any) -> dict[str, Any]:
    return {"fields": fields}
