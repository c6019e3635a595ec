"""What is asked of the tokenizer alone: tokens of texts, texts of tokens. No engine is needed for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from ..errors import ApiError
from ..limits.bounds import INLINE_CHARS, Limits, exceeded
from ..limits.callers import Caller, CallerLeft
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
    few = _are_few(texts)
    around = len(tokenizer.prefix) + len(tokenizer.suffix)
    found: list[orjson.Fragment] = []
    left = limits.ids
    for text in texts:
        if not few:
            service.budget.hold(caller, _JSON_BYTES * min(len(text) + around, left))
        arguments = (tokenizer, text, special, prompt)
        tokens, part = _describe(*arguments) if few else await service.aside(_describe, *arguments)
        left -= tokens
        if left < 0:
            raise ApiError("too_large", exceeded("tokens", limits.ids))
        if caller.gone:
            raise CallerLeft
        found.append(part)
    return found


def _are_few(items: Sequence[Sequence[Any]]) -> bool:
    """Whether texts or rows of ids may be worked on by the event loop; an empty one takes its time, too."""
    return sum(map(len, items)) + _EMPTY_CHARS * len(items) <= INLINE_CHARS


def _describe(tokenizer: TextTokenizer, text: str, special: bool, prompt: str | None) -> tuple[int, orjson.Fragment]:
    tokens = tokenizer.describe(text, special, prompt)
    return len(tokens), orjson.Fragment(orjson.dumps(tokens))


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
    if _are_few(rows):
        return [service.tokenizer.decode(row, skip_special_tokens) for row in rows]
    return [await service.aside(service.tokenizer.decode, row, skip_special_tokens) for row in rows]
