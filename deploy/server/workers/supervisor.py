"""The first process of a server with several workers. Standard library only: it loads no model and answers nobody.

A *generation* is a bundle as it was loaded once: its packed weights, and the workers that map them. At start and on
SIGHUP the supervisor lets a process prepare one, starts its workers, and when all are ready gives them the connections;
the workers of the generation before answer what they have. If anything of that fails, the generation before stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future

from ...bundle import BundleError
from ..exposition import counted, write_rows
from ..limits.meters import Meters
from ..logs import say
from ..process import start_line
from ..variants import Choice
from .board import SUPERVISOR, Board
from .channel import Message
from .child import PREPARE, WORKER, Child
from .cpus import Plan
from .events import Events
from .front import Front
from .generation import Generation
from .job import CHANGED
from .keeper import Keeper
from .watch import LOOK_S, Watch

__all__ = ["Supervisor"]

log = logging.getLogger("deploy.server")

QUICK_S = 1.0
"""A worker that dies before it was ready for so long has died of itself, and so may the next one."""

QUICK_DEATHS = 10
"""After so many of them one after the other the server ends."""

BACKOFF_S = 0.1
MOST_BACKOFF_S = 5.0
"""How long the next one is waited with: the first time doubled with each death, up to the last."""

KILL_AFTER_S = 5.0
"""How much longer than its drain timeout a worker may take to end."""


class Supervisor:
    """Starts, replaces and ends processes, in one thread."""

    def __init__(
        self,
        listener: socket.socket,
        url: str,
        shares: Plan,
        argv: Sequence[str],
        drain_delay_s: float,
        drain_timeout_s: float,
        *,
        prepare: Sequence[str] = PREPARE,
        worker: Sequence[str] = WORKER,
    ) -> None:
        """Starts nothing yet.

        Args:
            listener: Where connections come in.
            url: The same, for the start line.
            shares: What each worker gets.
            argv: Options of the server.
            drain_delay_s: After a signal to stop, how long connections are still accepted.
            drain_timeout_s: Then, how long workers may take to answer.
            prepare: Command of the process that prepares a bundle.
            worker: Command of a worker.
        """
        self._plan = shares
        self._argv = list(argv)
        self._drain_delay_s = drain_delay_s
        self._drain_timeout_s = drain_timeout_s
        self._commands = (prepare, worker)
        self._url = url
        # Those of two generations.
        self._board = Board.make(2 * len(shares.shares))
        self._meters = Meters.make()
        self._slots = list(range(2 * len(shares.shares), 0, -1))
        self._events = Events(self._take_signal)
        self._keeper = Keeper(self._events, keep=not url.startswith("https"))
        self._front = Front(listener, self._board, self._events, self._keeper, self._open_workers)
        self._watch = Watch(self._board)
        self._children: list[Child] = []
        self._preparing: Child | None = None
        self._coming: Generation | None = None
        self._serving: Generation | None = None
        self._again = False
        self._asked: list[Future[str]] = []
        self._answered: list[Future[str]] = []
        self._stopping = False
        self._exit_code = 0
        self._quick = 0
        self._deaths = 0
        self._reloads = 0
        self._counted = b""

    def run(self) -> int:
        """Serves until a signal; the exit code: 0, or 1 if a request was not answered, or 2 if the bundle is broken."""
        self._events.catch(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
        self._events.after(LOOK_S, self._look)
        self._prepare()
        while not self._stopping or self._children:
            self._events.wait()
        self._stop_accepting()
        return self._exit_code

    def _take_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            for child in [child for child in self._children if child.process.poll() is not None]:
                self._died(child)
        elif number == signal.SIGHUP:
            self.reload()
        elif number == signal.SIGINT and self._stopping:
            self._kill_all()
        else:
            self.stop()

    def _open_workers(self) -> list[Child]:
        generation = self._serving
        return [] if generation is None else [child for child in generation.children.values() if child.open]

    # Processes.

    def _start(self, command: Sequence[str], index: int = 0, slot: int = 0) -> Child:
        child = Child(command, slot, index)
        self._children.append(child)
        self._events.watch(child.channel.sock, lambda: self._read(child))
        return child

    def _prepare(self) -> None:
        self._preparing = self._start(self._commands[0])
        values = {"argv": self._argv, "threads": self._plan.threads, "parent": os.getpid()}
        self._preparing.channel.send("prepare", values)

    def _start_worker(self, generation: Generation, index: int) -> None:
        slot = self._slots.pop()
        self._board.clear(slot)
        try:
            child = self._start(self._commands[1], index, slot)
        except OSError:
            self._slots.append(slot)
            raise
        generation.children[index] = child
        job = generation.job(self._argv, self._plan, index, slot)
        fds = [self._board.fd, self._meters, self._keeper.marks.fd, *generation.descriptors]
        with contextlib.suppress(OSError):  # It has ended already.
            child.channel.send("job", dataclasses.asdict(job), fds)

    def _read(self, child: Child) -> None:
        """Takes the messages of a process that are there."""
        while True:
            try:
                message = child.channel.receive(wait=False)
            except BlockingIOError:
                return
            if message is None:
                return
            self._hear(child, message)

    def _hear(self, child: Child, message: Message) -> None:
        if message.kind == "failed":
            child.reason = message.values["reason"]
        elif message.kind == "leaving" and not child.retired:
            child.retire()
            self._front.take_back(child)
        elif message.kind == "ready":
            child.ready_s = time.monotonic()
            self._became_ready(message.values["isas"])
        elif message.kind == "prepared" and child is self._preparing:
            self._preparing = None
            self._coming = Generation(message.values["models"], message.values["files"], list(message.fds))
            try:
                for index in range(len(self._plan.shares)):
                    self._start_worker(self._coming, index)
            except OSError as error:
                self._failed(f"no process can be started: {error}")

    def _became_ready(self, isas: Sequence[str]) -> None:
        coming = self._coming
        if coming is not None:
            children = coming.children.values()
            if len(children) == len(self._plan.shares) and all(child.open for child in children):
                self._switch(coming, isas)
        self._publish()
        if self._open_workers():
            self._front.open()

    def _switch(self, coming: Generation, isas: Sequence[str]) -> None:
        """Gives the connections to the workers of a generation that is ready."""
        before, self._serving, self._coming = self._serving, coming, None
        models = [(model["name"], model["task"]) for model in coming.models]
        choices = [Choice(**model["choice"]) for model in coming.models]
        what = start_line(self._url, models, choices, str(self._plan), isas)
        self._quick = 0
        if before is None:
            say(f"serving {what}")
            return
        self._reloads += 1
        for child in before.children.values():
            self._retire(child)
        before.close()
        say(f"reloaded, serving {what}")
        served = zip(coming.models, choices, strict=True)
        self._answer(", ".join(f"{model['name']} ({model['task']}, {choice.variant})" for model, choice in served))

    def _retire(self, child: Child) -> None:
        if child.ready_s:
            child.retire()
            self._events.after(self._drain_timeout_s + KILL_AFTER_S, lambda: self._overdue(child))
        else:
            child.kill()

    def _overdue(self, child: Child) -> None:
        if child in self._children:
            log.error("worker %d has not ended within its drain timeout, and is killed", child.pid)
            child.kill()

    def _look(self) -> None:
        for child in self._watch.look(self._open_workers()):
            log.error("worker %d hangs, and is killed", child.pid)
            child.kill()
        self._events.after(LOOK_S, self._look)

    # Ends.

    def _died(self, child: Child) -> None:
        self._read(child)
        self._children.remove(child)
        self._events.forget(child.channel.sock)
        if child.slot:
            self._counted = counted([self._counted, self._board.text(child.slot)])
            self._board.retire(child.slot, self._text())
            self._slots.append(child.slot)
        child.retired = True
        self._front.take_back(child)
        if child.slot:
            self._front.recover(child)
        child.close()
        if self._stopping:
            self._exit_code = self._exit_code or int(
                child.ready_s > 0 and not child.unused and child.process.returncode != 0
            )
        elif child is self._preparing:
            self._preparing = None
            self._failed(child.how_it_ended())
        elif self._coming is not None and self._coming.children.get(child.index) is child:
            self._failed(child.how_it_ended())
        elif self._serving is not None and self._serving.children.get(child.index) is child:
            self._replace(self._serving, child)
        if self._again and not self._busy:
            self._again = False
            self.reload()
        self._publish()

    def _failed(self, reason: str) -> None:
        """A generation cannot serve."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.close()
            for child in coming.children.values():
                child.kill()
        reason = " ".join(reason.split())
        if self._serving is None:
            say(f"python -m deploy serve: {reason}", to_errors=True)
            self._exit_code = 2
            self._stopping = True
            self._kill_all()
            return
        log.error("nothing was loaded again, and what was before stays: %s", reason)
        self._answer("", BundleError(reason))
        for index in range(len(self._plan.shares)):
            if index not in self._serving.children:
                self._start_later(self._serving, index)

    def _replace(self, generation: Generation, child: Child) -> None:
        """Starts a worker in the place of one that has died, after a while if that happens again and again."""
        del generation.children[child.index]
        self._deaths += 1
        quick = not child.ready_s or time.monotonic() - child.ready_s < QUICK_S
        self._quick = self._quick + 1 if quick else 0
        log.error("worker %d has died: %s; another one takes its place", child.pid, child.how_it_ended())
        if self._quick >= QUICK_DEATHS:
            log.critical("%d workers have died one after the other, and the server ends", self._quick)
            self._exit_code = 1
            self.stop()
        elif child.process.returncode == CHANGED:
            self.reload()
        else:
            self._start_later(generation, child.index)

    def _start_later(self, generation: Generation, index: int) -> None:
        def start() -> None:
            if self._stopping or generation is not self._serving or index in generation.children:
                return
            try:
                self._start_worker(generation, index)
            except OSError as error:
                log.error("no worker can be started: %s", error)
                self._events.after(MOST_BACKOFF_S, start)

        self._events.after(min(BACKOFF_S * 2 ** (self._quick - 1), MOST_BACKOFF_S) if self._quick else 0.0, start)

    # What is asked of it.

    @property
    def _busy(self) -> bool:
        """Whether a generation is being prepared, or one before still answers: there is room for two."""
        serving = [] if self._serving is None else self._serving.children.values()
        return len(self._children) > len(serving)

    def ask(self) -> Future[str]:
        """Loads the bundles again; on any thread. The result says what is served then, the exception why not."""
        asked: Future[str] = Future()
        self._events.call_soon(lambda: self._take(asked))
        return asked

    def _take(self, asked: Future[str]) -> None:
        if self._stopping or self._serving is None:
            from ..admin import NotNowError

            asked.set_exception(NotNowError("the server is shutting down" if self._stopping else "it is being loaded"))
            return
        self._asked.append(asked)
        self.reload()

    def _answer(self, served: str, error: Exception | None = None) -> None:
        """Tells those who have asked for what was loaded now, or was not."""
        answered, self._answered = self._answered, []
        for asked in answered:
            asked.set_result(served) if error is None else asked.set_exception(error)

    def reload(self) -> None:
        """Prepares the bundles as they are now on disk; after what is going on, if there is anything."""
        if self._stopping or self._serving is None:
            return
        if self._busy:
            self._again = True
            return
        self._answered, self._asked = self._asked, []
        try:
            self._prepare()
        except OSError as error:
            self._failed(f"no process can be started: {error}")

    def stop(self) -> None:
        """Drains."""
        if self._stopping:
            return
        self._stopping = True
        for asked in (*self._asked, *self._answered):
            asked.cancel()
        self._asked, self._answered = [], []
        serving = self._open_workers()
        for child in self._children:
            if child not in serving and not (child.ready_s and child.retired):
                child.unused = True
                child.kill()
        for child in serving:
            with contextlib.suppress(OSError):
                child.channel.send("draining")
        self._events.after(self._drain_delay_s, self._stop_accepting)

    def _stop_accepting(self) -> None:
        if not self._front.closed:
            self._front.close(self._retire_all)

    def _retire_all(self) -> None:
        for child in self._open_workers():
            self._retire(child)

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill()

    # Metrics.

    def _text(self) -> bytes:
        """The supervisor's own metrics, and what workers had counted that have ended."""
        rows = (
            ("serve_workers", "gauge", "Workers that take connections.", len(self._open_workers())),
            ("serve_worker_deaths_total", "counter", "Workers that have died and were replaced.", self._deaths),
            ("serve_reloads_total", "counter", "Bundles that were loaded again.", self._reloads),
        )
        return write_rows(rows) + self._counted

    def _publish(self) -> None:
        self._board.publish(SUPERVISOR, self._text())
