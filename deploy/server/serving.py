"""One process that serves, by the options of `cli`.

Only the standard library is imported before the threads are settled: OpenMP reads its variables once, when torch loads.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..bundle import BundleError
from .access import open_tls, read_api_keys
from .limits.bounds import Settings
from .loading import begin
from .logs import ACCESS, start_logging
from .process import Process, open_admin, port_of, settle_threads

if TYPE_CHECKING:
    from .app import App
    from .lifecycle import Server
    from .loading import Loading

__all__ = ["Assembled", "assemble", "serve"]


def _settings(arguments: argparse.Namespace, port: int, threads: int, models: int) -> Settings:
    """The settings of the server: the options of their names, but for those that are decided here.

    Args:
        arguments: See `cli.parse`.
        port: To listen on.
        threads: Of all engines together.
        models: How many there are; each has its part of the cache.
    """
    decided: dict[str, Any] = {
        "port": port,
        "tls": arguments.tls_cert is not None,
        "threads": threads,
        "api_key": arguments.api_key or None,
        "cors_allow_origin": tuple(arguments.cors_allow_origin),
        "cache_mb": None if arguments.cache_mb is None else max(1, arguments.cache_mb // models),
        "workers": Settings.workers,  # `Process.settings` knows.
    }
    names = {field.name for field in dataclasses.fields(Settings)} - decided.keys()
    return Settings(**decided, **{name: getattr(arguments, name) for name in names})


def _reload_when_asked(arguments: argparse.Namespace, process: Process, threads: int, app: App, server: Server) -> None:
    """Lets SIGHUP, and whoever asks at `--admin-address`, load the models again.

    Raises:
        UsageError: The address cannot be used.
    """
    from .reloading import Reloader

    reloader = Reloader(arguments, process, threads, app, server)
    sock = None if arguments.admin_address is None else open_admin(arguments.admin_address)

    def listening() -> None:
        reloader.attach()
        if sock is not None:
            from .admin import Admin

            Admin(sock, reloader.ask)

    server.on_listening = listening
    server.on_leaving = reloader.cancel


class Assembled(NamedTuple):
    """A server whose engines are not loaded yet: the batchers of the application's models do it.

    Attributes:
        app: The ASGI application.
        loading: Its models.
        settings: What the options say.
        sockets: To accept connections from.
    """

    app: App
    loading: Sequence[Loading]
    settings: Settings
    sockets: list[socket.socket]


def assemble(arguments: argparse.Namespace, process: Process, threads: int) -> Assembled:
    """Reads and verifies what shall be served, and puts the application together.

    Args:
        arguments: See `cli.parse`.
        process: What is decided for this process.
        threads: Of all engines together.

    Raises:
        BundleError: A bundle cannot be served.
        UsageError: An option is wrong, or the address cannot be used.
    """
    keys = read_api_keys(arguments)
    loading = begin(arguments, process, threads)
    port = port_of(arguments.port, os.environ)
    settle_threads(threads)
    start_logging(arguments.json_output)
    for one in loading:
        one.begin()

    from .app import App

    for one in loading:
        one.verified()
    settings = process.settings(_settings(arguments, port, threads, len(loading)))
    if settings.access_log:
        logging.getLogger(ACCESS).setLevel(logging.INFO)
    sockets = process.listen(settings)
    app = App(settings)
    app.admits(keys, process.meters())
    app.use([one.model(app) for one in loading])
    return Assembled(app, loading, settings, sockets)


def serve(arguments: argparse.Namespace, process: Process) -> int:
    """Serves in this process until a signal.

    Args:
        arguments: See `cli.parse`.
        process: What is decided for this process.

    Returns:
        The exit code.

    Raises:
        BundleError: A bundle cannot be served.
        UsageError: An option is wrong, or the address cannot be used.
    """
    if process.reloads:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # Until there is something to load again.
    threads = process.threads(arguments.threads)
    tls = open_tls(arguments)
    app, loading, settings, sockets = assemble(arguments, process, threads)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # Otherwise a line for everything that is not HTTP.
    server = process.server(app, settings, lambda: process.announce([one.loaded for one in loading]))
    server.tls = tls
    if process.reloads:
        _reload_when_asked(arguments, process, threads, app, server)
    server.run(sockets=sockets)
    for number in (signal.SIGTERM, signal.SIGINT):  # All is done but to say so by the exit code.
        signal.signal(number, signal.SIG_IGN)
    if server.load_error is not None:
        if isinstance(server.load_error, BundleError):
            raise server.load_error
        raise BundleError(
            f"the model cannot be loaded: {type(server.load_error).__name__}: {server.load_error}"
        ) from server.load_error
    return server.exit_code
