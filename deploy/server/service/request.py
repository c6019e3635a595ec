"""What is asked of a model (`Request`), what comes back (`Result`), and what the model turned out to be (`Served`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...bundle import Manifest
from ...machine import versions
from ...tasks.feature_extraction import EmbedOptions
from ..errors import ApiError
from ..limits.bounds import TURN_CHARS, Limits, exceeded
from ..limits.callers import Caller
from ..variants import Choice

__all__ = ["Request", "Result", "Served", "check_text", "embed_options", "sizes_of", "too_many", "turns", "widths_of"]


_EMBED_OPTIONS = {value: EmbedOptions(value) for value in (False, True)}


class Result(NamedTuple):
    """What a request got.

    Attributes:
        values: One for each text.
        tokens: Tokens of all texts, special tokens included.
        tokenize_s: How long checking and tokenising took.
        queue_s: Then, how long the first text waited.
        infer_s: How long the batches took that held a text of it.
        started_s: When tokenising began, by `time.perf_counter`.
        ids: Per text the token ids that the model read, or those of a pair.
    """

    values: list[Any]
    tokens: int
    tokenize_s: float
    queue_s: float
    infer_s: float
    started_s: float = 0.0
    ids: Sequence[Any] = ()


@dataclass(frozen=True)
class Served:
    """What the engine turned out to be.

    Attributes:
        choice: The variant, and why it was taken.
        isa: What runs it.
    """

    choice: Choice
    isa: str

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that compute; looked up for who asks first."""
        return versions()


class Request(NamedTuple):
    """What a client asks about.

    Attributes:
        inputs: Texts, or pairs of texts, as the client sent them.
        caller: Who waits.
        limits: Of the route.
        truncate: Cut inputs that are longer than the model takes.
        encode: Makes token ids of some inputs: gets them, `truncate`, and the index of the first.
        options: For the task.
        check: Refuses token ids that the task cannot take; returns how many answers the others get.
    """

    inputs: Sequence[Any]
    caller: Caller
    limits: Limits
    truncate: bool
    encode: Callable[..., list[Any]]
    options: Any = None
    check: Callable[[Sequence[Any], Limits], int] = lambda ids, limits: len(ids)


def too_many(found: int, limits: Limits) -> ApiError:
    """The error of a request with more inputs than one may have."""
    return ApiError("too_large", exceeded("inputs", limits.inputs, found))


def check_text(text: str, where: str) -> int:
    """How many characters a text has.

    Args:
        text: As the client sent it.
        where: What to call it in an error.

    Raises:
        ApiError: It holds a NUL character.
    """
    if "\0" in text:
        raise ApiError("invalid_request", f"{where}: expected text, got a NUL character")
    return len(text)


def sizes_of(request: Request, prompt_chars: int) -> list[int]:
    """How many characters each input has; checks them.

    Args:
        request: What is asked.
        prompt_chars: Of the prompt that goes before each text.

    Raises:
        ApiError: There are no inputs, or more than the route takes, or one holds a NUL character.
    """
    inputs, limits = request.inputs, request.limits
    if len(inputs) > limits.inputs:
        raise too_many(len(inputs), limits)
    if not inputs:
        raise ApiError("no_inputs", "expected at least one input, got an empty list")
    sizes = []
    for index, given in enumerate(inputs):
        if isinstance(given, str):
            if "\0" in given:
                check_text(given, f"input {index}")
            sizes.append(prompt_chars + len(given))
        else:
            where = f"input {index}"
            sizes.append(sum(check_text(text, where) for text in given))
    return sizes


def turns(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Parts of a long request: index of the first input of each, and of the one behind its last.

    Args:
        sizes: Characters of each input.
    """
    start = chars = 0
    for index, size in enumerate(sizes):
        chars += size
        if chars >= TURN_CHARS:
            yield start, index + 1
            start, chars = index + 1, 0
    if start < len(sizes):
        yield start, len(sizes)


def widths_of(manifest: Manifest, any_width: bool) -> Sequence[int]:
    """Widths of embeddings that the model was trained for, its own included.

    A model that may be cut says so in its configuration: `matryoshka_dimensions`, or `is_matryoshka` for any width.

    Args:
        manifest: Of the bundle.
        any_width: The operator allows all.
    """
    width = manifest.width
    try:
        config = json.loads((manifest.root / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        config = {}
    trained = config.get("matryoshka_dimensions") if isinstance(config, dict) else None
    if any_width or (trained is None and isinstance(config, dict) and config.get("is_matryoshka") is True):
        return range(1, width + 1)
    given = trained if isinstance(trained, list) else []
    return sorted({width, *(item for item in given if isinstance(item, int) and 0 < item < width)})


def embed_options(normalize: bool, dimensions: int | None, width: int, skipped: int = 0) -> EmbedOptions:
    """Options of an embedding request.

    Args:
        normalize: Divide by the L2 norm.
        dimensions: Keep so many leading numbers; None: all.
        width: How many there are.
        skipped: Leading tokens that are not pooled.

    Raises:
        ApiError: There are not as many.
    """
    if dimensions is None or dimensions == width:
        return EmbedOptions(normalize, skipped=skipped) if skipped else _EMBED_OPTIONS[normalize]
    if not 1 <= dimensions <= width:
        raise ApiError("invalid_request", f"dimensions: expected 1 to {width}, the model's width, got {dimensions}")
    return EmbedOptions(normalize, dimensions, skipped)
