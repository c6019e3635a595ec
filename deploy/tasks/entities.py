"""Entities, made of the labels of a text's tokens by the rules of the pipelines of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["STRATEGIES", "TokenText", "entities", "spans"]

STRATEGIES = ("none", "simple", "first", "average", "max")
"""How tokens become entities. `none`: each token is one. `simple`: neighbours with one label are one. The others first
make words of tokens, with the label of the first token, of the mean of their probabilities, or of the surest one."""

_OUTSIDE = "O"
"""The label of what is no entity, and is not answered."""


class TokenText(NamedTuple):
    """A token of a text, as entities are made of it.

    Attributes:
        place: Where it is among the tokens of the text, special ones included.
        word: How its id reads.
        start: Where it begins in the text, in code points.
        end: Where it ends.
        continues: Whether it goes on with the word of the token before it.
    """

    place: int
    word: str
    start: int
    end: int
    continues: bool


class _Part(NamedTuple):
    """A token or a word with its label."""

    label: str
    score: float
    word: str
    start: int
    end: int
    place: int


def entities(
    tokens: Sequence[TokenText],
    scores: Sequence[Sequence[tuple[int, float]]],
    labels: Sequence[str],
    strategy: str,
    join: Callable[[list[str]], str],
) -> list[dict[str, Any]]:
    """Entities of a text, in its order.

    Args:
        tokens: The text's tokens but special ones.
        scores: Per token what the task answered: with all labels where the strategy makes words.
        labels: Names of the labels.
        strategy: One of `STRATEGIES`.
        join: Makes text of how tokens read.

    Returns:
        `none`: `entity`, `score`, `index`, `word`, `start`, `end` of each token; else `entity_group`, `score`, `word`,
        `start`, `end` of each entity.
    """
    if strategy in ("none", "simple"):
        parts = [
            _Part(labels[best[0][0]], best[0][1], token.word, token.start, token.end, token.place)
            for token, best in zip(tokens, scores, strict=True)
        ]
    else:
        parts = [_word(word, labels, strategy, join) for word in _words(tokens, scores)]
    if strategy == "none":
        return [
            {
                "entity": part.label,
                "score": part.score,
                "index": part.place,
                "word": part.word,
                "start": part.start,
                "end": part.end,
            }
            for part in parts
            if part.label != _OUTSIDE
        ]
    return [
        {
            "entity_group": _kind(group[0].label),
            "score": math.fsum(part.score for part in group) / len(group),
            "word": join([part.word for part in group]),
            "start": group[0].start,
            "end": group[-1].end,
        }
        for group in _groups(parts)
        if _kind(group[0].label) != _OUTSIDE
    ]


def spans(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """Entities of neighbours with one label: index of the first token, of the last one, and their kind."""
    parts = [_Part(label, 1.0, "", 0, 0, index) for index, label in enumerate(labels)]
    found = {(group[0].place, group[-1].place, _kind(group[0].label)) for group in _groups(parts)}
    return {span for span in found if span[2] != _OUTSIDE}


_Token = tuple[TokenText, Sequence[tuple[int, float]]]


def _words(tokens: Sequence[TokenText], scores: Sequence[Sequence[tuple[int, float]]]) -> list[list[_Token]]:
    words: list[list[_Token]] = []
    for token, found in zip(tokens, scores, strict=True):
        if token.continues and words:
            words[-1].append((token, found))
        else:
            words.append([(token, found)])
    return words


def _word(tokens: Sequence[_Token], labels: Sequence[str], strategy: str, join: Callable[[list[str]], str]) -> _Part:
    if strategy == "first":
        label, score = tokens[0][1][0]
    elif strategy == "max":
        label, score = max((found[0] for _, found in tokens), key=lambda best: best[1])
    else:
        sums = [0.0] * len(labels)
        for _, found in tokens:
            for index, probability in found:
                sums[index] += probability
        label = max(range(len(sums)), key=sums.__getitem__)
        score = sums[label] / len(tokens)
    first, last = tokens[0][0], tokens[-1][0]
    return _Part(labels[label], score, join([token.word for token, _ in tokens]), first.start, last.end, first.place)


def _kind(label: str) -> str:
    """What an entity with this label is called: `PER` for `B-PER`."""
    return label.split("-", 1)[-1]


def _tag(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and of which kind that is."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _groups(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Neighbours of one kind; a label that begins an entity begins a group."""
    groups: list[list[_Part]] = []
    for part in parts:
        begins, kind = _tag(part.label)
        if groups and not begins and _tag(groups[-1][-1].label)[1] == kind:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups
