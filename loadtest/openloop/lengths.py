"""Texts of lengths that follow a distribution, made of the words of real texts."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

from loadtest.options import CannotStartError

__all__ = ["parse_counts", "parse_lengths", "with_lengths"]

_FORMS = "texts, fixed:WORDS, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA, such as lognormal:40:0.8"
_MOST_WORDS, _MOST_SIGMA = 100_000, 5
"""Of one text; a distribution with a long tail is cut there."""


def parse_lengths(spec: str) -> Callable[[random.Random], int] | None:
    """Reads a distribution of text lengths.

    Args:
        spec: ``texts`` for texts as they are; otherwise one of `_FORMS`, in words.

    Returns:
        What draws a number of words, or None for texts as they are.

    Raises:
        CannotStartError: It is none of these.
    """
    name, *parts = spec.split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    valid = len(numbers) == len(parts) and all(0 < number <= _MOST_WORDS for number in numbers)
    whole = all(number.is_integer() for number in numbers)
    match name, numbers:
        case "texts", [] if not parts:
            return None
        case "fixed", [words] if valid and whole:
            return lambda rng: int(words)
        case "uniform", [low, high] if valid and whole and low <= high:
            return lambda rng: rng.randint(int(low), int(high))
        case "lognormal", [median, sigma] if valid and sigma <= _MOST_SIGMA:
            return lambda rng: max(1, round(min(_MOST_WORDS, rng.lognormvariate(math.log(median), sigma))))
    raise CannotStartError(f"--lengths: expected {_FORMS}, of at most {_MOST_WORDS} words, got {spec!r}")


def parse_counts(spec: str) -> tuple[int, int]:
    """Reads how many texts a request has: a number, or a range such as ``1-8`` from which each request draws.

    Raises:
        CannotStartError: It is neither.
    """
    low, dash, high = spec.partition("-")
    try:
        counts = (int(low), int(high if dash else low))
    except ValueError:
        counts = (0, 0)
    if not 1 <= counts[0] <= counts[1]:
        raise CannotStartError(f"--inputs-per-request: expected a number from 1, or a range such as 1-8, got {spec!r}")
    return counts


def with_lengths(texts: Sequence[str], draw: Callable[[random.Random], int], rng: random.Random) -> list[str]:
    """As many texts of drawn lengths; their words are those of `texts`, in order, from the start again at the end.

    Args:
        texts: At least one word in all.
        draw: What `parse_lengths` gives.
        rng: Draws the lengths.
    """
    words = itertools.cycle([word for text in texts for word in text.split()])
    return [" ".join(itertools.islice(words, draw(rng))) for _ in texts]
