"""A worker: the server of one process, with connections and weights from its supervisor.

    python -m deploy.server.workers.worker FD

where FD is its end of a channel. The end of what comes through it means: answer what is there, and exit; so a
supervisor that dies takes its workers with it. Signals are the supervisor's affair: whoever stops a group of processes
reaches it, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from ...bundle import BundleError, Manifest
from ..cli import parse
from ..exposition import merge
from ..http.protocol import HttpProtocol
from ..lifecycle import Server
from ..limits.meters import Meters
from ..process import Loaded, Process, UsageError
from ..serving import serve
from ..variants import Choice, Selection
from .board import Board
from .channel import CONNECTION, SHORT_BYTES, Channel
from .job import CHANGED, Job, digest
from .marks import Marks
from .protocol import MarkedProtocol

if TYPE_CHECKING:
    from ...engines.open import Image
    from ..app import App
    from ..limits.bounds import Settings

__all__ = ["main"]

PUBLISH_S = 1.0
"""How old the metrics of a worker may be that others see."""


class _ChangedError(BundleError):
    """The bundle on disk is another one than the others serve."""


class _WorkerServer(Server):
    """Takes connections from the supervisor, and drains when it says so."""

    channel: Channel
    board: Board
    marks: Marks
    slot: int

    def __init__(self, app: App, settings: Settings, on_ready: Callable[[], None]) -> None:
        super().__init__(app, settings, on_ready)
        self._received = 0
        self._published_s = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Does nothing: the supervisor says when to stop."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to load, and to listen to the supervisor."""
        await super().startup(sockets)
        asyncio.get_running_loop().add_reader(self.channel.fileno(), self._receive)

    def _receive(self) -> None:
        """Takes the messages that are there."""
        for _ in range(64):
            try:
                message = self.channel.receive(wait=False, most_bytes=SHORT_BYTES)
            except BlockingIOError:
                return
            if message is None:
                self._stop_receiving()
                self._app.draining = True
                self.should_exit = True
                return
            if message.kind == CONNECTION:
                for fd in message.fds:
                    self._take(socket.socket(fileno=fd), **message.values)
            else:
                message.close()
                self._app.draining = True  # The only other thing that a supervisor says.

    def _take(self, connection: socket.socket, number: int, read_bytes: int) -> None:
        protocol: Callable[[], HttpProtocol] = self._protocol
        if number >= 0:
            protocol = partial(
                MarkedProtocol,
                self.config,
                self.server_state,
                self.lifespan.state,
                connection,
                self.marks.values,
                number,
                read_bytes,
            )
        self._enter(connection, protocol)
        self._received += 1
        self._count()

    def _count(self) -> None:
        self.board.count(self.slot, self._received, len(self.server_state.connections) + len(self._entering))

    def _stop_receiving(self) -> None:
        asyncio.get_running_loop().remove_reader(self.channel.fileno())

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s."""
        self.board.beat(self.slot)
        self._count()
        self._publish(PUBLISH_S)
        return await super().on_tick(counter)

    def _check_connections(self, settings: Settings) -> None:
        super()._check_connections(settings)
        self._publish(PUBLISH_S)  # There are no more ticks in a drain.

    def _publish(self, after_s: float) -> None:
        now_s = time.monotonic()
        if now_s - self._published_s >= after_s:
            self._published_s = now_s
            self.board.publish(self.slot, self._app.metrics.render())

    def _ended(self) -> None:
        self._publish(0.0)

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        # Where the engine has died, connections are still on their way; the supervisor gives them to another worker.
        self._stop_receiving()
        with contextlib.suppress(OSError):
            self.channel.send("leaving")


class _Worker(Process):
    """What the supervisor has decided."""

    reloads = False

    def __init__(
        self, channel: Channel, job: Job, board: Board, meters: Meters, marks: Marks, images: Sequence[int | None]
    ) -> None:
        super().__init__()
        self._marks = marks
        self._meters = meters
        self._images = images
        self._channel = channel
        self._job = job
        self._board = board

    def threads(self, asked: int | None) -> int:
        return self._job.threads

    def meters(self) -> Meters:
        return self._meters

    def check(self, place: int, manifest: Manifest) -> None:
        if digest(manifest) != self._job.models[place]["bundle"]:
            raise _ChangedError(f"{manifest.root}: the bundle has changed since it was loaded")

    def image(self, place: int, threads: Sequence[int]) -> Image | None:
        """The weights, and the model's part of the CPUs."""
        from ...engines.open import Image

        fd, cpus, pin = self._images[place], self._job.cpus, self._job.pin
        if fd is None:
            return None
        if pin and sum(threads) == len(cpus):
            start = sum(threads[:place])
            return Image(fd, cpus[start : start + threads[place]], pin)
        return Image(fd, cpus, pin and len(threads) == 1)

    def selection(self, place: int, manifest: Manifest, arguments: argparse.Namespace, threads: int) -> Selection:
        return Selection.settled(manifest, Choice(**self._job.models[place]["choice"]))

    def files_of(self, place: int, selection: Selection) -> Collection[str]:
        return () if self._images[place] is not None else selection.names

    def settings(self, settings: Settings) -> Settings:
        """Each worker has its part of what is for all requests together; the supervisor waits for `drain_delay_s`."""
        count = self._job.workers
        memory_mb, cache_mb, requests = settings.max_memory_mb, settings.cache_mb, settings.max_concurrent_requests
        return dataclasses.replace(
            settings,
            workers=count,
            threads=self._job.threads,
            max_queue_tokens=-(-settings.max_queue_tokens // count),
            max_concurrent_requests=None if requests is None else -(-requests // count),
            max_memory_mb=None if memory_mb is None else max(1, memory_mb // count),
            cache_mb=None if cache_mb is None else max(1, cache_mb // count),
            drain_delay_s=0.0,
        )

    def listen(self, settings: Settings) -> list[socket.socket]:
        return []

    def server(self, app: App, settings: Settings, on_ready: Callable[[], None]) -> Server:
        server = _WorkerServer(app, settings, on_ready)
        server.channel, server.board, server.slot = self._channel, self._board, self._job.slot
        server.marks = self._marks
        app.metrics.gather = lambda own: merge([own, *self._board.texts(without=self._job.slot)])
        return server

    def announce(self, loaded: Sequence[Loaded], again: bool = False) -> None:
        self._channel.send("ready", {"isas": [one.isa for one in loaded]})


def main(fd: int) -> int:
    """Serves until the channel ends.

    Args:
        fd: Descriptor of the channel.

    Returns:
        The exit code of the server, or `CHANGED`.
    """
    gc.disable()  # As in a server that is alone; it is enabled when the engine is loaded.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel.inherited(fd)
    message = channel.receive()
    if message is None:
        return 0
    job = Job(**message.values)
    job = dataclasses.replace(job, cpus=tuple(job.cpus))
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    board, meters, marks, *others = message.fds
    arguments = parse(job.argv)
    for name, copied in zip(job.files, others, strict=False):
        setattr(arguments, name, f"/proc/self/fd/{copied}")
    left = iter(others[len(job.files) :])
    shared = [next(left) if model["shared"] else None for model in job.models]
    worker = _Worker(channel, job, Board(board), Meters(meters), Marks(marks), shared)
    try:
        return serve(arguments, worker)
    except _ChangedError as error:
        channel.send("failed", {"reason": str(error)})
        return CHANGED
    except (BundleError, UsageError) as error:
        channel.send("failed", {"reason": str(error)})
        return 2


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
