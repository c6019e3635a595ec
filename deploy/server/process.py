"""What a process that serves decides for itself when it is alone; a worker gets it from its supervisor (`workers`)."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .limits.bounds import Settings
from .logs import say
from .sockets import listen, listen_unix, url_of
from .variants import Choice, Selection

if TYPE_CHECKING:
    from ..bundle import Manifest
    from ..engines.open import Image
    from .app import App
    from .lifecycle import Server
    from .limits.meters import Meters

__all__ = [
    "PORT_VARIABLE",
    "Loaded",
    "Process",
    "UsageError",
    "open_admin",
    "open_listener",
    "port_of",
    "settle_threads",
    "start_line",
    "started",
]

PORT_VARIABLE = "PORT"
"""The health check of the server's image reads it, too."""


class UsageError(Exception):
    """Something the caller can put right; its message is one line."""


def open_admin(address: str) -> socket.socket:
    """A listening socket at `--admin-address`.

    Raises:
        UsageError: There can be none with this address.
    """
    host, _, port = address.rpartition(":")
    try:
        if not (host and port.isascii() and port.isdecimal()):
            raise ValueError("it is no address with a port")
        return listen(host.strip("[]"), int(port), backlog=16)
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--admin-address: cannot listen on {address}: {reason}; expected HOST:PORT with a free port, such as "
            "127.0.0.1:8001"
        ) from error


def open_listener(host: str, port: int, unix_socket: str | None = None) -> socket.socket:
    """A listening socket.

    Args:
        host: Where.
        port: Where.
        unix_socket: Path of a socket in place of those.

    Raises:
        UsageError: There can be none with this address.
    """
    if unix_socket is not None:
        try:
            return listen_unix(unix_socket)
        except OSError as error:
            raise UsageError(f"--unix-socket: cannot listen on {unix_socket}: {error.strerror or error}") from error
    try:
        return listen(host, port)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port (--port 0 "
            "takes a free one)"
        ) from error


def settle_threads(threads: int) -> None:
    """Sets what OpenMP and BLAS read once, unless the user has.

    An idle OpenMP thread sleeps at once instead of looking for work. Looking costs CPU time, and takes the core from
    the event loop and from other processes: on 2 cores that were busy otherwise, a text cost 2.9 ms of CPU with
    sleeping threads, 3.3 ms with GOMP_SPINCOUNT=1000, 4.0 ms with 20000 and 12 ms with the default of 300000.

    Args:
        threads: Threads of the engine.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # Of numpy, where there is one: it only pools.
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def port_of(option: int | None, environment: Mapping[str, str]) -> int:
    """The port to listen on: `--port`, else the environment's, else the default.

    Raises:
        UsageError: It is not one.
    """
    source, given = "--port", str(option)
    if option is None:
        source, given = PORT_VARIABLE, environment.get(PORT_VARIABLE) or str(Settings().port)
    if not (given.isascii() and given.isdecimal() and len(given) <= 5 and int(given) <= 65535):
        raise UsageError(f"{source}: expected 0 to 65535, got {given}")
    return int(given)


class Loaded(NamedTuple):
    """A model that is ready.

    Attributes:
        name: What clients call it.
        task: Of its bundle.
        threads: Threads of its engine.
        choice: The variant, and why.
        isa: What runs it.
    """

    name: str
    task: str
    threads: int
    choice: Choice
    isa: str


class Process:
    """The only process of a server. What is of one model is asked for by its place among the models.

    Attributes:
        reloads: Whether this process loads the models again when it is asked to.
    """

    reloads = True

    def __init__(self) -> None:
        self._url = ""

    def threads(self, asked: int | None) -> int:
        """Threads of the engine.

        Args:
            asked: By `--threads`.
        """
        from ..machine import usable_cpus

        return asked or usable_cpus()

    def check(self, place: int, manifest: Manifest) -> None:
        """Called with a manifest, before anything of the bundle is used."""

    def image(self, place: int, threads: Sequence[int]) -> Image | None:
        """Packed weights to map; None: they are loaded from the bundle.

        Args:
            place: Which model.
            threads: Threads of the engine of each model.
        """
        return None

    def meters(self) -> Meters | None:
        """Where budgets of API keys are counted; None: here."""
        return None

    def selection(self, place: int, manifest: Manifest, arguments: argparse.Namespace, threads: int) -> Selection:
        """Which variant is served."""
        return Selection(manifest, arguments.variant, threads, arguments.cache_dir)

    def files_of(self, place: int, selection: Selection) -> Collection[str]:
        """Variants of a model whose files have to be as the manifest says."""
        return selection.names

    def settings(self, settings: Settings) -> Settings:
        """The settings of this process, from those of the server."""
        return settings

    def listen(self, settings: Settings) -> list[socket.socket]:
        """Sockets to accept connections from.

        Raises:
            UsageError: See `open_listener`.
        """
        sock = open_listener(settings.host, settings.port, settings.unix_socket)
        self._url = url_of(sock, settings.tls)
        return [sock]

    def server(self, app: App, settings: Settings, on_ready: Callable[[], None]) -> Server:
        """The server of this process."""
        from .lifecycle import Server

        return Server(app, settings, on_ready)

    def announce(self, loaded: Sequence[Loaded], again: bool = False) -> None:
        """Called when everything is ready.

        Args:
            loaded: What is served.
            again: Something was served before.
        """
        say(f"{'reloaded, ' if again else ''}serving {started(self._url, loaded)}")


def started(url: str, loaded: Sequence[Loaded]) -> str:
    """For the line of a start: what is served, and where."""
    return start_line(
        url,
        [(one.name, one.task) for one in loaded],
        [one.choice for one in loaded],
        f"threads={'+'.join(str(one.threads) for one in loaded)}",
        [one.isa for one in loaded],
    )


def start_line(
    url: str, models: Sequence[tuple[str, str]], choices: Sequence[Choice], cpus: str, isas: Sequence[str]
) -> str:
    """See `started`; of several models, in their order.

    Args:
        url: Where.
        models: Name and task of each.
        choices: The variant of each, and why.
        cpus: How they are run.
        isas: What runs each.
    """
    names = ", ".join(f"{name} ({task})" for name, task in models)
    variants = ",".join(choice.variant for choice in choices)
    reasons = "; ".join(str(choice) for choice in choices)
    return f"{names} on {url} variant={variants} {cpus} isa={','.join(dict.fromkeys(isas))} ({reasons})"
