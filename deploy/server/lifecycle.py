"""A server's life: listen, load, serve, drain, exit.

uvicorn closes idle connections at once when it is told to stop, and with them those whose next request is on its way;
it also raises the signal again after a clean stop. This server stops listening but takes what the kernel had accepted,
lets every connection finish with an answer that says `Connection: close`, and exits with 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from ..heap import give_back
from ..machine import available_memory_bytes
from .app import App
from .http.protocol import HttpProtocol
from .http.unread import forget, kept_by_system
from .limits.bounds import Settings
from .limits.budget import CONNECTION_BYTES, settle_malloc
from .models import Model
from .sockets import PAUSE_S, last_connections
from .variants import LoadCancelled

if TYPE_CHECKING:
    from .tls import Tls

__all__ = ["Server"]

log = logging.getLogger("deploy.server")

LOADING_GRACE_S = 1.0
"""How long a server that is told to stop waits for its engine to be loaded; nothing was accepted yet."""

IDLE_GRACE_S = 1.0
"""While draining, how long a connection without a request may still send one."""

RECEIVING_GRACE_S = 2.0
"""While draining, how long a request may take to arrive that has begun."""

READING_GRACE_S = 5.0
"""While draining, how long a client may read nothing of its answer."""

CLOSING_GRACE_S = 0.5
"""While draining, how long a client of TLS has to confirm the end; many that keep a connection never do."""

GC_THRESHOLDS = (10_000, 50, 50)
"""When Python's collector looks for garbage. Requests leave none, and those that wait are what it looks through: 2,000
took 100 ms, in which nobody was answered."""


class Server(uvicorn.Server):
    """uvicorn with a model that is loaded behind it, and a drain that loses nothing.

    Attributes:
        exit_code: 0, or 1 if the drain timed out or the engine ended by itself, or 2 if the model could not be loaded.
        load_error: Why the model could not be loaded, or None.
        tls: What clients are shown; None: they speak without TLS.
        on_leaving: Called when the server begins to stop.
        on_listening: Called on the event loop once, when connections are accepted.
    """

    def __init__(self, app: App, settings: Settings, on_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            loop="auto",
            lifespan="off",
            log_config=None,
            access_log=False,  # `observe` has one.
            server_header=False,
            proxy_headers=False,  # Nothing here looks at the client's address.
            timeout_keep_alive=int(settings.keep_alive_s),
        )
        super().__init__(config)
        self.exit_code = 0
        self.load_error: BaseException | None = None
        self._app = app
        self._settings = settings
        self._on_ready = on_ready
        self.tls: Tls | None = None
        self.on_leaving: Callable[[], None] = lambda: None
        self.on_listening: Callable[[], None] = lambda: None
        self._loading: asyncio.Task[None] | None = None
        self._entering: set[asyncio.Task[Any]] = set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM and SIGINT: drain; a second SIGINT exits at once."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self._app.draining = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and starts to load the model."""
        self.config.ssl = None if self.tls is None else self.tls.context
        named = [sock for sock in sockets or () if sock.family == socket.AF_UNIX]
        await super().startup([sock for sock in sockets or () if sock not in named])
        loop = asyncio.get_running_loop()
        for sock in named:
            self.servers.append(await loop.create_unix_server(self._protocol, sock=sock, ssl=self.config.ssl))
        self._loading = asyncio.get_running_loop().create_task(self._load())
        self.on_listening()

    async def _load(self) -> None:
        settled = asyncio.get_running_loop().run_in_executor(None, settle_malloc)  # While the engine thread loads.
        try:
            await self.start(self._app.models)
            await settled
        except LoadCancelled:
            return
        except BaseException as error:
            self.load_error = error
            self.exit_code = 2
            self.should_exit = True
        else:
            # What is there now stays: the collector need not look at it again. Until now, it was off. Of 35,000 objects
            # 500 are garbage, which 20 ms of collecting would free.
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            gc.enable()
            self._app.budget.settle(self._available_bytes())
            if not self.should_exit:
                self._on_ready()

    async def start(self, models: Sequence[Model]) -> None:
        """Loads models, all at once.

        Raises:
            BaseException: The first that any loading raised; all have ended then.
        """
        for model in models:
            model.batcher.on_death = self._stop_without_engine
        done = await asyncio.gather(*(model.batcher.start() for model in models), return_exceptions=True)
        for outcome in done:
            if outcome is not None:
                raise outcome
        for model in models:
            model.announce()

    def _available_bytes(self) -> int | None:
        """Memory that is available to this process; several workers share what there is."""
        available = available_memory_bytes()
        return None if available is None else available // self._settings.workers

    def _stop_without_engine(self) -> None:
        """Nothing can be answered any more: whoever started the process sees that, and starts another one."""
        self.exit_code = self.exit_code or 1
        self._app.draining = True
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s; every second closes connections whose client is too slow."""
        if counter % 10 == 0:
            self._check_connections(self._settings)
        return await super().on_tick(counter)

    @property
    def _connections(self) -> list[HttpProtocol]:
        return [found for found in list(self.server_state.connections) if isinstance(found, HttpProtocol)]

    def _check_connections(self, settings: Settings) -> None:
        now_s = time.monotonic()
        budget = self._app.budget
        held_bytes = 0
        for connection in self._connections:
            connection.check(now_s, settings)
            held_bytes += CONNECTION_BYTES + connection.unsent_bytes
        budget.hold_connections(held_bytes)
        if budget.trim_due():
            asyncio.get_running_loop().run_in_executor(None, give_back)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains: answers everything that was accepted."""
        self._app.draining = True
        self.on_leaving()
        loading = not self._app.running
        if not loading:
            await asyncio.sleep(self._settings.drain_delay_s)
        else:
            for model in self._app.models:
                model.batcher.cancel_load()
        begun_s = time.monotonic()
        deadline_s = begun_s + self._settings.drain_timeout_s
        await self._stop_listening(sockets or [])
        slowest = dataclasses.replace(
            self._settings, response_timeout_s=min(READING_GRACE_S, self._settings.response_timeout_s)
        )
        state = self.server_state
        closing_since_s: dict[HttpProtocol, float] = {}
        while (state.connections or state.tasks or self._entering) and not self.force_exit:
            now_s = time.monotonic()
            if now_s > deadline_s:
                break
            idle_too_long = now_s - begun_s > IDLE_GRACE_S or not self._app.running
            too_late = now_s - begun_s > RECEIVING_GRACE_S
            for connection in self._connections:
                if (idle_too_long and connection.idle) or (
                    too_late and connection.receiving_since_s is not None and not connection.stop_receiving()
                ):
                    connection.transport.close()
            # Of those that are being closed, these have all answers; what TLS waits for is the client's word.
            closing_since_s = {
                connection: closing_since_s.get(connection, now_s)
                for connection in self._connections
                if connection.transport.is_closing()
                and not kept_by_system(connection.transport.get_extra_info("socket"))
            }
            for connection, since_s in closing_since_s.items():
                if now_s - since_s > CLOSING_GRACE_S:
                    connection.transport.abort()
            if too_late:
                for entering in self._entering:
                    entering.cancel()
            self._check_connections(slowest)
            await asyncio.sleep(0.02)
        unanswered = len(self.server_state.tasks)
        if unanswered:
            timeout = f"within the drain timeout of {self._settings.drain_timeout_s:g} s"
            why = "before a second SIGINT" if self.force_exit else timeout
            log.error("%d requests were not answered %s", unanswered, why)
            self.exit_code = self.exit_code or 1
        for connection in self._connections:  # Whoever still waits for them ends without a word.
            connection.transport.abort()
        await asyncio.sleep(0)
        forget(asyncio.get_running_loop())
        self._ended()
        self._app.close()
        with contextlib.suppress(asyncio.TimeoutError):
            left_s = LOADING_GRACE_S if loading else max(deadline_s - time.monotonic(), 0.1)
            await asyncio.wait_for(self._close_engines(), 0.1 if self.force_exit or unanswered else left_s)
            return
        # The engine thread is in the middle of a batch, or of loading, and cannot be stopped; nobody waits for it.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # Nobody takes it any more.
                stream.flush()
        os._exit(self.exit_code or int(not loading))

    async def _close_engines(self) -> None:
        await asyncio.gather(*(model.batcher.close() for model in self._app.models))

    def _ended(self) -> None:
        """Called when the last request has been answered."""

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Closes the listening sockets, after taking the connections that the kernel has accepted."""
        twins = [sock.dup() for sock in sockets]
        for server in self.servers:
            server.close()
        for sock in sockets:
            sock.close()
        await asyncio.sleep(0)
        for connection in last_connections(twins):
            if connection is None:
                await asyncio.sleep(PAUSE_S)
            else:
                self._enter(connection, self._protocol)

    def _enter(self, connection: socket.socket, protocol: Callable[[], HttpProtocol]) -> None:
        """Serves a connection; a client of TLS that is slow to shake hands, or does not, keeps nobody waiting."""
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(protocol, connection, ssl=self.config.ssl))
        self._entering.add(task)
        task.add_done_callback(self._entered)

    def _entered(self, task: asyncio.Task[Any]) -> None:
        self._entering.discard(task)
        if not task.cancelled():
            task.exception()  # A client that has left already, or speaks no TLS.

    def _protocol(self) -> HttpProtocol:
        return HttpProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
