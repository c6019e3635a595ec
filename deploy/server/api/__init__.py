"""All routes: a file for each dialect, each a list of rows. A new route is a row in one of them."""

from __future__ import annotations

from . import cohere, hub, native, oip, openai, operations, rerank, structured, tei, tei_vectors

__all__ = ["ROUTES"]

ROUTES = (
    *native.ROUTES,
    *structured.ROUTES,
    *tei.ROUTES,
    *tei_vectors.ROUTES,
    *openai.ROUTES,
    *rerank.ROUTES,
    *cohere.ROUTES,
    *oip.ROUTES,
    *hub.ROUTES,
    *operations.ROUTES,
)
