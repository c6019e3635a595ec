"""A process of the supervisor's, and what it is given: a channel, and connections."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .channel import CONNECTION, Channel

__all__ = ["PREPARE", "WORKER", "Child"]

PREPARE = (sys.executable, "-m", "deploy.server.workers.prepare")
WORKER = (sys.executable, "-m", "deploy.server.workers.worker")

_ROOT = str(Path(__file__).resolve().parents[3])


class Child:
    """A process that was started by exec, never by fork alone.

    Attributes:
        channel: The supervisor's end.
        slot: Its place on the board; 0: none.
        index: Which of the workers it is.
        started_s: When it was started, by `time.monotonic`.
        ready_s: When it became ready; 0: it is not yet.
        retired: No connection is given to it any more: it answers what it has, and ends.
        unused: It was ended before it served: whatever its exit code is, nobody waits for an answer.
        sent: How many connections it was given.
        reason: Why it cannot serve, in its own words.
    """

    def __init__(self, command: Sequence[str], slot: int = 0, index: int = 0) -> None:
        """Starts it; its end of the channel is the last argument.

        Raises:
            OSError: The system refuses.
        """
        self.channel, self._theirs = Channel.pair()
        self.channel.sock.setblocking(False)
        self.slot = slot
        self.index = index
        self.started_s = time.monotonic()
        self.ready_s = 0.0
        self.retired = False
        self.unused = False
        self.sent = 0
        self.reason = ""
        fd = self._theirs.fileno()
        path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
        try:
            self.process = subprocess.Popen(
                [*command, str(fd)],
                stdin=subprocess.DEVNULL,
                pass_fds=[fd],
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the supervisor.
            )
        except OSError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    @property
    def open(self) -> bool:
        """Whether it can be given connections."""
        return bool(self.ready_s) and not self.retired

    def retire(self) -> None:
        """Lets it answer what it has, and end."""
        self.retired = True
        self.channel.end()

    def kill(self) -> None:
        """Ends it now."""
        self.retired = True
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def undelivered(self) -> Iterator[tuple[socket.socket, int, int]]:
        """Connections that it was given and has not taken, as they were sent; it does not take any more."""
        while True:
            try:
                message = self._theirs.receive(wait=False)
            except OSError:
                return
            if message is None:
                return
            if message.kind == CONNECTION:
                for fd in message.fds:
                    yield socket.socket(fileno=fd), message.values["number"], message.values["read_bytes"]
            else:
                message.close()

    def how_it_ended(self) -> str:
        """For the log; it has ended."""
        code = self.process.returncode
        if self.reason:
            return self.reason
        if code < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"it was ended by {names.get(-code, f'signal {-code}')}"
        return f"it exited with {code}"

    def close(self) -> None:
        """Closes both ends of the channel."""
        self.channel.close()
        self._theirs.close()
