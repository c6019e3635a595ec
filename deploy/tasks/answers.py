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

    @property
    def spans(self) -> int:
        """How many spans of each window are looked at: aligned to words, several may be the same answer."""
        return 2 * self.top_k + 10 if self.align_to_words else self.top_k


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

    Looks at few of the spans: takes n log(longest) + count log(n) steps for n tokens, however alike they are.

    Args:
        starts: Probability of each token that a span begins there.
        ends: That one ends there.
        count: How many spans, at most.
        longest: Most tokens of a span.
    """
    size = len(starts)
    if not size:
        return []
    # Row h: for each token the likeliest end among it and the 2^h - 1 behind it, the first of equal ones.
    highest = [[(end, -last) for last, end in enumerate(ends)]]
    while 2 << (len(highest) - 1) <= min(longest, size):
        row, step = highest[-1], 1 << (len(highest) - 1)
        highest.append(list(map(max, row, row[step:])))

    def best(first: int, begin: int, stop: int) -> tuple[float, int, int, int, int]:
        """The likeliest span that begins at a token and ends from `begin` to before `stop`."""
        level = (stop - begin).bit_length() - 1
        end, last = max(highest[level][begin], highest[level][stop - (1 << level)])
        # Of equal spans, that which begins, then ends, first.
        return -starts[first] * end, first, -last, begin, stop

    # Each token's likeliest span; where it is taken, those with the ends before and behind its own are next.
    waiting = [best(first, first, min(first + longest, size)) for first in range(size)]
    heapq.heapify(waiting)
    found: list[tuple[float, int, int]] = []
    while waiting and len(found) < count and waiting[0][0] < 0:
        negative, first, last, begin, stop = heapq.heappop(waiting)
        found.append((-negative, first, last))
        if begin < last:
            heapq.heappush(waiting, best(first, begin, last))
        if last + 1 < stop:
            heapq.heappush(waiting, best(first, last + 1, stop))
    return found


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
    answers: dict[str, tuple[float, int, int]] = {}
    impossible = math.inf
    for window, rows in zip(windows, logits, strict=True):
        # The question has no part in the probabilities; the token for no answer has.
        part = rows[window.first : window.first + len(window.starts)]
        null = rows[:1] if window.null else []
        pairs = [*null, *part]
        if not pairs:
            continue
        starts, ends = (_probabilities([row[side] for row in pairs]) for side in (0, 1))
        impossible = min(impossible, starts[0] * ends[0] if window.null else 0.0)
        begin, words = len(null), window.words
        firsts, lasts = _bounds_of_words(words)
        for score, first, last in best_spans(starts[begin:], ends[begin:], options.spans, options.max_answer_len):
            if options.align_to_words and words[first] >= 0 and words[last] >= 0:
                first, last = firsts[first], lasts[last]
            start, end = window.starts[first], window.ends[last]
            answer = text[start:end].lower()
            before, start, end = answers.get(answer, (0.0, start, end))
            answers[answer] = before + score, start, end
    found = list(answers.values())
    if options.handle_impossible_answer and impossible < math.inf:
        found.append((impossible, 0, 0))
    best = sorted(found, key=lambda answer: -answer[0])[: options.top_k]
    return [{"score": score, "start": start, "end": end, "answer": text[start:end]} for score, start, end in best]


def _bounds_of_words(words: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each token the first and the last one of the word that it belongs to; itself, if to none."""
    firsts = list(range(len(words)))
    lasts = firsts[:]
    for place in range(1, len(words)):
        if words[place] >= 0 and words[place] == words[place - 1]:
            firsts[place] = firsts[place - 1]
    for place in range(len(words) - 2, -1, -1):
        if words[place] >= 0 and words[place] == words[place + 1]:
            lasts[place] = lasts[place + 1]
    return firsts, lasts
