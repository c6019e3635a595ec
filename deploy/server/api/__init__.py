"""All routes: a file for each dialect, each a list of rows. A new route is a row in one of them."""

from __future__ import annotations

from . import native, openai, operations, structured

__all__ = ["ROUTES"]

ROUTES = (*native.ROUTES, *structured.ROUTES, *openai.ROUTES, *operations.ROUTES)
