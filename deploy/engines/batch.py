"""Texts that run together: packed without padding, or padded, and how they are grouped."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

from ..tasks import Ids
from ..tasks.rows import FilledIds

if TYPE_CHECKING:
    Bounds = array[int]

__all__ = [
    "BATCH_TOKENS",
    "Batch",
    "FilledIds",
    "Ids",
    "Item",
    "PairIds",
    "batches",
    "encoded",
    "groups",
    "joined",
    "plain_ids",
]

BATCH_TOKENS = 2048
"""Token budget of a batch: what a server takes by default, and so what variants are verified with."""


@dataclass(frozen=True)
class PairIds:
    """Token ids of a pair of texts.

    Attributes:
        ids: Of both with all special tokens.
        types: Which text each token belongs to, 0 or 1.
    """

    ids: Ids
    types: Ids

    def __len__(self) -> int:
        return len(self.ids)


Item: TypeAlias = Ids | PairIds | FilledIds
"""What engines take of a text, or of a pair of texts."""


def plain_ids(item: Item) -> Ids:
    """Token ids of an item, whatever else it says."""
    return item.ids if isinstance(item, (PairIds, FilledIds)) else item


class Batch:
    """Texts that run together.

    Attributes:
        ids: Token ids of each text, special tokens included.
        types: Token types of each text; None: 0 everywhere.
        attended: How many tokens of each text are attended to, the first ones; None: all.
        texts: Index of each text in what the batch was taken from.
    """

    def __init__(self, ids: Sequence[Item], texts: Sequence[int] | None = None) -> None:
        self.items = ids
        self.ids: list[Ids] = [plain_ids(text) for text in ids]
        self.types: list[Ids] | None = None
        if any(isinstance(text, PairIds) for text in ids):
            self.types = [text.types if isinstance(text, PairIds) else array("q", bytes(8 * len(text))) for text in ids]
        self.attended: Sequence[int] | None = None
        if any(isinstance(text, FilledIds) for text in ids):
            self.attended = array("i", [text.attended if isinstance(text, FilledIds) else len(text) for text in ids])
        self.texts: Sequence[int] = range(len(ids)) if texts is None else texts

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(text) for text in self.ids]

    def part(self, rows: Sequence[int]) -> Batch:
        """Some of its texts."""
        return Batch([self.items[row] for row in rows], [self.texts[row] for row in rows])

    def bounds(self) -> Bounds:
        """Where texts begin in a packed batch, and its end, i32 [texts + 1]."""
        return array("i", accumulate(self.lengths, initial=0))


def encoded(encodings: Iterable[Any], token_types: bool, pairs: bool) -> list[Item]:
    """What engines take of encodings of the tokenizers library; without texts that have no token.

    Args:
        encodings: Of texts, or of pairs.
        token_types: Whether the model is given their token types; else all are 0.
        pairs: Whether they are of pairs.
    """
    rows: list[Item] = []
    for encoding in encodings:
        ids = array("q", encoding.ids)
        if len(ids):
            types = encoding.type_ids if token_types else [0] * len(ids)
            rows.append(PairIds(ids, array("q", types)) if pairs else ids)
    return rows


def joined(rows: Sequence[Ids]) -> Ids:
    """Token ids or types of texts one after the other, i64 [tokens of all]."""
    return array("q", b"".join(rows))


def groups(lengths: Sequence[int], padding_bound: float = math.inf, max_padded: float = math.inf) -> list[list[int]]:
    """Which texts are padded to the same length and run together; longest first.

    Args:
        lengths: Tokens of each text.
        padding_bound: How many tokens a group may have with padding, in tokens without it.
        max_padded: How many tokens a group may have with padding; a single text may have more.

    Returns:
        Indices of texts.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    result: list[list[int]] = []
    longest = tokens = 0
    for index in order:
        size = lengths[index]
        padded = longest * (len(result[-1]) + 1) if result else 0
        if result and padded <= padding_bound * (tokens + size) and padded <= max_padded:
            result[-1].append(index)
            tokens += size
        else:
            result.append([index])
            longest = tokens = size
    return result


def batches(ids: Sequence[Item], size: int, max_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Sorts texts by length and cuts them into batches, as far as possible like those of a busy server.

    Args:
        ids: Token ids of each text.
        size: Texts per batch, at most.
        max_tokens: Tokens per batch, at most; a batch always has at least one text.
    """
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    result: list[Batch] = []
    start = 0
    while start < len(order):
        end, tokens = start + 1, len(ids[order[start]])
        while end < min(len(order), start + size) and tokens + len(ids[order[end]]) <= max_tokens:
            tokens += len(ids[order[end]])
            end += 1
        rows = order[start:end]
        result.append(Batch([ids[row] for row in rows], rows))
        start = end
    return result
