"""HTTP/1.1 answers, as bytes arrive; httptools parses them."""

from __future__ import annotations

from dataclasses import dataclass, field

import httptools

from loadtest.measure import parse_server_timing

__all__ = ["Answer", "AnswerError", "Reader"]

_HEADERS_LIMIT = 65536
"""Bytes; the parser itself has no bound."""

_TEI_STAGES = {
    b"x-tokenization-time": "tokenize",
    b"x-queue-time": "queue",
    b"x-inference-time": "infer",
}
"""Headers in which text-embeddings-inference tells its times, and what this repository's server calls them."""


class AnswerError(ValueError):
    """What came is no HTTP answer; the message says what was expected."""


@dataclass
class Answer:
    """What came back for a request.

    Attributes:
        received_s: When the last byte was there, on the generator's clock.
        status: HTTP status; 0 if there was no answer.
        content: Body.
        stages: Milliseconds inside the server by stage, if it says so.
        tokens: How many tokens the server says it computed in a header, if it does.
        failure: Why there was no answer; empty if there was one.
    """

    received_s: float = 0.0
    status: int = 0
    content: bytes = b""
    stages: dict[str, float] = field(default_factory=dict)
    tokens: int | None = None
    failure: str = ""


def _number(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() else None


def _stages(headers: dict[bytes, bytes]) -> dict[str, float]:
    if (timing := headers.get(b"server-timing")) is not None:
        return parse_server_timing(timing.decode("latin-1").lower())
    found = {stage: _number(headers.get(name)) for name, stage in _TEI_STAGES.items()}
    return {stage: float(duration_ms) for stage, duration_ms in found.items() if duration_ms is not None}


class Reader:
    """Reads one answer after another from a connection that carries one request at a time.

    Attributes:
        started: Whether any byte of the current answer is there.
        keep_alive: Whether the connection can be used again after the last answer.
    """

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._headers_bytes = 0
        self._head_complete = False
        self._content: list[bytes] = []
        self._answer: Answer | None = None
        self.started = False
        self.keep_alive = True

    def feed(self, data: bytes) -> Answer | None:
        """Takes bytes.

        Returns:
            An answer that is complete, without its time, or None.

        Raises:
            AnswerError: This is not HTTP, or more than the one answer.
        """
        self.started = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            raise AnswerError(str(error.__context__)) from error
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise AnswerError(f"expected an answer of HTTP/1.1, got {data[:40]!r}: {error}") from error
        answer, self._answer = self._answer, None
        return answer

    def finish(self) -> Answer | None:
        """The connection has ended: an answer without a length is complete."""
        if self._head_complete and not self._headers.keys() & {b"content-length", b"transfer-encoding"}:
            self.on_message_complete()
        answer, self._answer = self._answer, None
        return answer

    # What httptools calls.

    def on_message_begin(self) -> None:
        """The first byte of an answer."""
        if self._answer is not None:
            raise AnswerError("expected one answer, got another behind it")
        self._headers, self._headers_bytes, self._head_complete, self._content = {}, 0, False, []

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer after a body in chunks."""
        self._headers_bytes += len(name) + len(value)
        if self._headers_bytes > _HEADERS_LIMIT:
            raise AnswerError(f"expected headers of at most {_HEADERS_LIMIT} bytes")
        if not self._head_complete:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._head_complete = True

    def on_body(self, part: bytes) -> None:
        """Some bytes of the body."""
        self._content.append(part)

    def on_message_complete(self) -> None:
        """The answer is there, unless it is one before the answer, as 100 Continue is."""
        status = self._parser.get_status_code()
        self._head_complete = False
        if status < 200:
            return
        self._answer = Answer(
            status=status,
            content=b"".join(self._content),
            stages=_stages(self._headers),
            tokens=_number(self._headers.get(b"x-compute-tokens")),
        )
        self.started = False
        self.keep_alive = self._parser.should_keep_alive()
