"""Loads everything again in a process that serves alone: the models of the same options, as they are on disk now.

The new models are described, verified and loaded beside the old ones, on other threads; then they are swapped between
two requests, and the old ones answer what they have. Where anything fails, the old ones stay. With several workers the
supervisor does the same with processes (`workers/supervisor`).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from ..bundle import BundleError
from ..heap import give_back
from .access import read_api_keys, read_tls
from .app import App
from .lifecycle import Server
from .loading import Loading, begin
from .models import Model
from .process import Loaded, Process, UsageError

__all__ = ["Reloader"]

log = logging.getLogger("deploy.server")


class Reloader:
    """Loads again on SIGHUP, and when it is asked."""

    def __init__(self, arguments: argparse.Namespace, process: Process, threads: int, app: App, server: Server) -> None:
        """Does nothing before `attach`.

        Args:
            arguments: Options of the server.
            process: What is decided for this process.
            threads: Of all engines together.
            app: What answers.
            server: Its life.
        """
        self._arguments = arguments
        self._process = process
        self._threads = threads
        self._app = app
        self._server = server
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._coming: list[Loading] = []

    def attach(self) -> None:
        """Called on the event loop, when the server listens."""
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    def _hang_up(self) -> None:
        self._keep(self._loop.create_task(self._reload_for_nobody()))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload_for_nobody(self) -> None:
        try:
            await self.reload()
        except Exception as error:  # The log has it.
            log.debug("not loaded again", exc_info=error)

    def ask(self) -> Future[str]:
        """Loads again; on any thread. See `reload`."""
        return asyncio.run_coroutine_threadsafe(self.reload(), self._loop)

    async def reload(self) -> str:
        """Loads everything again, after what is going on.

        Returns:
            What is served now.

        Raises:
            NotNowError: The server starts or stops.
            Exception: Why it could not be loaded; the models of before are served on.
        """
        from .admin import NotNowError

        async with self._lock:
            if self._app.draining or not self._app.running:
                raise NotNowError("the server is shutting down" if self._app.draining else "the model is being loaded")
            try:
                return await self._swap()
            except (BundleError, UsageError) as error:
                self._tell(str(error))
                raise
            except Exception as error:  # What a library says of a file.
                self._tell(f"{type(error).__name__}: {error}")
                raise

    def _tell(self, reason: str) -> None:
        log.error("nothing was loaded again, and what was before stays: %s", " ".join(reason.split()))

    async def _swap(self) -> str:
        coming = await self._loop.run_in_executor(None, self._describe)
        models: list[Model] = []
        try:
            models = [one.model(self._app) for one in coming]
            await self._server.start(models)
        except BaseException:
            self.cancel()
            for model in models:
                if model.batcher.running:
                    self._keep(self._loop.create_task(model.retire()))
            raise
        finally:
            self._coming = []
        before = self._app.models
        self._app.admits(self._keys)
        if self._server.tls is not None and self._certificate is not None:
            self._server.tls.use(self._certificate)
        self._app.use(models)
        self._keep(self._loop.create_task(self._retire(before)))
        loaded = [one.loaded for one in coming]
        self._process.announce(loaded, again=True)
        return _told(loaded)

    def _describe(self) -> list[Loading]:
        """Describes and verifies; on another thread."""
        self._keys = read_api_keys(self._arguments)
        self._certificate = read_tls(self._arguments)
        coming = self._coming = begin(self._arguments, self._process, self._threads)
        try:
            for one in coming:
                one.begin()
            for one in coming:
                one.verified()
        except BaseException:
            self.cancel()
            raise
        return coming

    async def _retire(self, models: Sequence[Model]) -> None:
        await asyncio.gather(*(model.retire() for model in models))
        # What was there at the start is no longer looked at, and may be what has to go now.
        del models
        gc.unfreeze()
        await self._loop.run_in_executor(None, give_back)
        gc.freeze()

    def cancel(self) -> None:
        """Gives up what is being loaded."""
        for one in self._coming:
            one.cancel()


def _told(loaded: Sequence[Loaded]) -> str:
    return ", ".join(f"{one.name} ({one.task}, {one.choice.variant})" for one in loaded)
