"""The server as an application of Ray Serve: the same routes and the same engine, replicas and autoscaling by Ray.

    serve run deploy.ray_serve:app bundle=bundles/demo cpus=4 max_replicas=8

A replica is one `App` of `deploy/server` on one engine: all dialects, batches by tokens, 429 with `Retry-After`. With
several bundles (`bundles=FOLDER`, each a folder in it) a request names its own in the header
`serve_multiplexed_model_id`; a replica loads bundles when they are asked for, and keeps the last few
(docs/ray-serve.md).

This module imports Ray only in `app`: what answers requests is tried without it.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shlex
import socket
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundle import BundleError
from .machine import available_memory_bytes
from .server.cli import parse
from .server.http.exchange import Headers, Receive, Scope, Send
from .server.limits.bounds import Settings
from .server.limits.callers import Caller
from .server.process import Process, UsageError
from .server.serving import Assembled, assemble

if TYPE_CHECKING:
    from .server.app import App

__all__ = ["MODEL_HEADER", "Loaded", "Options", "Replica", "app", "load"]

MODEL_HEADER = "serve_multiplexed_model_id"
"""Ray's name of the header that names a bundle; its proxy reads it, too, and prefers replicas that have the bundle."""

GRACE_S = 35.0
"""How long a replica that shall stop may answer what it has accepted."""


@dataclass(frozen=True)
class Options:
    """What `serve run` and a configuration file may say.

    Attributes:
        bundle: The bundle to serve, or a model's folder.
        bundles: A folder with several; requests name theirs.
        options: Options of `python -m deploy serve`, in one text.
        cpus: Cores of a replica, and threads of its engine.
        min_replicas: Fewest replicas.
        max_replicas: Most replicas.
        target_ongoing_requests: How many requests each replica should have, by which Ray decides how many there are.
        max_ongoing_requests: How many Ray gives to a replica at once; more wait at Ray's proxy. So many that the
            replica's own queue decides: it knows tokens and time. A proxy that prefers its own node, which is Ray's
            default, asks other nodes only beyond it (docs/ray-serve.md).
        models_per_replica: Bundles that a replica keeps loaded.
    """

    bundle: str = ""
    bundles: str = ""
    options: str = "--variant torch_ext-bf16"
    cpus: int = 1
    min_replicas: int = 1
    max_replicas: int = 4
    target_ongoing_requests: int = 16
    max_ongoing_requests: int = 512
    models_per_replica: int = 3

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Options:
        """Reads arguments, which `serve run` gives as texts.

        Raises:
            ValueError: One is unknown or of another type, or it is not said what to serve.
        """
        kinds = {field.name: type(getattr(cls, field.name)) for field in fields(cls)}
        unknown = sorted(set(arguments) - set(kinds))
        if unknown:
            raise ValueError(f"expected arguments among {', '.join(kinds)}, got {', '.join(unknown)}")
        read: dict[str, Any] = {}
        for name, value in arguments.items():
            try:
                read[name] = kinds[name](value)
            except ValueError:
                raise ValueError(f"{name}: expected a whole number, got {value!r}") from None
            if kinds[name] is int and read[name] < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value!r}")
        options = cls(**read)
        if bool(options.bundle) == bool(options.bundles):
            raise ValueError("expected bundle=FOLDER (one bundle) or bundles=FOLDER (a folder with several)")
        return options

    def folder(self, name: str) -> Path:
        """Where a bundle is.

        Args:
            name: Of a folder in `bundles`; empty for `bundle`.

        Raises:
            BundleError: There is none of that name.
        """
        if self.bundle:
            return Path(self.bundle)
        known = sorted(path.name for path in Path(self.bundles).iterdir() if path.is_dir())
        if name not in known:  # Also keeps "../x" out.
            raise BundleError(f"expected a bundle among {', '.join(known)} in the header {MODEL_HEADER}, got {name!r}")
        return Path(self.bundles) / name


class _InReplica(Process):
    """Ray has the socket, and decides how many threads there are."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self._threads = threads

    def threads(self, asked: int | None) -> int:
        """The cores of the replica, unless the options say otherwise."""
        return asked or self._threads

    def listen(self, settings: Settings) -> list[socket.socket]:
        """None."""
        return []


class Loaded:
    """A bundle whose engine runs, until nobody holds this object any more: then what is queued is answered first.

    Attributes:
        answer: Answers a request (ASGI).
    """

    def __init__(self, parts: Assembled) -> None:
        self.answer = functools.partial(_answer, parts.app)
        self._batchers = [model.batcher for model in parts.app.models]
        weakref.finalize(self, _close_soon, asyncio.get_running_loop(), parts)

    @property
    def failure(self) -> BaseException | None:
        """Why the engine has stopped, or None."""
        return next((batcher.failure for batcher in self._batchers if batcher.failure is not None), None)


def _close_soon(loop: asyncio.AbstractEventLoop, parts: Assembled) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(lambda: _CLOSING.add(loop.create_task(_close(parts))))


async def _close(parts: Assembled) -> None:
    await asyncio.gather(*(model.batcher.close() for model in parts.app.models))
    parts.app.close()
    _CLOSING.discard(asyncio.current_task())


_CLOSING: set[asyncio.Task[None] | None] = set()
"""asyncio itself holds tasks weakly."""


async def load(folder: Path, options: Options) -> Loaded:
    """Loads a bundle into this process.

    Args:
        folder: The bundle.
        options: Of the application.

    Raises:
        BundleError: It cannot be served.
        UsageError: It is neither a bundle nor a model, or an option is wrong.
    """
    arguments = parse([str(folder), *shlex.split(options.options)])
    loop = asyncio.get_running_loop()
    # Its files are read and hashed, for up to seconds: the replica's other requests go on.
    process = _InReplica(options.cpus)
    parts = await loop.run_in_executor(None, assemble, arguments, process, process.threads(arguments.threads))
    for model in parts.app.models:
        await model.batcher.start()
        model.announce()
    available = available_memory_bytes()
    if available is not None:  # Replicas of a node share it as they share the cores.
        parts.app.budget.settle(available * options.cpus // max(os.cpu_count() or 1, options.cpus))
    return Loaded(parts)


async def _answer(served: App, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request of any ASGI server; see `server.http.protocol` for ours."""
    path, root = scope["path"], scope.get("root_path", "")
    if root and path.startswith(root):
        scope = {**scope, "path": path[len(root) :] or "/"}
    caller = Caller()
    heard = _Listener(receive, caller)
    headers: Headers = {name.lower(): value for name, value in scope["headers"]}
    try:
        await served({**scope, "deploy.headers": headers, "deploy.caller": caller}, heard.receive, send)
    finally:
        heard.stop()


