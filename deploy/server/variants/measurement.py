"""The server's side of a measurement: starts the measuring process (`measure`), reads its reports, ends it.

A variant that crashes (an instruction that the CPU lacks, no memory left) takes down that process and not the server,
which starts it again without that variant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Job", "LoadCancelled", "Measurement", "Outcome"]

log = logging.getLogger("deploy.server")

COMMAND = (sys.executable, "-m", "deploy.server.variants.measure")
"""The measuring process."""


class LoadCancelled(Exception):  # noqa: N818 - nothing went wrong
    """The server is to stop before its engine is loaded."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What the measuring process has to do.

    Attributes:
        bundle: Folder of the bundle.
        names: Candidates, in the order in which they are loaded.
        threads: Threads of the engine.
        vocab_size: Token ids are below it.
    """

    bundle: str
    names: tuple[str, ...]
    threads: int
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was measured.

    Attributes:
        texts_per_s: Speed by variant, the fastest first.
        failed: Variants that do not run here, and why.
        unmeasured: Variants that may run, and why they were not measured.
        lasting: Whether another start would find the same: nothing is left out for lack of time or memory.
    """

    texts_per_s: Mapping[str, float]
    failed: Mapping[str, str]
    unmeasured: Mapping[str, str]
    lasting: bool


class Measurement:
    """Runs the measuring process; `cancel` ends it from another thread."""

    def __init__(self, job: Job, limit_s: float, command: Sequence[str] = COMMAND) -> None:
        """Prepares, without starting a process.

        Args:
            job: What to measure.
            limit_s: Most time for all of it.
            command: The measuring process.
        """
        self._command = list(command)
        self._job = job
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False
        self._expired = False

    def cancel(self) -> None:
        """Ends the measurement at once; `run` raises. May come before `run`."""
        with self._lock:
            self._cancelled = True
            if self._process is not None:
                self._process.kill()

    def _expire(self) -> None:
        with self._lock:
            self._expired = True
            if self._process is not None:
                self._process.kill()

    def run(self) -> Outcome:
        """Measures all candidates.

        Raises:
            LoadCancelled: `cancel` was called.
        """
        names = list(self._job.names)
        failed: dict[str, str] = {}
        unmeasured: dict[str, str] = {}
        lasting = True
        speeds: dict[str, float] = {}
        timer = threading.Timer(self._limit_s, self._expire)
        timer.daemon = True
        timer.start()
        try:
            while names:
                report = self._attempt(names)
                speeds = report.speeds
                failed |= report.failed
                lasting &= report.lasting
                if report.done:
                    break
                if not self._expired and report.current is not None:
                    # It took the process down. The others may do without it.
                    failed[report.current] = _death(report.code)
                    lasting &= report.code != -signal.SIGKILL
                    names = [name for name in names if name not in failed]
                    continue
                reason = f"the measuring process failed: {_death(report.code)}"
                if self._expired:
                    reason = f"not measured within {self._limit_s:g} s"
                unmeasured = {name: reason for name in names if name not in speeds and name not in failed}
                break
        finally:
            timer.cancel()
        ranked = sorted(((name, speeds[name]) for name in speeds if name not in failed), key=lambda item: -item[1])
        return Outcome(dict(ranked), failed, unmeasured, lasting and not unmeasured)

    def _attempt(self, names: Sequence[str]) -> _Report:
        """One life of the measuring process."""
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        report = _Report()
        with self._lock:
            if self._cancelled:
                raise LoadCancelled
            if self._expired:
                return report
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    env={**os.environ, "PYTHONPATH": path},
                    start_new_session=True,  # Ctrl-C is for the server, which ends this process.
                )
            except OSError as error:
                log.warning("the measuring process cannot be started: %s", error)
                return report
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                job = dataclasses.replace(self._job, names=tuple(names))
                process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                report.read(line)
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            if not report.done:
                # The pipe closes a moment before the process ends by itself.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            process.kill()
            report.code = process.wait()
            with self._lock:
                self._process = None
        if self._cancelled:
            raise LoadCancelled
        return report


class _Report:
    """The lines of one measuring process."""

    def __init__(self) -> None:
        self.speeds: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.lasting = True
        self.current: str | None = None
        self.done = False
        self.code = 0

    def read(self, line: str) -> None:
        """Takes one line; anything that is none of ours is ignored."""
        try:
            value = json.loads(line)
        except ValueError:
            return
        if not isinstance(value, dict):
            return
        if "begin" in value:
            self.current = value["begin"]
        if "failed" in value:
            self.failed[value["failed"]] = value["reason"]
            self.lasting &= value["lasting"]
            self.current = None
        if "speeds" in value:
            self.speeds = value["speeds"]
            self.current = None
        self.done |= "done" in value


def _death(code: int) -> str:
    """How a process ended that should have gone on."""
    if code >= 0:
        return f"exit code {code} when it was run"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hints = {"SIGILL": ", an instruction that this CPU lacks", "SIGKILL": ", perhaps for lack of memory"}
    return f"ended by {name} when it was run{hints.get(name, '')}"
