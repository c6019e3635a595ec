"""Prometheus metrics of one server.

One request costs about 6 us here: children of labelled metrics are looked up once and kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from .exposition import labelled, merge, of_process

__all__ = ["Metrics", "ModelsMetrics"]

# The time of creation of every child is a line that nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STAGE_SECONDS = (0.0001, 0.00025, 0.0005, *_SECONDS[:11])
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters and histograms; a registry of its own, so that several servers fit in one process (tests).

    Attributes:
        gather: Adds the metrics of other workers to those of this process.
    """

    CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.gather: Callable[[bytes], bytes] = lambda own: own
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._model = Gauge(
            "serve_model_info", "What is served.", ("model", "variant", "task"), registry=self._registry
        )
        self._requests = Counter(
            "serve_requests", "Answered requests.", ("endpoint", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "serve_request_seconds",
            "From the end of the request's headers to its answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        stages = Histogram(
            "serve_stage_seconds",
            "Time of inference requests by stage: tokenize, queue (until the first batch), infer (batches with a text "
            "of the request).",
            ("stage",),
            buckets=_STAGE_SECONDS,
            registry=self._registry,
        )
        self._tokenize, self._queue, self._infer = (stages.labels(name) for name in ("tokenize", "queue", "infer"))
        self._batch_texts = Histogram("serve_batch_texts", "Texts of a batch.", buckets=_TEXTS, registry=self._registry)
        self._batch_tokens = Histogram(
            "serve_batch_tokens", "Tokens of a batch.", buckets=_TOKENS, registry=self._registry
        )
        self._padding = Histogram(
            "serve_batch_padding_saved_tokens",
            "Tokens that a batch would have more if its texts were padded to the longest.",
            buckets=(0, *_TOKENS),
            registry=self._registry,
        )
        self._refused = Counter(
            "serve_refused_requests",
            "Requests answered with an error, by its kind.",
            ("reason",),
            registry=self._registry,
        )
        self._dialects = Histogram(
            "serve_dialect_seconds",
            "As serve_request_seconds, by the dialect of the answer.",
            ("dialect",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._cached = Counter(
            "serve_cache_texts",
            "Texts with --cache-mb: hit (computed before), joined (being computed for another request), computed.",
            ("result",),
            registry=self._registry,
        )
        self._cache: Gauge | None = None
        self._abandoned = Counter(
            "serve_abandoned_requests", "Requests whose client left before the answer.", registry=self._registry
        )
        self._child = functools.cache(lambda endpoint, status: self._requests.labels(endpoint, str(status)))
        self._timer = functools.cache(self._seconds.labels)
        self._dialect = functools.cache(self._dialects.labels)
        self._refusal = functools.cache(self._refused.labels)

    def gauges(
        self,
        queue_tokens: Callable[[], int],
        queue_wait_s: Callable[[], float],
        held_bytes: Callable[[], int] | None,
        ready: Callable[[], bool],
    ) -> None:
        """Registers values that are read when they are asked for; memory, which all models share, only with one."""
        Gauge(
            "serve_queue_tokens", "What waits or runs, in tokens of the budget.", registry=self._registry
        ).set_function(queue_tokens)
        Gauge(
            "serve_queue_wait_seconds",
            "How long what waits or runs will take, by the measured speed; of several workers the longest. Autoscalers "
            "read it.",
            registry=self._registry,
        ).set_function(queue_wait_s)
        if held_bytes is not None:
            Gauge(
                "serve_held_bytes",
                "Memory that requests and connections hold, of --max-memory-mb.",
                registry=self._registry,
            ).set_function(held_bytes)
        Gauge("serve_ready", "1 while /ready answers 200.", registry=self._registry).set_function(ready)

    def serves(self, model: str, variant: str, task: str) -> None:
        """Sets the labels of what is served; on any thread."""
        self._model.clear()
        self._model.labels(model=model, variant=variant, task=task).set(1)

    def answered(self, endpoint: str, status: int, seconds: float, dialect: str) -> None:
        """Counts an answer."""
        self._child(endpoint, status).inc()
        self._timer(endpoint).observe(seconds)
        self._dialect(dialect).observe(seconds)

    def refused(self, reason: str) -> None:
        """Counts a request that is answered with an error of this kind."""
        self._refusal(reason).inc()

    def stages(self, tokenize_s: float, queue_s: float, infer_s: float) -> None:
        """Adds the times of an inference request."""
        self._tokenize.observe(tokenize_s)
        self._queue.observe(queue_s)
        self._infer.observe(infer_s)

    def batch(self, texts: int, tokens: int, longest: int) -> None:
        """Counts a batch."""
        self._padding.observe(texts * longest - tokens)
        self._batch_texts.observe(texts)
        self._batch_tokens.observe(tokens)

    def cached(self, result: str, texts: int) -> None:
        """Counts texts by how the cache has answered them."""
        self._cached.labels(result).inc(texts)

    def cache(self, held_bytes: Callable[[], int]) -> None:
        """Registers what a cache holds; a model that is loaded again has another one."""
        if self._cache is None:
            self._cache = Gauge("serve_cache_bytes", "Memory of the cache, of --cache-mb.", registry=self._registry)
        self._cache.set_function(held_bytes)

    def abandoned(self) -> None:
        """Counts a request whose client has left."""
        self._abandoned.inc()

    def render(self) -> bytes:
        """What this process has counted, in Prometheus' text format."""
        return generate_latest(self._registry)

    def answer(self) -> bytes:
        """The metrics of the server: those of all its workers, if there are several."""
        return self.gather(self.render())


class ModelsMetrics:
    """The metrics of several models: each sample has the label `model`.

    Attributes:
        gather: See `Metrics`.
    """

    CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, each: Sequence[Metrics], names: Callable[[], Sequence[str]]) -> None:
        """Counts nothing itself.

        Args:
            each: The metrics of each model.
            names: Names of the models, in the same order.
        """
        self.gather: Callable[[bytes], bytes] = lambda own: own
        self._each = each
        self._names = names

    def render(self) -> bytes:
        """See `Metrics`."""
        texts = [metrics.render() for metrics in self._each]
        named = [labelled(text, name) for text, name in zip(texts, self._names(), strict=True)]
        return merge([*named, of_process(texts[0])])

    def answer(self) -> bytes:
        """See `Metrics`."""
        return self.gather(self.render())