class _Listener:
    """Reads a request's body, and hears behind it whether the client leaves."""

    def __init__(self, receive: Receive, caller: Caller) -> None:
        self._receive = receive
        self._caller = caller
        self._task: asyncio.Task[None] | None = None

    async def receive(self) -> dict[str, Any]:
        """The next part of the body."""
        message = await self._receive()
        if message["type"] == "http.request":
            message = {"body": b"", "more_body": False, **message}
            if not message["more_body"]:
                self._task = asyncio.get_running_loop().create_task(self._listen())
        return message

    async def _listen(self) -> None:
        if (await self._receive())["type"] == "http.disconnect":
            self._caller.leave()

    def stop(self) -> None:
        """The request is answered."""
        if self._task is not None:
            self._task.cancel()


class Replica:
    """What one replica does: one bundle from its start, or several when they are asked for.

    Args:
        options: Of the application.
        model: Gives a bundle by name, from those that are loaded or by loading it.
        asked: The name that the current request gives.
    """

    def __init__(
        self, options: Options, model: Callable[[str], Awaitable[Loaded]], asked: Callable[[], str] = lambda: ""
    ) -> None:
        self._options = options
        self._model = model
        self._asked = asked
        self._only: Loaded | None = None

    async def start(self) -> None:
        """Loads the bundle, if there is one only: a replica counts as ready afterwards.

        Raises:
            BundleError: It cannot be served.
        """
        if self._options.bundle:
            self._only = await self._model("")

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises.

        Raises:
            RuntimeError: The engine has stopped.
        """
        if self._only is not None and self._only.failure is not None:
            raise RuntimeError(f"the engine has stopped: {self._only.failure}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request (ASGI)."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        loaded = self._only
        if loaded is None:
            name = self._asked()
            try:
                self._options.folder(name)  # Before another bundle would be dropped for one that there is not.
            except BundleError as error:
                await _refuse(send, 404, "not_found", str(error))
                return
            try:
                loaded = await self._model(name)
            except (BundleError, UsageError) as error:
                await _refuse(send, 500, "internal", f"{name} cannot be served: {error}")
                return
        await loaded.answer(scope, receive, send)


async def _lifespan(receive: Receive, send: Send) -> None:
    for _ in range(2):
        message = await receive()
        await send({"type": f"{message['type']}.complete"})


async def _refuse(send: Send, status: int, kind: str, message: str) -> None:
    body = json.dumps({"error": {"kind": kind, "message": message}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def app(arguments: Mapping[str, Any]) -> Any:
    """The application, for `serve run deploy.ray_serve:app NAME=VALUE...` or a configuration file.

    Args:
        arguments: See `Options`.

    Raises:
        ModuleNotFoundError: Ray is missing.
        ValueError: See `Options.of`.
    """
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the package {error.name} is missing; install Ray Serve beside this one: pip install 'ray[serve]>=2.60,<3'"
        ) from None
    options = Options.of(arguments)

    class Encoder:
        """A replica."""

        async def __init__(self) -> None:  # type: ignore[misc]  # Ray awaits it.
            async def get(name: str) -> Loaded:
                return await (load(options.folder(name), options) if options.bundle else self.model(name))

            self._replica = Replica(options, get, serve.get_multiplexed_model_id)
            await self._replica.start()

        def __serve_build_asgi_app__(self) -> Any:
            return self._replica

        async def model(self, name: str) -> Loaded:
            return await load(options.folder(name), options)

        def check_health(self) -> None:
            self._replica.check_health()

    Encoder.model = serve.multiplexed(max_num_models_per_replica=options.models_per_replica)(Encoder.model)  # type: ignore[method-assign]
    deployment = serve.deployment(
        name="Encoder",
        ray_actor_options={"num_cpus": options.cpus},
        max_ongoing_requests=options.max_ongoing_requests,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_ongoing_requests,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,
        },
        health_check_period_s=5,
        health_check_timeout_s=20,
        graceful_shutdown_timeout_s=GRACE_S,
    )
    return deployment(serve.ingress()(Encoder)).bind()
