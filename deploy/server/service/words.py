"""What is asked of the tokenizer alone: tokens of texts, texts of tokens. No engine is needed for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from ..errors import ApiError
from ..limits.bounds import INLINE_CHARS, Limits, exceeded
from ..limits.callers import Caller, CallerLeft
from .request import turns
from .service import Service
from .tokens import TextTokenizer

__all__ = ["decode", "tokenize"]

_JSON_BYTES = 96
"""About what the description of a token takes."""

_EMPTY_CHARS = 16
"""An empty text takes as long as so many characters."""


async def tokenize(
    service: Service,
    texts: Sequence[str],
    caller: Caller,
    limits: Limits,
    *,
    special: bool = True,
    prompt_name: str | None = None,
) -> list[orjson.Fragment]:
    """Per text its tokens, as `TextTokenizer.describe` has them, in JSON.

    Args:
        service: The model.
        texts: As a client sent them.
        caller: Who waits.
        limits: Of the route.
        special: Add the special tokens that stand around a text.
        prompt_name: Which of the model's prompts goes before each text; None: its default prompt.

    Raises:
        ApiError: No texts, a text above the limits, more tokens than a request may have, or no such prompt.
        CallerLeft: The client has left.
    """
    if not texts:
        raise ApiError("no_inputs", "expected at least one input, got an empty list")
    tokenizer = service.tokenizer
    prompt = None if prompt_name is None else tokenizer.prompt(prompt_name)
    for index, text in enumerate(texts):
        if len(text) > limits.chars:
            raise ApiError("too_large", exceeded("chars", limits.chars, len(text), f"input {index}: "))
    sizes = _sizes_of(texts)
    around = len(tokenizer.prefix) + len(tokenizer.suffix)
    found: list[orjson.Fragment] = []
    left = limits.ids
    few = sum(sizes) <= INLINE_CHARS
    for start, stop in turns(sizes):
        part = texts[start:stop]
        arguments = (tokenizer, part, special, prompt, left)
        if few:
            left, described = _describe(*arguments)
        else:
            service.budget.hold(caller, _JSON_BYTES * min(sum(map(len, part)) + around * len(part), left))
            left, described = await service.aside(_describe, *arguments)
        if left < 0:
            raise ApiError("too_large", exceeded("tokens", limits.ids))
        if caller.gone:
            raise CallerLeft
        found += described
    return found


def _sizes_of(items: Sequence[Sequence[Any]]) -> list[int]:
    """About how many characters each text, or row of ids, takes as long as; an empty one takes its time, too."""
    return [_EMPTY_CHARS + len(item) for item in items]


def _describe(
    tokenizer: TextTokenizer, texts: Sequence[str], special: bool, prompt: str | None, left: int
) -> tuple[int, list[orjson.Fragment]]:
    """The tokens of texts, and how many more than these there may be; below 0, the rest is left out."""
    found = []
    for text in texts:
        tokens = tokenizer.describe(text, special, prompt)
        left -= len(tokens)
        if left < 0:
            break
        found.append(orjson.Fragment(orjson.dumps(tokens)))
    return left, found


async def decode(service: Service, ids: Sequence[Any], *, skip_special_tokens: bool = True) -> list[str]:
    """Per list of token ids its text.

    Args:
        service: The model.
        ids: Token ids, or lists of them.
        skip_special_tokens: Leave special tokens out.

    Raises:
        ApiError: No ids, an id outside of the vocabulary, or numbers beside lists.
    """
    if not ids:
        raise ApiError("no_inputs", "ids: expected at least one list, got an empty list")
    kinds = set(map(type, ids))
    if len(kinds) > 1:
        raise ApiError("invalid_request", "ids: expected only token ids, or only lists of token ids")
    rows: Sequence[Sequence[int]] = ids if kinds == {list} else [ids]
    sizes = _sizes_of(rows)
    if sum(sizes) <= INLINE_CHARS:
        return _decode(service.tokenizer, rows, skip_special_tokens)
    found: list[str] = []
    for start, stop in turns(sizes):
        found += await service.aside(_decode, service.tokenizer, rows[start:stop], skip_special_tokens)
    return found


def _decode(tokenizer: TextTokenizer, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens) for row in rows]
