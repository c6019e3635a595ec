"""Lines of the log: text, or a JSON object each; what a record says of a request stands in fields of its own.

A record has them by `extra={"fields": {...}}`.
"""

from __future__ import annotations

import json
import logging
import select
import sys
import time
import warnings
from typing import Any

__all__ = ["ACCESS", "log_as_json", "say", "start_logging"]

ACCESS = "deploy.access"
"""The logger with a line for each request."""

_PATIENCE_MS = 100
"""How long a line may wait for whoever reads the log."""

_PIECE_CHARS = 1024
"""A pipe that has room at all has it for so many, which are 4096 bytes at most."""

_LOST = "%d lines of the log were lost before this one: nobody read them"


class _TextFormatter(logging.Formatter):
    """A line of text, with the id of the request's trace at its end."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line of a record, without its exception; what a client has sent cannot end it, nor move the cursor."""
        line = super().formatMessage(record)
        if not line.isprintable():
            line = "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in line)
        trace_id = getattr(record, "fields", {}).get("trace_id")
        return line if trace_id is None else f"{line} trace_id={trace_id}"


class _JsonFormatter(logging.Formatter):
    """A JSON object for each record."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """The time of a record as RFC 3339 has it, in UTC: what collects logs takes others for text, or an hour off."""
        whole, thousandths = divmod(int(record.created * 1000), 1000)
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{thousandths:03d}Z"

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line = {
            "timestamp": self.formatTime(record),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _poll_of(stream: Any) -> select.poll | None:
    """Tells whether a stream takes more; None: it has no descriptor."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # Of a test, or None.
        return None
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return poll


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 has no parameter there.
    """Writes to standard error, but never waits long for a reader that has stopped: nobody would be answered meanwhile.

    Lines that are not taken are dropped, and counted; the next one that is taken comes after their number.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._lost = 0
        self._torn = False
        self._poll = _poll_of(self.stream)

    def _room(self) -> bool:
        return self._poll is None or bool(self._poll.poll(0 if self._lost else _PATIENCE_MS))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, unless nobody reads."""
        try:
            text = self.format(record) + self.terminator
            if self._lost and self._room():
                told = (self._lost,)
                lost = logging.LogRecord("deploy.server", logging.WARNING, "", 0, _LOST, told, None)
                text = self.terminator * self._torn + self.format(lost) + self.terminator + text
                self._lost, self._torn = 0, False
            for start in range(0, len(text), _PIECE_CHARS):
                if not self._room():
                    self._lost += 1
                    self._torn = self._torn or start > 0
                    return
                self.stream.write(text[start : start + _PIECE_CHARS])
                self.flush()
        except RecursionError:
            raise
        except Exception:  # As in the base class: a line of a log is nobody's error.
            self.handleError(record)


def _log_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """Takes the place of `warnings.showwarning`, which prints two lines, with the place in the code."""
    logging.getLogger("deploy.server").warning("%s", message)


def say(line: str, to_errors: bool = False) -> None:
    """Prints a line for whoever has started the server; one that nobody takes is no reason to stop serving.

    Args:
        line: What to print.
        to_errors: To standard error, in place of standard output.
    """
    stream = sys.stderr if to_errors else sys.stdout
    poll = _poll_of(stream)
    try:
        if poll is not None and not poll.poll(_PATIENCE_MS):
            raise BlockingIOError("nobody reads it")
        print(line, file=stream, flush=True)
    except (OSError, ValueError) as error:
        logging.getLogger("deploy.server").warning("a line cannot be printed (%s): %s", error, line)


def _use(formatter: logging.Formatter) -> None:
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)


def log_as_json() -> None:
    """Lets every handler of the root logger write a JSON object for each record."""
    _use(_JsonFormatter())


def start_logging(as_json: bool = False) -> None:
    """Sends the server's log to standard error, as lines of text or of JSON, Python's warnings included."""
    logging.basicConfig(level=logging.WARNING, handlers=[_Handler()])
    warnings.showwarning = _log_warning
    _use(_JsonFormatter() if as_json else _TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
