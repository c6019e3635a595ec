"""What is asked of a model whose answer is more than one row for each text: entities, answers, vectors of tokens.

Part of `Service`, which has what is common to all questions: checks, tokenisation in turns, the queue.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...tasks import RAW
from ...tasks.answers import AnswerOptions, best_answers
from ...tasks.entities import entities
from ...tasks.feature_extraction import TokenVectorOptions
from ...tasks.sparse_embedding import SparseEmbedding
from ...tasks.token_classification import TokenOptions
from ..errors import ApiError
from ..limits.bounds import INLINE_CHARS, Limits
from ..limits.callers import Caller
from .located import Asked, Located, LocatingTokenizer

if TYPE_CHECKING:
    from ...bundle import Manifest
    from .tokens import TextTokenizer

__all__ = ["StructuredQuestions"]

_WINDOW_TOKENS = 384
_STRIDE_TOKENS = 128

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

        def _encoder(self, cut_left: bool | None, prompt_name: str | None) -> Callable[..., list[Any]]: ...

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
            aggregation_strategy: One of `tasks.entities.STRATEGIES`.
            truncate: Cut texts that are longer than the model takes.

        Returns:
            A `Result`: per text a list of what `tasks.entities.entities` makes.

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

    async def answer(
        self,
        questions: Sequence[tuple[str, str]],
        caller: Caller,
        limits: Limits,
        options: AnswerOptions | None = None,
        *,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
    ) -> Any:
        """The parts of texts that answer questions; see `Service.embed`.

        Args:
            questions: Question and text of each.
            caller: Who waits.
            limits: Of the route.
            options: What is asked for.
            max_seq_len: Most tokens that the model reads at a time, the question included; None: 384, or what the model
                takes. A longer text is read in windows.
            doc_stride: Tokens that two windows have in common; None: 128, or half of `max_seq_len`.

        Returns:
            A `Result`: per question a list of what `tasks.answers.best_answers` makes.

        Raises:
            ApiError: See `errors`.
            CallerLeft: The client has left.
        """
        started_s = time.perf_counter()
        options = options or AnswerOptions()
        longest = self._tokenizer.max_tokens
        size = min(longest, _WINDOW_TOKENS) if max_seq_len is None else max_seq_len
        stride = min(size // 2, _STRIDE_TOKENS) if doc_stride is None else doc_stride
        if size > longest:
            raise ApiError("invalid_request", f"max_seq_len: expected at most {longest}, got {size}")
        if stride >= size:
            raise ApiError("invalid_request", f"doc_stride: expected less than max_seq_len={size}, got {stride}")
        cls = self.manifest.special_tokens["cls"]
        encode = functools.partial(
            self._locating.encode_questions,
            max_seq_len=size,
            doc_stride=stride,
            null_id=None if cls is None else cls.id,
        )
        asked = await self._encode(_Question(questions, caller, limits, True, encode))
        ids = [window for one in asked for window in one.ids]
        result = await self._run(ids, RAW, caller, limits, started_s, len(asked))
        values = await self._finish(result.tokens, self._answers, asked, result.values, options)
        return result._replace(values=values)

    @staticmethod
    def _answers(asked: Sequence[Asked], rows: Sequence[Any], options: AnswerOptions) -> list[Any]:
        found, start = [], 0
        for one in asked:
            end = start + len(one.windows)
            logits = [[row.tolist() for row in window] for window in rows[start:end]]
            found.append(best_answers(one.text, one.windows, logits, options))
            start = end
        return found

    async def embed_sparse(
        self,
        texts: Sequence[str],
        caller: Caller,
        limits: Limits,
        *,
        truncate: bool = True,
        cut_left: bool | None = None,
        prompt_name: str | None = None,
    ) -> Any:
        """Sparse vectors of texts over the words of the vocabulary; see `Service.embed`.

        Args:
            texts: As a client sent them.
            caller: Who waits.
            limits: Of the route.
            truncate: Cut texts that are longer than the model takes.
            cut_left: Cut off their beginning, or their end; None: what the model was trained with.
            prompt_name: Which of the model's prompts goes before each text; None: its default prompt.

        Returns:
            A `Result`: per text a `tasks.sparse_embedding.SparseVector`, which reads `[{"index": ..., "value": ...}]`.

        Raises:
            ApiError: See `errors`.
            CallerLeft: The client has left.
        """
        started_s = time.perf_counter()
        encode = self._encoder(cut_left, prompt_name)
        ids = await self._encode(_Question(texts, caller, limits, truncate, encode))
        return await self._run(ids, SparseEmbedding.usual, caller, limits, started_s)

    async def embed_all(
        self,
        texts: Sequence[str],
        caller: Caller,
        limits: Limits,
        *,
        truncate: bool = True,
        cut_left: bool | None = None,
        prompt_name: str | None = None,
    ) -> Any:
        """A vector of each token of texts, special tokens and prompts included; see `embed_sparse`.

        Returns:
            A `Result`: per text rows of f32 [width].

        Raises:
            ApiError: See `errors`.
            CallerLeft: The client has left.
        """
        started_s = time.perf_counter()
        encode = self._encoder(cut_left, prompt_name)
        ids = await self._encode(_Question(texts, caller, limits, truncate, encode))
        return await self._run(ids, TokenVectorOptions(), caller, limits, started_s, sum(map(len, ids)))

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
