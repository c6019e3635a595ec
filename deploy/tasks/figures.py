"""Figures of rows of numbers beside their cosine: agreement of what is found with them, and of their order."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["NEIGHBOURS", "centred_cosines", "overlap", "rank_correlation"]

Doubles = npt.NDArray[np.float64]

NEIGHBOURS = 10
"""How many nearest texts are compared."""


def centred_cosines(right: Doubles, got: Doubles) -> Doubles:
    """Cosines of embeddings once the mean of the reference's is taken from both.

    All embeddings of some models point one way: those of unrelated texts have a cosine of 0.8, and the cosine to the
    reference is near 1 whatever a variant does. What tells texts apart is the rest.

    Args:
        right: Of the reference [texts, width].
        got: Of a variant [texts, width].

    Returns:
        Per text, [texts]; NaN where a number is not finite.
    """
    centre = right.mean(axis=0)
    first, second = right - centre, got - centre
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = (first * second).sum(axis=1) / lengths
    # A text at the very centre: alike if both are.
    return np.asarray(np.where(lengths == 0, (first == second).all(axis=1).astype(np.float64), cosines))


def overlap(right: Doubles, got: Doubles, neighbours: int = NEIGHBOURS) -> float:
    """How many of the texts that are nearest to a text by cosine are the same for both, as a share; mean of the texts.

    Args:
        right: Of the reference [texts, width].
        got: Of a variant [texts, width], with which both the text and its neighbours are embedded.
        neighbours: How many nearest ones; at most half of the others, else nothing could be missed.

    Returns:
        1 where all are the same; a text whose numbers are not finite has none.
    """
    count = max(1, min(neighbours, (len(right) - 1) // 2))
    first, second = _nearest(right, count), _nearest(got, count)
    finite = np.isfinite(got).all(axis=1)
    shared = [len(set(mine) & set(yours)) for mine, yours in zip(first.tolist(), second.tolist(), strict=True)]
    return float((np.array(shared) * finite).mean() / count)


def _nearest(rows: Doubles, count: int) -> npt.NDArray[np.int64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.nan_to_num(rows / lengths, nan=0.0, posinf=0.0, neginf=0.0)
    similarity = units @ units.T
    np.fill_diagonal(similarity, -math.inf)
    return np.asarray(np.argsort(-similarity, axis=1, kind="stable")[:, :count])


def _ranks(values: Doubles) -> Doubles:
    """Place of each value in their order; equal ones share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[inverse], np.float64)


def rank_correlation(right: Doubles, got: Doubles) -> float:
    """Spearman's: 1 where both rank the texts alike; -1 where a value is not finite."""
    if not np.isfinite(got).all():
        return -1.0
    first, second = (ranks - ranks.mean() for ranks in (_ranks(right), _ranks(got)))
    size = math.sqrt(float((first**2).sum() * (second**2).sum()))
    # Where all are equal there is no order that could be wrong.
    return float((first * second).sum()) / size if size > 0 else 1.0
