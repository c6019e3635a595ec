"""What a request may cost, and the server's other settings.

A limit that is hit is told with the limit and the value that came, as 413 (one request is too large whatever the load),
422 (`truncate: false` and a text above the model's limit) or 429 (the request fits, but not now).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INLINE_CHARS", "MASKS_PER_TEXT", "MAX_TOP_K", "TOKENIZE_BACKLOG_CHARS", "TURN_CHARS", "Limits", "Settings"]

INLINE_CHARS = 4096
"""Requests with at most this many characters in all are tokenised on the event loop: about 1 ms of CPU at worst, while
handing over to a thread and back costs about 50 us and holds nobody up less. Longer ones go to a helper thread."""

TOKENIZE_BACKLOG_CHARS = 16 << 20
"""Most characters of all requests that wait for a helper thread."""

TURN_CHARS = 65_536
"""A helper thread tokenises about this many characters (15 ms) of a request before it takes the next one's."""

MASKS_PER_TEXT = 32
"""Most mask tokens in one text: each one costs a row of logits over the whole vocabulary."""

MAX_TOP_K = 100
"""Most predictions per mask token."""


@dataclass(frozen=True)
class Settings:
    """Settings of a server; the defaults are those of the command line.

    Attributes:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        threads: Threads of the engine.
        max_batch_tokens: Token budget of a batch. One text always fits.
        max_queue_tokens: Most tokens waiting or running; more is 429.
        max_body_bytes: Longest request body; checked while it is read, before it is parsed.
        max_inputs: Most texts in a request.
        max_chars: Longest text, in code points.
        request_timeout_s: A request has to arrive within this time.
        keep_alive_s: Idle connections are closed after this time.
        drain_delay_s: After SIGTERM, how long connections are still accepted while /ready answers 503.
        drain_timeout_s: After that, how long requests may take to be answered.
        measure_limit_s: Most time to measure the variants of a bundle at start; one not measured by then is left out.
        api_key: Key that inference requests have to bring, or None.
        access_log: One line per request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int = 1
    max_batch_tokens: int = 2048
    max_queue_tokens: int = 262_144
    max_body_bytes: int = 4 << 20
    max_inputs: int = 1024
    max_chars: int = 32_768
    request_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    drain_delay_s: float = 0.0
    drain_timeout_s: float = 25.0
    measure_limit_s: float = 30.0
    api_key: str | None = None
    access_log: bool = False

    @property
    def helper_threads(self) -> int:
        """Threads that tokenise long requests and read large bodies: for each 8 of the engine one, and at least 2."""
        return max(2, self.threads // 8)


@dataclass(frozen=True)
class Limits:
    """What one request of a route may cost; 0: it has no such thing.

    Attributes:
        body_bytes: Longest body.
        inputs: Most texts.
        chars: Longest text, in code points.
        masks: Most mask tokens in one text.
        ids: Most token ids, where they are taken instead of texts.
    """

    body_bytes: int = 0
    inputs: int = 0
    chars: int = 0
    masks: int = 0
    ids: int = 0

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Those of a route without a body."""
        return cls()

    @classmethod
    def of_texts(cls, settings: Settings) -> Limits:
        """Those of a route that takes texts."""
        return cls(settings.max_body_bytes, settings.max_inputs, settings.max_chars)

    @classmethod
    def of_texts_or_ids(cls, settings: Settings) -> Limits:
        """Those of a route that takes texts or token ids."""
        return cls(settings.max_body_bytes, settings.max_inputs, settings.max_chars, ids=settings.max_queue_tokens)

    @classmethod
    def of_masked_texts(cls, settings: Settings) -> Limits:
        """Those of a route that takes texts with mask tokens."""
        return cls(settings.max_body_bytes, settings.max_inputs, settings.max_chars, MASKS_PER_TEXT)
