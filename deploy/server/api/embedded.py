"""What several dialects make of embeddings: types of numbers, widths, and prompts by the type of a text."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .route import ApiError, Service

__all__ = ["KINDS", "MAKERS", "check_kind", "check_width", "prompt_of"]

_PROMPTS: Mapping[str, Sequence[str]] = {
    "query": ("query", "search_query"),
    "document": ("document", "passage", "corpus", "search_document"),
    "search_query": ("search_query", "query"),
    "search_document": ("search_document", "document", "passage", "corpus"),
    "classification": ("classification",),
    "clustering": ("clustering",),
}
"""Names of prompts for each `input_type`: the dialect's, then those of other dialects and of sentence-transformers."""


def _base64(row: Any) -> str:
    """A row of f32 [width] in base64, little-endian."""
    return base64.b64encode(row).decode("ascii")


def _ubinary(row: Sequence[float]) -> list[int]:
    """A bit for each number, 1 above zero; the first one is the highest of its byte, and the last byte is filled up."""
    size = -(-len(row) // 8)
    bits = "".join(["1" if value > 0 else "0" for value in row]).ljust(8 * size, "0")
    return list(int(bits, 2).to_bytes(size, "big"))


def _binary(row: Sequence[float]) -> list[int]:
    return [byte - 128 for byte in _ubinary(row)]


MAKERS: Mapping[str, Callable[[Any], Any]] = {"base64": _base64, "ubinary": _ubinary, "binary": _binary}
"""What makes an embedding of a type of its numbers."""

KINDS = ("float", *MAKERS)
"""Types of embeddings."""


def check_kind(field: str, found: str, known: Sequence[str] = KINDS) -> None:
    """Checks a type of embeddings.

    Args:
        field: What the request calls it.
        found: What it says.
        known: The types that the dialect offers there.

    Raises:
        ApiError: It is none of them (400).
    """
    if found not in known:
        raise ApiError(
            "invalid_request",
            f"{field}: expected {', '.join(known)}, got {found[:40]!r}; int8 and uint8 need ranges that are measured "
            "for each model",
        )


def check_width(field: str, found: int | None, service: Service) -> None:
    """Checks to how many numbers embeddings are to be cut.

    Args:
        field: What the request calls it.
        found: What it says; None: nothing.
        service: The model.

    Raises:
        ApiError: The model was not trained for so many (400).
    """
    known = service.dimensions
    if found is None or found in known:
        return
    if found > service.width or isinstance(known, range):
        message = f"{field}: expected 1 to {service.width}, the width of {service.model}, got {found}"
    else:
        widths = ", ".join(map(str, known))
        message = (
            f"{field}: expected {widths}, which {service.model} was trained for, got {found}; the option "
            "--any-dimensions cuts embeddings to any width"
        )
    raise ApiError("invalid_request", message)


def prompt_of(prompts: Mapping[str, str], input_type: str | None) -> str | None:
    """The name of the model's prompt for texts of a type; None: it has none.

    Args:
        prompts: Of the model, by name.
        input_type: What the request says.
    """
    names = {name.lower(): name for name in prompts}
    return next((names[name] for name in _PROMPTS.get(input_type or "", ()) if name in names), None)
