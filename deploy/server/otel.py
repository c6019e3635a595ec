"""Spans of requests for OpenTelemetry, sent by OTLP over gRPC; imported only where `--otlp-endpoint` asks for it.

A request has four: itself, as the child of the span that its header `traceparent` names, and within it the stages
tokenize, queue and infer. They are made when the answer is sent, from the times that the metrics have, too, and sent by
a thread of the library. Its variables (`OTEL_TRACES_SAMPLER`, `OTEL_BSP_...`, `OTEL_RESOURCE_ATTRIBUTES`) hold.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

if TYPE_CHECKING:
    from .limits.callers import Caller
    from .observed import Observed

__all__ = ["Spans"]

_FAULTS = 500


class _Ids(RandomIdGenerator):
    """Ids of spans; that of a request is the one that its answer names."""

    trace_id = 0
    span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id or super().generate_trace_id()

    def generate_span_id(self) -> int:
        span_id, self.span_id = self.span_id, 0
        return span_id or super().generate_span_id()


class Spans:
    """Makes spans; methods are called on the event loop."""

    def __init__(self, endpoint: str, service_name: str, exporter: SpanExporter | None = None) -> None:
        """Starts the thread that sends.

        Args:
            endpoint: Address of a collector, such as http://localhost:4317.
            service_name: What this server is called there.
            exporter: What sends, in place of OTLP.
        """
        self._ids = _Ids()
        resource = Resource.create({SERVICE_NAME: service_name})
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("deploy.server")

    def add(self, request: Observed, method: str, status: int, caller: Caller) -> None:
        """The spans of a request that is answered now."""
        now_s, now_ns = time.perf_counter(), time.time_ns()

        def at(moment_s: float) -> int:
            return now_ns - int(1e9 * (now_s - moment_s))

        trace = request.trace
        context = None
        if trace.parent_id:
            parent = SpanContext(
                trace.trace_id, trace.parent_id, is_remote=True, trace_flags=TraceFlags(trace.flags & 1)
            )
            context = set_span_in_context(NonRecordingSpan(parent))
        self._ids.trace_id, self._ids.span_id = trace.trace_id, trace.span_id
        result = caller.result
        span = self._tracer.start_span(
            f"{method} {request.endpoint}",
            context,
            SpanKind.SERVER,
            {
                "http.request.method": method,
                "http.route": request.endpoint,
                "http.response.status_code": status,
                **({} if result is None else {"deploy.tokens": result.tokens}),
            },
            start_time=at(request.started_s),
        )
        if status >= _FAULTS:
            span.set_status(Status(StatusCode.ERROR))
        if result is not None:
            inside = set_span_in_context(span)
            begin_s = result.started_s
            for name in ("tokenize", "queue", "infer"):
                end_s = begin_s + getattr(result, f"{name}_s")
                self._tracer.start_span(name, inside, start_time=at(begin_s)).end(at(end_s))
                begin_s = end_s
        span.end(now_ns)

    def close(self) -> None:
        """Sends what is left, within some seconds."""
        self._provider.shutdown()
