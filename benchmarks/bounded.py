"""Runs a benchmark in its own process and stops a candidate that hangs.

A call into C++ cannot be interrupted from inside. The benchmark's process says through a pipe which candidate it is
about to run and how long that may take. When the time is over, the process is killed and started again without that
candidate, which is reported as too slow. A candidate that crashes the process is left out in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Guard", "Stopped", "supervise"]


@dataclass(frozen=True)
class Stopped:
    """A candidate that was stopped.

    Attributes:
        after_s: seconds that it had; it needs more.
        why: for the table.
        texts: that it did not embed in this time; 0: it bounds nothing, because the candidate crashed, say.
    """

    after_s: float
    why: str
    texts: int = 0


class Guard:
    """The benchmark's end of the pipe.

    Args:
        descriptor: of the pipe; None: nobody watches, and nothing is stopped.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._pipe = None if descriptor is None else os.fdopen(descriptor, "w", encoding="utf-8")

    @contextlib.contextmanager
    def limit(self, name: str, seconds: float, texts: int = 0) -> Iterator[None]:
        """The block runs this candidate, and this process is killed if it takes longer than so many seconds.

        Args:
            name: of the candidate.
            seconds: the limit.
            texts: that the block embeds, if a process that is killed says how slow the candidate is.
        """
        self._send({"name": name, "limit_s": seconds, "texts": texts})
        yield
        self._send({})

    def _send(self, message: dict[str, object]) -> None:
        if self._pipe is not None:
            self._pipe.write(json.dumps(message) + "\n")
            self._pipe.flush()


def supervise(command: Callable[[int, Mapping[str, Stopped]], Sequence[str]]) -> int:
    """Runs a command until it ends without being stopped.

    Args:
        command: words of the command, given the pipe's descriptor for its `Guard` and the candidates to leave out.

    Returns:
        The exit code of the last run.
    """
    stopped: dict[str, Stopped] = {}
    while True:
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(command(writing, stopped), pass_fds=(writing,))
        finally:
            os.close(writing)
        try:
            name, limit_s, texts = _watch(reading)
            if name is not None and limit_s is not None:
                stopped[name] = Stopped(limit_s, f"too slow: > {limit_s:.3g} s", texts)
                print(f"{name}: stopped after {limit_s:.3g} s; starting again without it", flush=True)
                continue
            code = process.wait()
            if name is None or code >= 0 or name in stopped:
                return code if code >= 0 else 128 - code
            stopped[name] = Stopped(0, f"ended the process by signal {-code}")
            print(f"{name}: {stopped[name].why}; starting again without it", flush=True)
        finally:
            os.close(reading)
            process.kill()
            process.wait()


def _watch(descriptor: int) -> tuple[str | None, float | None, int]:
    """Reads until the pipe is closed, or a limit is over.

    Returns:
        The candidate that was running at the end, its limit if that was over, and its number of texts.
    """
    pending = b""
    name: str | None = None
    limit_s, texts = 0.0, 0
    begun = time.monotonic()
    while True:
        left_s = None if name is None else limit_s - (time.monotonic() - begun)
        if left_s is not None and left_s <= 0:
            return name, limit_s, texts
        if not select.select([descriptor], [], [], left_s)[0]:
            continue
        read = os.read(descriptor, 1 << 16)
        if not read:
            return name, None, texts
        *lines, pending = (pending + read).split(b"\n")
        if lines:
            message = json.loads(lines[-1])
            name, begun = message.get("name"), time.monotonic()
            limit_s, texts = message.get("limit_s", 0.0), message.get("texts", 0)
