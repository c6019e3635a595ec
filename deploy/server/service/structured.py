"""What is asked of a model whose answer is more than one row for each text: entities, answers, vectors of tokens.

Part of `Service`, which has what is common to all questions: checks, tokenisation in turns, the queue.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...tasks.token_classification import TokenOptions, entities
from ..limits.bounds import INLINE_CHARS, Limits
from ..limits.callers import Caller
from .located import Located, LocatingTokenizer

if TYPE_CHECKING:
    from ...bundle import Manifest
    from .tokens import TextTokenizer

__all__ = ["StructuredQuestions"]

_INLINE_TOKENS = 2048
"""Answers of at most this many tokens are put together on the event loop, in 2 ms or less."""


@dataclass(frozen=True, slots=True)
class _Question:
    """What `Service` checks and tokenises; see its requests."""

    inputs: Sequence[Any]
    caller: Caller
    limits: Limits
    truncate: bool
    encode: Callable[..., list[Any]]


class StructuredQuestions:
    """The methods; `Service` is one."""

    if TYPE_CHECKING:
        manifest: Manifest
        _tokenizer: TextTokenizer

        def _sizes(self, request: Any) -> list[int]: ...

        async def _tokenize(self, request: Any, sizes: Sequence[int]) -> list[Any]: ...

        async def _run(
            self,
            ids: Sequence[Any],
            options: Any,
            caller: Caller,
            limits: Limits,
            started_s: float,
            units: int | None = None,
        ) -> Any: ...

        async def aside(self, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: D102
            ...

    async def classify_tokens(
        self,
        texts: Sequence[str],
        caller: Caller,
        limits: Limits,
        *,
        aggregation_strategy: str = "simple",
        truncate: bool = True,
    ) -> Any:
        """Entities in texts, or labels of their tokens; see `Service.embed`.

        Args:
            texts: As a client sent them.
            caller: Who waits.
            limits: Of the route.
            aggregation_strategy: One of `tasks.token_classification.STRATEGIES`.
            truncate: Cut texts that are longer than the model takes.

        Returns:
            A `Result`: per text a list of what `tasks.token_classification.entities` makes.

        Raises:
            ApiError: See `errors`.
            CallerLeft: The client has left.
        """
        started_s = time.perf_counter()
        located = await self._encode(_Question(texts, caller, limits, truncate, self._locating.encode))
        options = TokenOptions(aggregation_strategy not in ("none", "simple"))
        tokens = sum(map(len, located))
        result = await self._run([text.ids for text in located], options, caller, limits, started_s, tokens)
        values = await self._finish(tokens, self._entities, located, result.values, aggregation_strategy)
        return result._replace(values=values)

    def _entities(self, located: Sequence[Located], answers: Sequence[Any], strategy: str) -> list[Any]:
        labels = self.manifest.labels or ()
        found = []
        for text, scores in zip(located, answers, strict=True):
            tokens = self._locating.tokens(text)
            mine = [scores[token.place] for token in tokens]
            found.append(entities(tokens, mine, labels, strategy, self._locating.join))
        return found

    # How it is done.

    @functools.cached_property
    def _locating(self) -> LocatingTokenizer:
        unk = self.manifest.special_tokens.get("unk")
        return LocatingTokenizer(self._tokenizer, None if unk is None else unk.id)

    async def _encode(self, question: _Question) -> list[Any]:
        """Checks and tokenises: a short question here, a long one in turns on helper threads."""
        sizes = self._sizes(question)
        if sum(sizes) > INLINE_CHARS:
            return await self._tokenize(question, sizes)
        return question.encode(question.inputs, question.truncate)

    async def _finish(self, tokens: int, function: Callable[..., list[Any]], *arguments: Any) -> list[Any]:
        """Puts answers together, on a helper thread if there is much to do."""
        if tokens > _INLINE_TOKENS:
            found: list[Any] = await self.aside(function, *arguments)
            return found
        return function(*arguments)
