"""What a process that serves decides for itself when it is alone; a worker gets it from its supervisor (`workers`)."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from .sockets import listen, url_of
from .variants import Choice, Selection

if TYPE_CHECKING:
    from ..bundle import Manifest
    from ..engines.open import Image
    from .app import App
    from .lifecycle import Server
    from .limits.bounds import Settings
    from .service import Batcher

__all__ = ["Process", "UsageError", "open_listener"]


class UsageError(Exception):
    """Something the caller can put right; its message is one line."""


def open_listener(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UsageError: There can be none with this address.
    """
    try:
        return listen(host, port)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port (--port 0 "
            "takes a free one)"
        ) from error


class Process:
    """The only process of a server.

    Attributes:
        image: Packed weights to map; None: they are loaded from the bundle.
    """

    image: Image | None = None

    def __init__(self) -> None:
        self._url = ""

    def threads(self, asked: int | None) -> int:
        """Threads of the engine.

        Args:
            asked: By `--threads`.
        """
        from ..machine import usable_cpus

        return asked or usable_cpus()

    def check(self, manifest: Manifest) -> None:
        """Called with the manifest, before anything of the bundle is used."""

    def selection(self, manifest: Manifest, arguments: argparse.Namespace, threads: int) -> Selection:
        """Which variant is served."""
        return Selection(manifest, arguments.variant, threads, arguments.cache_dir)

    def files_of(self, selection: Selection) -> Collection[str]:
        """Variants whose files have to be as the manifest says."""
        return selection.names

    def settings(self, settings: Settings) -> Settings:
        """The settings of this process, from those of the server."""
        return settings

    def listen(self, settings: Settings) -> list[socket.socket]:
        """Sockets to accept connections from.

        Raises:
            UsageError: See `open_listener`.
        """
        sock = open_listener(settings.host, settings.port)
        self._url = url_of(sock)
        return [sock]

    def server(self, app: App, batcher: Batcher, settings: Settings, on_ready: Callable[[], None]) -> Server:
        """The server of this process."""
        from .lifecycle import Server

        return Server(app, batcher, settings, on_ready)

    def announce(self, manifest: Manifest, choice: Choice, threads: int, isa: str) -> None:
        """Called when everything is ready."""
        started = f"variant={choice.variant} threads={threads} isa={isa} ({choice})"
        print(f"serving {manifest.model.name} ({manifest.task}) on {self._url} {started}", flush=True)
