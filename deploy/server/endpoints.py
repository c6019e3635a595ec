"""The rows of `api/`, made ready for one model: what is looked up once, not by every request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from ..bundle import Manifest
from .api.route import Context, Route
from .errors import ApiError
from .http.exchange import Headers
from .limits.callers import Caller
from .limits.keys import Keys
from .models import Model

__all__ = ["Endpoint", "behind", "paths_of", "rows_of", "wrong_task"]


_NAMED = ("/v1/", "/v2")
"""Paths of dialects that have a place for the name of a model."""


class Endpoint:
    """A row, made ready.

    Attributes:
        route: The row.
        context: What its handler works with.
        model: Which model it asks.
        handler: See `Route`.
        decoder: Of the body; None: no body is read.
        body_bytes: Longest body.
        others: The same row of all models by their names, where a request's body names one; None: it is not looked
            at.
    """

    __slots__ = (
        "_keys",
        "_running",
        "_wrong_task",
        "body_bytes",
        "context",
        "decoder",
        "handler",
        "model",
        "others",
        "route",
    )

    def __init__(self, route: Route, context: Context, model: Model, keys: Keys | None, wrong_task: str | None) -> None:
        self.route = route
        self.context = context
        self.model = model
        self.handler = route.handler
        self.decoder: Any = None if route.request is None else msgspec.json.Decoder(route.request)
        self.body_bytes = context.limits.body_bytes
        self.others: dict[str, Endpoint] | None = None
        self._running = route.task is not None
        self._keys = keys if route.secured else None
        self._wrong_task = wrong_task

    def admit(self, headers: Headers, caller: Caller) -> None:
        """Refuses, before the body is read, what will not be served anyway."""
        if self._keys is not None:
            caller.payer = self._keys.admit(headers)
        if self.others is None:
            self.check()

    def check(self) -> None:
        """Refuses what the model is not for, or cannot run.

        Raises:
            ApiError: See `errors`.
        """
        if self._wrong_task is not None:
            raise ApiError("wrong_task", self._wrong_task)
        if self._running:
            self.context.service.check_running()

    def named(self, request: Any) -> Endpoint:
        """The same row of the model that a body names; without a name, of this one.

        Raises:
            ApiError: There is no such model (404), or it is for another task.
        """
        others = self.others or {}
        found = self if request.model is None else others.get(request.model)
        try:
            if found is None:
                names = ", ".join(others)
                raise ApiError("model_not_found", f"model: expected one of {names}, got {request.model[:80]!r}")
            found.check()
        except ApiError as error:
            error.dialect = self.route.speaks(request)
            raise
        return found


def paths_of(path: str, model: str, first: bool) -> Iterator[tuple[str, bool]]:
    """Where a row of a model is served, and whether that path is the model's alone.

    The name goes before the path where the dialect has no place for it; without one, the first model is asked.

    Args:
        path: Of the row, with `{model}` in it if its dialect has a place for the name.
        model: Name of the model.
        first: Whether this is the first model.
    """
    if "{model}" in path:
        yield path.replace("{model}", model), True
        return
    if first:
        yield path, False
    if not path.startswith(_NAMED):
        yield f"/models/{model}{path}", True


def behind(model: str, routes: Sequence[Route]) -> list[Route]:
    """Rows as they are served behind the name of a model, for its document."""
    return [
        route if route.path.startswith(_NAMED) else dataclasses.replace(route, path=f"/models/{model}{route.path}")
        for route in routes
    ]


def rows_of(routes: Sequence[Route], task: str, model: str) -> list[Route]:
    """The rows that serve a bundle, with the name of its model in their paths.

    Args:
        routes: All rows; of those with one path and method, the one of the bundle's task is taken, else the first.
        task: Of the bundle.
        model: Name that it is served under.
    """
    found: dict[tuple[str, str], Route] = {}
    for route in routes:
        key = (route.path, route.method)
        if key not in found or (route.task == task and found[key].task != task):
            found[key] = route
    return [
        dataclasses.replace(route, path=route.path.replace("{model}", model)) if "{model}" in route.path else route
        for route in found.values()
    ]


def wrong_task(route: Route, routes: Sequence[Route], manifest: Manifest) -> str | None:
    """Why a route does not serve a model, and which of `routes`, with their paths, does; None if it does."""
    if route.task in (None, manifest.task):
        return None
    fitting = next((other.path for other in routes if other.task == manifest.task), None)
    return (
        f"{route.path} needs a model for {route.task}, and {manifest.model.name} is for {manifest.task}"
        f"{'' if fitting is None else f': POST to {fitting}'}"
    )
