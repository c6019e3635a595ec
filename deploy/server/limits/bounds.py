"""What a request may cost, and the server's other settings.

`BOUNDS` is the table of all limits: the options' help, the OpenAPI document, the messages of errors and the table in
docs/serving.md follow it. A limit that is hit is told with the limit, the option that sets it and the value that came,
as 413 (one request is too large whatever the load), 422 (`truncate: false` and a text above the model's limit), 431
(headers) or 429 (the request fits, but not now).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "BOUNDS",
    "INLINE_CHARS",
    "INLINE_INPUTS",
    "MASKS_PER_TEXT",
    "MAX_HEADERS",
    "MAX_HEADER_BYTES",
    "MAX_PIPELINED",
    "MAX_PIPELINED_BYTES",
    "MAX_TOP_K",
    "TOKENIZE_BACKLOG_CHARS",
    "TURN_CHARS",
    "Bound",
    "Limits",
    "Settings",
    "exceeded",
]

INLINE_CHARS = 4096
"""Requests with at most this many characters in all are tokenised on the event loop: about 1 ms of CPU at worst, while
handing over to a thread and back costs about 50 us and holds nobody up less. Longer ones go to a helper thread."""

INLINE_INPUTS = 1024
"""Requests with more inputs, if only empty ones, go to a helper thread, too."""

TOKENIZE_BACKLOG_CHARS = 16 << 20
"""Most characters of a request, and of all requests that wait for a helper thread. In a request to rerank,
the query counts once for each text. Where `--max-body-bytes` is larger, one request may have as many."""

TURN_CHARS = 65_536
"""A helper thread tokenises about this many characters (15 ms) of a request before it takes the next one's."""

MASKS_PER_TEXT = 32
"""Most mask tokens in one text: each one costs a row of logits over the whole vocabulary."""

MAX_TOP_K = 100
"""Most predictions per mask token."""

MAX_HEADERS = 100
"""Most header lines of a request; clients send 5 to 10, behind proxies 30."""

MAX_HEADER_BYTES = 64 << 10
"""Longest request line and header section, and longest framing of a chunked body between two pieces of it, trailers
included; httptools itself has no bound."""

MAX_PIPELINED = 32
"""Most requests of one connection that wait behind the one that is answered."""

MAX_PIPELINED_BYTES = 256 << 10
"""How many bytes of them are read ahead."""


