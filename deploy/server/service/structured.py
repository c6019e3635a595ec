"""What is asked of a model whose answer is more than one row for each text: entities, answers, vectors of tokens.

Made of `Service.encode`, `run` and `ask`: checks, tokenisation in turns, the queue.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...bundle import Role
from ...tasks import RAW, Ids
from ...tasks.answers import AnswerOptions, best_answers
from ...tasks.entities import entities
from ...tasks.feature_extraction import TokenVectorOptions
from ...tasks.rows import FilledIds
from ...tasks.sparse_embedding import SparseEmbedding
from ...tasks.token_classification import TokenOptions
from ..errors import ApiError
from ..limits.bounds import Limits
from ..limits.callers import Caller
from .located import Asked, Located
from .request import Request, Result
from .service import Service

__all__ = ["answer", "classify_tokens", "embed_all", "embed_sparse"]

_WINDOW_TOKENS = 384
_STRIDE_TOKENS = 128

_INLINE_TOKENS = 2048
"""Answers of at most this many tokens are put together on the event loop, in 2 ms or less."""


async def classify_tokens(
    service: Service,
    texts: Sequence[str],
    caller: Caller,
    limits: Limits,
    *,
    aggregation_strategy: str = "simple",
    truncate: bool = True,
) -> Result:
    """Entities in texts, or labels of their tokens; see `Service.embed`.

    Args:
        service: The model.
        texts: As a client sent them.
        caller: Who waits.
        limits: Of the route.
        aggregation_strategy: One of `tasks.entities.STRATEGIES`.
        truncate: Cut texts that are longer than the model takes.

    Returns:
        Per text a list of what `tasks.entities.entities` makes.

    Raises:
        ApiError: See `errors`.
        CallerLeft: The client has left.
    """
    started_s = time.perf_counter()
    located = await service.encode(Request(texts, caller, limits, truncate, service.locating.encode))
    options = TokenOptions(aggregation_strategy not in ("none", "simple"))
    tokens = sum(map(len, located))
    result = await service.run([text.ids for text in located], options, caller, limits, started_s, tokens)
    values = await _finish(service, tokens, _entities, service, located, result.values, aggregation_strategy)
    return result._replace(values=values)


def _entities(service: Service, located: Sequence[Located], answers: Sequence[Any], strategy: str) -> list[Any]:
    labels = service.manifest.labels or ()
    found = []
    for text, scores in zip(located, answers, strict=True):
        tokens = service.locating.tokens(text)
        mine = [scores[token.place] for token in tokens]
        found.append(entities(tokens, mine, labels, strategy, service.locating.join))
    return found


async def answer(
    service: Service,
    questions: Sequence[tuple[str, str]],
    caller: Caller,
    limits: Limits,
    options: AnswerOptions | None = None,
    *,
    max_seq_len: int | None = None,
    doc_stride: int | None = None,
) -> Result:
    """The parts of texts that answer questions; see `Service.embed`.

    Args:
        service: The model.
        questions: Question and text of each.
        caller: Who waits.
        limits: Of the route.
        options: What is asked for.
        max_seq_len: Most tokens that the model reads at a time, the question included; None: 384, or what the model
            takes. A longer text is read in windows.
        doc_stride: Tokens that two windows have in common; None: 128, or half of `max_seq_len`.

    Returns:
        Per question a list of what `tasks.answers.best_answers` makes.

    Raises:
        ApiError: See `errors`.
        CallerLeft: The client has left.
    """
    started_s = time.perf_counter()
    options = options or AnswerOptions()
    longest = service.tokenizer.max_tokens
    size = min(longest, _WINDOW_TOKENS) if max_seq_len is None else max_seq_len
    stride = min(size // 2, _STRIDE_TOKENS) if doc_stride is None else doc_stride
    if size > longest:
        raise ApiError("invalid_request", f"max_seq_len: expected at most {longest}, got {size}")
    if stride >= size:
        raise ApiError("invalid_request", f"doc_stride: expected less than max_seq_len={size}, got {stride}")
    cls = service.manifest.special_tokens["cls"]
    encode = functools.partial(
        service.locating.encode_questions,
        max_seq_len=size,
        doc_stride=stride,
        null_id=None if cls is None else cls.id,
        most_tokens=service.settings.max_queue_tokens,
    )
    asked = await service.encode(Request(questions, caller, limits, True, encode))
    ids = [window for one in asked for window in one.ids]
    result = await service.run(ids, RAW, caller, limits, started_s, len(asked))
    cost = result.tokens + len(ids) * options.spans
    values = await _finish(service, cost, _answers, asked, result.values, options)
    return result._replace(values=values)


def _answers(asked: Sequence[Asked], rows: Sequence[Any], options: AnswerOptions) -> list[Any]:
    found, start = [], 0
    for one in asked:
        end = start + len(one.windows)
        logits = [[row.tolist() for row in window] for window in rows[start:end]]
        found.append(best_answers(one.text, one.windows, logits, options))
        start = end
    return found


async def embed_sparse(
    service: Service,
    texts: Sequence[str],
    caller: Caller,
    limits: Limits,
    *,
    truncate: bool = True,
    cut_left: bool | None = None,
    prompt_name: str | None = None,
) -> Result:
    """Sparse vectors of texts over the words of the vocabulary; see `Service.embed`.

    Args:
        service: The model.
        texts: As a client sent them.
        caller: Who waits.
        limits: Of the route.
        truncate: Cut texts that are longer than the model takes.
        cut_left: Cut off their beginning, or their end; None: what the model was trained with.
        prompt_name: Which of the model's prompts goes before each text; None: its default prompt.

    Returns:
        Per text a `tasks.sparse_embedding.SparseVector`, which reads `[{"index": ..., "value": ...}]`.

    Raises:
        ApiError: See `errors`.
        CallerLeft: The client has left.
    """
    encode = service.encoder(cut_left, prompt_name)
    return await service.ask(Request(texts, caller, limits, truncate, encode, SparseEmbedding.usual))


async def embed_all(
    service: Service,
    texts: Sequence[str],
    caller: Caller,
    limits: Limits,
    *,
    truncate: bool = True,
    cut_left: bool | None = None,
    prompt_name: str | None = None,
) -> Result:
    """A vector of each token of texts, special tokens and prompts included; see `embed_sparse`.

    A model that tells queries from documents has those of documents, and with the prompt `query` those of queries: as
    long, filled up, and without the tokens that have no vector, as it was trained.

    Returns:
        Per text rows of f32 [width].

    Raises:
        ApiError: See `errors`.
        CallerLeft: The client has left.
    """
    encode = service.encoder(cut_left, prompt_name)
    query = False
    if (vectors := service.manifest.token_vectors) is not None:
        query = prompt_name == "query"
        role = vectors.query if query else vectors.document
        if role is None:
            raise ApiError(
                "invalid_request",
                "prompt_name: this model fills queries up with tokens that others do not attend to (query_expansion "
                "without attend), which is not supported for DeBERTa and ESM, nor by bundles of earlier versions: "
                "export it again; documents are supported",
            )
        encode = functools.partial(_encode_role, encode, role)
    options = TokenVectorOptions(query)
    return await service.ask(Request(texts, caller, limits, truncate, encode, options, _count_tokens))


def _encode_role(
    encode: Callable[..., list[Ids]], role: Role, texts: Sequence[str], truncate: bool, first: int = 0
) -> list[Ids | FilledIds]:
    return [role.filled(ids) for ids in encode(texts, truncate, first, limit=role.max_tokens)]


def _count_tokens(ids: Sequence[Any], limits: Limits) -> int:
    return sum(map(len, ids))


async def _finish(service: Service, cost: int, function: Callable[..., list[Any]], *arguments: Any) -> list[Any]:
    """Puts answers together, on a helper thread if there is much to do: tokens, and spans of them, to look at."""
    if cost > _INLINE_TOKENS:
        return await service.aside(function, *arguments)
    return function(*arguments)
