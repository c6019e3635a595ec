"""Answers to questions, made of the logits of tokens by the rules of the pipelines of transformers.

A long text is read in windows that overlap, and equal answers add up.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["AnswerOptions", "Window", "best_answers", "best_spans"]


@dataclass(frozen=True)
class AnswerOptions:
    """What a request for answers asks for.

    Attributes:
        top_k: Most answers to a question.
        max_answer_len: Longest answer, in tokens.
        handle_impossible_answer: Whether the empty answer is one, too: that there is none in the text.
        align_to_words: Whether answers begin and end with whole words.
    """

    top_k: int = 1
    max_answer_len: int = 15
    handle_impossible_answer: bool = False
    align_to_words: bool = True


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a text with the question before it, as the model reads it.

    Attributes:
        first: Place of the part's first token among all of the window.
        starts: Where each token of the part begins in the text, in code points.
        ends: Where it ends.
        words: Number of the word that it belongs to; -1: none.
        null: Whether the window begins with the token that stands for no answer.
    """

    first: int
    starts: array[int]
    ends: array[int]
    words: array[int]
    null: bool


def _probabilities(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = math.fsum(powers)
    return [power / total for power in powers]


def best_spans(
    starts: Sequence[float], ends: Sequence[float], count: int, longest: int
) -> list[tuple[float, int, int]]:
    """The likeliest spans of tokens, likeliest first: probability, first and last token.

    Args:
        starts: Probability of each token that a span begins there.
        ends: That one ends there.
        count: How many spans, at most.
        longest: Most tokens of a span.
    """
    found: list[tuple[float, int, int]] = []
    highest_end = max(ends, default=0.0)
    for first in sorted(range(len(starts)), key=starts.__getitem__, reverse=True):
        if len(found) == count and starts[first] * highest_end < found[0][0]:
            break
        for last in range(first, min(first + longest, len(ends))):
            score = starts[first] * ends[last]
            # Of equal ones the first stays.
            item = (score, -first, -last)
            if score > 0 and len(found) < count:
                heapq.heappush(found, item)
            elif score > 0 and item > found[0]:
                heapq.heapreplace(found, item)
    return [(score, -first, -last) for score, first, last in sorted(found, reverse=True)]


def best_answers(
    text: str, windows: Sequence[Window], logits: Sequence[Sequence[Sequence[float]]], options: AnswerOptions
) -> list[dict[str, Any]]:
    """Answers to a question, best first: `{"score": ..., "start": ..., "end": ..., "answer": ...}`.

    Args:
        text: The text.
        windows: Its parts.
        logits: Per window, per token of it what the task answered.
        options: Of the request.
    """
    answers: dict[str, dict[str, Any]] = {}
    impossible = math.inf
    count = 2 * options.top_k + 10 if options.align_to_words else options.top_k
    for window, rows in zip(windows, logits, strict=True):
        # The question has no part in the probabilities; the token for no answer has.
        part = rows[window.first : window.first + len(window.starts)]
        null = rows[:1] if window.null else []
        pairs = [*null, *part]
        if not pairs:
            continue
        starts, ends = (_probabilities([row[side] for row in pairs]) for side in (0, 1))
        impossible = min(impossible, starts[0] * ends[0] if window.null else 0.0)
        begin = len(null)
        for score, first, last in best_spans(starts[begin:], ends[begin:], count, options.max_answer_len):
            start, end = _characters(window, first, last, options.align_to_words)
            answer = text[start:end]
            if (same := answers.get(answer.lower())) is not None:
                same["score"] += score
            else:
                answers[answer.lower()] = {"score": score, "start": start, "end": end, "answer": answer}
    found = list(answers.values())
    if options.handle_impossible_answer and impossible < math.inf:
        found.append({"score": impossible, "start": 0, "end": 0, "answer": ""})
    return sorted(found, key=lambda answer: -answer["score"])[: options.top_k]


def _characters(window: Window, first: int, last: int, align: bool) -> tuple[int, int]:
    """Where a span of tokens begins and ends in the text; with the words that it begins and ends in, if wanted."""
    words = window.words
    if align and words[first] >= 0 and words[last] >= 0:
        while first > 0 and words[first - 1] == words[first]:
            first -= 1
        while last + 1 < len(words) and words[last + 1] == words[last]:
            last += 1
    return window.starts[first], window.ends[last]
