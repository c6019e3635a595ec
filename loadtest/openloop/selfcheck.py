"""Whether the generator keeps its schedule on this machine: a run against a server that only waits.

The server is a process of its own (``python -m loadtest.openloop.selfcheck``) and answers each request with an
embedding of 384 numbers after 5 ms. Generator and server have a core each, where there are two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from loadtest.options import CannotStartError
from loadtest.tasks import Traits

from .engine import Load, Outcome
from .options import Settings

__all__ = ["check_machine", "describe_check"]

_ANSWER_S = 0.005
_NUMBERS = 384
_TEXTS = Path(__file__).with_name("generator.py")
"""Some text that is there in any case."""


class _Waiting(asyncio.Protocol):
    """Answers every POST alike, after a while."""

    def __init__(self) -> None:
        body = json.dumps({"embeddings": [[round(0.001 * number, 6) for number in range(_NUMBERS)]]}).encode()
        self._answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes a connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Takes bytes; the generator's requests have one header of this name, in this case."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            _, _, rest = bytes(self._buffer[:end]).partition(b"Content-Length: ")
            length = end + 4 + int(rest.partition(b"\r\n")[0] or 0)
            if len(self._buffer) < length:
                return
            del self._buffer[:length]
            asyncio.get_running_loop().call_later(_ANSWER_S, self._write)

    def _write(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(self._answer)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Waiting, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    # Until the one who started it closes this end of the pipe.
    await asyncio.to_thread(sys.stdin.read)
    server.close()


@contextlib.asynccontextmanager
async def _server(cpus: set[int] | None) -> AsyncIterator[str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest.openloop.selfcheck"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if cpus:
            os.sched_setaffinity(process.pid, cpus)
        port = (await asyncio.to_thread(process.stdout.readline)).strip()
        if not port.isdigit():
            raise CannotStartError("self-check: its server did not start, see above")
        yield f"http://127.0.0.1:{int(port)}"
    finally:
        process.stdin.close()
        await asyncio.to_thread(process.wait)
        process.stdout.close()


async def check_machine(rate: float, duration_s: float) -> tuple[Outcome, Settings]:
    """Runs the generator on one core of this machine.

    Args:
        rate: Arrivals per second.
        duration_s: How long; a fifth of it, 2 s at most, is warm-up.

    Returns:
        What happened, and the settings.

    Raises:
        CannotStartError: A value is out of range, or the server did not start.
    """
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    own = {max(before)} if len(before) > 1 else set()
    async with _server(before - own if own else None) as host:
        values = {"host": host, "texts": str(_TEXTS), "rate": rate, "duration_s": duration_s}
        settings = Settings.from_values({**values, "warm_up_s": min(2.0, duration_s / 5), "max_chars": 400})
        load = Load(settings, Traits("self-check"))
        try:
            if own:
                os.sched_setaffinity(0, own)
            return await load.run(), settings
        finally:
            if own:
                os.sched_setaffinity(0, before)


def describe_check(outcome: Outcome, settings: Settings, limit_ms: float) -> tuple[bool, str]:
    """Whether the schedule was kept, and a sentence that says so with numbers."""
    lag = outcome.record.lag
    p99_ms = lag.percentile(0.99)
    kept = p99_ms is not None and p99_ms <= limit_ms
    shown = "none" if p99_ms is None else f"{p99_ms:.4g} ms at p99, {lag.percentile(1.0):.4g} ms at most"
    return kept, (
        f"{settings.rate:g} arrivals/s from one core: sent {shown} after their time (limit {limit_ms:g} ms at p99), "
        f"with {outcome.cpu:.0%} of the core"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too, which ends with its parent.
    asyncio.run(_serve())