@dataclass(frozen=True)
class Settings:
    """Settings of a server; the defaults are those of the command line.

    Attributes:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        unix_socket: Path of a socket to listen on in place of those; None: none.
        tls: Whether clients speak TLS.
        threads: Threads of the engine.
        max_batch_tokens: Token budget of a batch. One text always fits.
        max_queue_tokens: Most tokens waiting or running; more is 429.
        max_queue_ms: How long a request may take, as predicted; one that would take longer is 429 at once.
        max_batch_ms: How long a batch may take, by the measured speed; a single text may take longer.
        max_body_bytes: Longest request body; checked while it is read, before it is parsed.
        max_inputs: Texts that clients are told to send in a request; one with more is split.
        max_chars: How much of a text is read at first, in code points; more only while it makes too few tokens.
        request_timeout_s: A request has to arrive within this time.
        keep_alive_s: Idle connections are closed after this time.
        drain_delay_s: After SIGTERM, how long connections are still accepted while /ready answers 503.
        drain_timeout_s: After that, how long requests may take to be answered.
        measure_limit_s: Most time to measure the variants of a bundle at start; one not measured by then is left out.
        api_key: Key that inference requests have to bring, or None.
        api_keys_file: File of such keys, or None.
        access_log: One line per request.
        max_values: Most numbers in one answer.
        max_memory_mb: Most memory that all connections and requests may hold, in MB; None: half of what is available
            when the model is loaded, within the limits of all control groups.
        accept_token_ids: Take token ids in place of texts.
        any_dimensions: Cut embeddings to any width that OpenAI's clients ask for, whatever the model was trained for.
        auto_truncate: Cut texts that are too long where a request does not say.
        served_model_name: Name of the model in answers; None: that of the bundle.
        max_concurrent_requests: Most requests that wait or run; None: as the tokens allow.
        tokenization_workers: Threads that tokenise long requests; None: see `helper_threads`.
        max_batch_requests: Most texts of a batch; None: as the tokens allow.
        cors_allow_origin: Origins whose pages may ask, `*` for all.
        root_path: What all paths begin with.
        response_timeout_s: A client that reads next to nothing of its answers for this time is disconnected, and one
            that was answered with an error and asks nothing more.
        cache_mb: Memory for results of texts that may be asked again, in MB; None: nothing is kept.
        otlp_endpoint: Collector that gets spans of requests, or None.
        otlp_service_name: What this server is called there.
        workers: Processes that serve together; tokens and memory are the part of this one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: str | None = None
    tls: bool = False
    threads: int = 1
    max_batch_tokens: int = 2048
    max_queue_tokens: int = 262_144
    max_queue_ms: int = 2000
    max_batch_ms: int = 100
    max_body_bytes: int = 4 << 20
    max_inputs: int = 1024
    max_chars: int = 32_768
    request_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    drain_delay_s: float = 0.0
    drain_timeout_s: float = 25.0
    measure_limit_s: float = 30.0
    api_key: str | None = None
    api_keys_file: str | None = None
    access_log: bool = False
    max_values: int = 16 << 20
    max_memory_mb: int | None = None
    response_timeout_s: float = 30.0
    accept_token_ids: bool = False
    any_dimensions: bool = False
    auto_truncate: bool = True
    served_model_name: str | None = None
    max_concurrent_requests: int | None = None
    max_batch_requests: int | None = None
    tokenization_workers: int | None = None
    cors_allow_origin: tuple[str, ...] = ()
    root_path: str = ""
    cache_mb: int | None = None
    otlp_endpoint: str | None = None
    otlp_service_name: str = "torch-ext"
    workers: int = 1

    @property
    def helper_threads(self) -> int:
        """Threads that tokenise long requests and read large bodies: for each 8 of the engine one, and at least 2."""
        return self.tokenization_workers or max(2, self.threads // 8)


@dataclass(frozen=True)
class Bound:
    """A row of the table of limits.

    Attributes:
        what: What is bounded.
        unit: What it is counted in.
        setting: Field of `Settings` that sets it; None: it is fixed.
        fixed: The limit, if it is.
        status: What a request above it is answered with; None: its connection is closed.
    """

    what: str
    unit: str
    setting: str | None = None
    fixed: int | None = None
    status: int | None = 413

    @property
    def option(self) -> str | None:
        """The option that sets it."""
        if self.setting is None:
            return None
        return "--" + self.setting.removesuffix("_s").replace("_", "-")


BOUNDS: Mapping[str, Bound] = {
    "body_bytes": Bound("a request body", "bytes", "max_body_bytes"),
    "inputs": Bound("a request", "inputs in one request", "max_queue_tokens"),
    "chars": Bound("one text of /tokenize", "characters", "max_chars"),
    "all_chars": Bound(
        "a request to the model: its texts, in pairs both", "characters in one request", fixed=TOKENIZE_BACKLOG_CHARS
    ),
    "tokens": Bound("a request, and all requests that wait", "tokens in one request", "max_queue_tokens"),
    "wait_ms": Bound("a request waits and is computed", "ms", "max_queue_ms", status=429),
    "masks": Bound("one text of fill-mask", "mask tokens in one text", fixed=MASKS_PER_TEXT, status=422),
    "top_k": Bound("fill-mask", "predictions per mask token", fixed=MAX_TOP_K, status=422),
    "values": Bound("an answer", "numbers in one answer", "max_values"),
    "memory": Bound("all connections and requests", "MB of memory for one request", "max_memory_mb"),
    "headers": Bound("headers, and trailers", "header lines", fixed=MAX_HEADERS, status=431),
    "header_bytes": Bound("headers, and trailers", "bytes of headers or trailers", fixed=MAX_HEADER_BYTES, status=431),
    "pipelined": Bound("a connection", "requests that wait behind another one", fixed=MAX_PIPELINED, status=None),
    "receive_s": Bound("a request arrives", "seconds", "request_timeout_s", status=408),
    "read_s": Bound("a client reads nothing of its answer", "seconds", "response_timeout_s", status=None),
    "idle_s": Bound("a connection is idle", "seconds", "keep_alive_s", status=None),
}
"""Every limit of the server."""


def exceeded(name: str, limit: float, found: float | None = None, where: str = "") -> str:
    """The message to a request above a limit.

    Args:
        name: Key in `BOUNDS`.
        limit: The limit.
        found: What came; None: it was not counted to its end.
        where: What the message begins with.
    """
    row = BOUNDS[name]
    setter = "this limit is fixed" if row.option is None else f"{row.option} sets this limit"
    got = "more" if found is None else str(found)
    return f"{where}expected at most {limit} {row.unit}, got {got}; {setter}"


@dataclass(frozen=True)
class Limits:
    """What one request of a route may cost; 0: it has no such thing.

    Attributes:
        body_bytes: Longest body.
        inputs: Most texts; each has a token at least.
        chars: Longest text, in code points, where it is not cut.
        masks: Most mask tokens in one text.
        ids: Most token ids, where they are taken instead of texts.
        values: Most numbers in the answer.
    """

    body_bytes: int = 0
    inputs: int = 0
    chars: int = 0
    masks: int = 0
    ids: int = 0
    values: int = 0

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Those of a route without a body."""
        return cls()

    @classmethod
    def of_texts(cls, settings: Settings) -> Limits:
        """Those of a route that takes texts."""
        return cls(settings.max_body_bytes, settings.max_queue_tokens, values=settings.max_values)

    @classmethod
    def of_texts_or_ids(cls, settings: Settings) -> Limits:
        """Those of a route that takes texts or token ids."""
        return dataclasses.replace(cls.of_texts(settings), ids=settings.max_queue_tokens)

    @classmethod
    def of_whole_texts(cls, settings: Settings) -> Limits:
        """Those of a route that takes texts and cuts none."""
        return dataclasses.replace(cls.of_texts_or_ids(settings), chars=settings.max_chars)

    @classmethod
    def of_masked_texts(cls, settings: Settings) -> Limits:
        """Those of a route that takes texts with mask tokens."""
        return dataclasses.replace(cls.of_texts(settings), masks=MASKS_PER_TEXT)
