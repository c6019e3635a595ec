"""HTTP/1.1 answers, as bytes arrive: no more of the protocol than a server of this kind needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from loadtest.measure import parse_server_timing

__all__ = ["Answer", "AnswerError", "Reader"]

_HEAD_LIMIT = 65536

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


def _header(lowered: bytes, name: bytes) -> bytes | None:
    start = lowered.find(b"\r\n" + name + b":")
    if start < 0:
        return None
    start += len(name) + 3
    return lowered[start : lowered.find(b"\r\n", start)].strip()


def _number(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() else None


def _stages(lowered: bytes) -> dict[str, float]:
    if (timing := _header(lowered, b"server-timing")) is not None:
        return parse_server_timing(timing.decode("latin-1"))
    found = {stage: _number(_header(lowered, name)) for name, stage in _TEI_STAGES.items()}
    return {stage: float(duration_ms) for stage, duration_ms in found.items() if duration_ms is not None}


class Reader:
    """Reads one answer after another from a connection.

    Attributes:
        started: Whether any byte of the current answer is there.
        keep_alive: Whether the connection can be used again after the last answer.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._answer: Answer | None = None
        self._length: int | None = None
        self._chunked = False
        self.keep_alive = True

    @property
    def started(self) -> bool:
        """Whether any byte of the current answer is there."""
        return self._answer is not None or bool(self._buffer)

    def feed(self, data: bytes) -> Answer | None:
        """Takes bytes.

        Returns:
            An answer that is complete, without its time, or None.

        Raises:
            AnswerError: This is not HTTP.
        """
        self._buffer += data
        while self._answer is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > _HEAD_LIMIT:
                    raise AnswerError(f"expected headers of at most {_HEAD_LIMIT} bytes")
                return None
            self._read_head(bytes(self._buffer[: end + 2]))
            del self._buffer[: end + 4]
        answer = self._answer
        if self._chunked:
            content = self._read_chunks()
            if content is None:
                return None
            answer.content = content
        elif self._length is None or len(self._buffer) < self._length:
            return None
        else:
            answer.content = bytes(self._buffer[: self._length])
            del self._buffer[: self._length]
        self._answer = None
        return answer

    def finish(self) -> Answer | None:
        """The connection has ended: an answer without a length is complete."""
        answer, self._answer = self._answer, None
        if answer is None or self._chunked or self._length is not None:
            return None
        answer.content = bytes(self._buffer)
        self._buffer.clear()
        return answer

    def _read_head(self, head: bytes) -> None:
        lowered = head.lower()
        status = _number(lowered[9:12])
        if not lowered.startswith(b"http/1.") or status is None:
            raise AnswerError(f"expected an answer of HTTP/1.1, got {head[:40]!r}")
        if 100 <= status < 200:
            return
        self._chunked = b"chunked" in (_header(lowered, b"transfer-encoding") or b"")
        self._length = 0 if status in (204, 304) else _number(_header(lowered, b"content-length"))
        connection = _header(lowered, b"connection") or b""
        has_end = self._chunked or self._length is not None
        self.keep_alive = (
            has_end
            and b"close" not in connection
            and not (lowered.startswith(b"http/1.0") and b"keep-alive" not in connection)
        )
        self._answer = Answer(
            status=status, stages=_stages(lowered), tokens=_number(_header(lowered, b"x-compute-tokens"))
        )

    def _read_chunks(self) -> bytes | None:
        """The body once its last chunk is there; the buffer is left as it is before."""
        parts, position = [], 0
        while True:
            end = self._buffer.find(b"\r\n", position)
            if end < 0:
                return None
            try:
                size = int(bytes(self._buffer[position:end]).partition(b";")[0], 16)
            except ValueError as error:
                raise AnswerError(
                    f"expected the size of a chunk, got {bytes(self._buffer[position:end])[:40]!r}"
                ) from error
            position = end + 2
            if size == 0:
                break
            if len(self._buffer) < position + size + 2:
                return None
            parts.append(bytes(self._buffer[position : position + size]))
            position += size + 2
        # Trailers, if there are any, and an empty line.
        while True:
            end = self._buffer.find(b"\r\n", position)
            if end < 0:
                return None
            if end == position:
                del self._buffer[: end + 2]
                return b"".join(parts)
            position = end + 2
