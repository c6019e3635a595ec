"""Long requests are tokenised part by part on helper threads, if there is room for what they will take.

Tokenising a text takes a tenth of what computing it takes, or more. A request that finds the queue full afterwards has
cost that for nothing, and when many are refused, they cost more than those that are answered. So what a request takes
at least (a word is a token or more) has to find room in the queue before its first part is tokenised, and it keeps that
room meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from ..errors import ApiError
from ..limits.bounds import INLINE_CHARS, INLINE_INPUTS, TOKENIZE_BACKLOG_CHARS, Settings, exceeded
from ..limits.callers import CallerLeft
from .batching import Batcher
from .request import Request, sizes_of, turns

__all__ = ["Tokenizing", "estimate_tokens", "is_long"]


class Tokenizing:
    """What is being tokenised. Methods are called on the event loop.

    Attributes:
        chars: Characters of the long requests that are.
    """

    def __init__(
        self,
        aside: Callable[..., Awaitable[Any]],
        batcher: Batcher,
        settings: Settings,
        max_tokens: int,
        prompt_chars: int,
    ) -> None:
        """Nothing is tokenised yet.

        Args:
            aside: Runs a function on a helper thread.
            batcher: Where the tokens go.
            settings: Of the server.
            max_tokens: Longest input of the model.
            prompt_chars: Of the prompt that goes before each text.
        """
        self.chars = 0
        self._aside = aside
        self._batcher = batcher
        self._most_tokens = settings.max_queue_tokens
        # What a cache holds need not run again.
        self._reserves = settings.cache_mb is None
        self._max_tokens = max_tokens
        self._prompt_chars = prompt_chars

    def sizes_of_few(self, request: Request) -> list[int] | None:
        """`sizes_of`; None: there are too many inputs to look at here."""
        return None if len(request.inputs) > INLINE_INPUTS else sizes_of(request, self._prompt_chars)

    async def encode(self, request: Request) -> list[Any]:
        """Checks and tokenises: a short request here, a long one part by part.

        Returns:
            What the request's `encode` makes of each input.

        Raises:
            ApiError: It cannot be taken, or not now.
            CallerLeft: The client has left meanwhile.
        """
        sizes = self.sizes_of_few(request)
        if is_long(sizes):
            return await self.in_parts(request, sizes)
        return request.encode(request.inputs, request.truncate)

    async def in_parts(self, request: Request, sizes: Sequence[int] | None) -> list[Any]:
        """Tokenises a long request; others get their turn between its parts. See `encode` and `sizes_of_few`."""
        if sizes is None:
            sizes, tokens = await self._aside(self._measure, request)
        else:
            tokens = estimate_tokens(request.inputs, self._max_tokens)
        waiting, chars = self.chars, sum(sizes)
        most = max(TOKENIZE_BACKLOG_CHARS, request.limits.body_bytes)
        if chars > most:
            raise ApiError("too_large", f"{exceeded('all_chars', most, chars)}; send fewer or shorter texts at a time")
        if waiting and waiting + chars > TOKENIZE_BACKLOG_CHARS:
            raise self._batcher.try_later(
                f"{waiting} characters are waiting to be tokenised; with {chars} more, they would be more than "
                f"{TOKENIZE_BACKLOG_CHARS}"
            )
        if tokens[0] > self._most_tokens:
            raise self._too_large()
        with self._room(tokens, len(sizes)):
            self.chars += chars
            try:
                return await self._encode_in_parts(request, sizes)
            finally:
                self.chars -= chars

    def _measure(self, request: Request) -> tuple[list[int], tuple[int, int]]:
        """Characters of each input, and how many tokens all have, at least and at most."""
        return sizes_of(request, self._prompt_chars), estimate_tokens(request.inputs, self._max_tokens)

    @contextlib.contextmanager
    def _room(self, tokens: tuple[int, int], texts: int) -> Iterator[None]:
        """Keeps room in the queue meanwhile."""
        if not self._reserves:
            yield
            return
        kept = self._batcher.admission.reserve(tokens, texts)
        try:
            yield
        finally:
            self._batcher.admission.release(kept)

    async def _encode_in_parts(self, request: Request, sizes: Sequence[int]) -> list[Any]:
        ids: list[Any] = []
        tokens = 0
        for start, stop in turns(sizes):
            part = await self._aside(request.encode, request.inputs[start:stop], request.truncate, start)
            if request.caller.gone:
                raise CallerLeft
            tokens += sum(map(len, part))
            if tokens > self._most_tokens and stop < len(sizes):  # The rest need not be tokenised.
                raise self._too_large()
            ids += part
        return ids

    def _too_large(self) -> ApiError:
        return ApiError("too_large", f"{exceeded('tokens', self._most_tokens)}; send fewer texts at a time")


def is_long(sizes: Sequence[int] | None) -> bool:
    """Whether a request is tokenised part by part, by the sizes of its few inputs; None: it has many."""
    return sizes is None or sum(sizes) > INLINE_CHARS


def estimate_tokens(inputs: Sequence[Any], max_tokens: int) -> tuple[int, int]:
    """How many tokens inputs have, at least and at most, as texts usually are.

    A word is a token or more, where words are written with spaces; two letters of a language that needs no more than
    ASCII are hardly more than one, and any other character may be one.

    Args:
        inputs: Texts, or pairs of texts.
        max_tokens: What each is cut to.
    """
    least = most = 0
    for given in inputs:
        words = letters = 0
        for text in (given,) if isinstance(given, str) else given:
            words += len(text.split(None, max_tokens))
            letters += len(text) // 2 if text.isascii() else len(text)
        words = min(words, max_tokens) or 1
        least += words
        most += max(words, min(letters, max_tokens))
    return least, most
