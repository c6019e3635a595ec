"""How accurate a variant has to be: which figures can be bounded, and which bounds a measurement misses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

__all__ = [
    "AGREEMENT",
    "AT_MOST",
    "BOUND_NAMES",
    "CLOSE_COSINE",
    "CLOSE_SCORES",
    "CLOSE_TOKENS",
    "COSINE",
    "EMBEDDING_BOUNDS",
    "LOGIT_BOUNDS",
    "RELATIVE",
    "SHOWN",
    "Measured",
    "in_words",
    "missed",
    "pick",
]

Table = Mapping[str, Mapping[str, float]]
"""Bounds by variant, or by the dtype of its weights."""

LOGIT_BOUNDS = ("mean", "min", "max_prob_diff", "mean_prob_diff", "logit_error")
"""What can be bounded where probabilities are made of logits."""

EMBEDDING_BOUNDS = ("mean", "min", "centred_mean", "centred_min", "retrieval_overlap")
"""What can be bounded of embeddings."""

BOUND_NAMES = (*LOGIT_BOUNDS, "rank_correlation", "entity_f1", *EMBEDDING_BOUNDS[2:], "eval")
"""What can be bounded; those in `AT_MOST` from above, the others from below."""

SHOWN: Mapping[str, str] = {
    "centred_mean": "centred",
    "retrieval_overlap": "top-10 overlap",
    "entity_f1": "entity F1",
    "rank_correlation": "rank corr.",
    "max_prob_diff": "max prob. diff.",
    "max_diff": "max diff.",
    "eval": "--eval",
}
"""Figures that tables show beside the metric, if they were measured, and what they are called there."""

AT_MOST = frozenset({"max_prob_diff", "mean_prob_diff", "logit_error"})
"""Figures that are bounded from above."""

COSINE: Table = {
    "fp32": {"mean": 0.99999, "min": 0.99999},
    "bf16": {"mean": 0.9999, "min": 0.9995},
    "int8": {"mean": 0.985},
    "torch_ext-int8": {"mean": 0.996, "min": 0.99},
}
# logit_error is the error of the logits over all texts, relative to their size or to 1: bf16 keeps 8 bits and errors of
# the layers add up.
AGREEMENT: Table = {
    "fp32": {"mean": 0.999, "max_prob_diff": 0.005, "logit_error": 0.005},
    "bf16": {"mean": 0.98, "max_prob_diff": 0.15, "logit_error": 0.05},
    "int8": {"mean": 0.9, "logit_error": 0.4},
    "torch_ext-int8": {"mean": 0.95, "logit_error": 0.2},
}
RELATIVE: Table = {
    "fp32": {"logit_error": 0.005},
    "bf16": {"logit_error": 0.05},
    "int8": {"logit_error": 0.4},
    "torch_ext-int8": {"logit_error": 0.2},
}


CLOSE_COSINE: Mapping[str, float] = {"mean": 0.999, "min": 0.995}
"""Of a variant whose embeddings are those of the model: what a client may compare with vectors that it has stored."""

CLOSE_SCORES: Mapping[str, float] = {"max_prob_diff": 0.01, "min": 0.99}
"""Of a variant whose scores are those of the model, also where no activation makes probabilities of them.

A MiniLM that was trained to classify docstrings: 0.008 in bf16, 0.045 in int8, on 256 texts.
"""

CLOSE_TOKENS: Mapping[str, float] = {"max_prob_diff": 0.05, "mean_prob_diff": 0.002}
"""The same where every token has scores: one of thousands is further off than one of some hundred texts."""


def pick(table: Table, variant: str, dtype: str) -> dict[str, float]:
    """The bounds of a variant: its own, or those of everything that is stored with its dtype."""
    return dict(table.get(variant) or table[dtype])


class Measured(Protocol):
    """A measurement, as `bundle.Accuracy` keeps it."""

    @property
    def mean(self) -> float:
        """Mean of the metric over the texts."""

    @property
    def min(self) -> float:
        """Worst text."""

    @property
    def bound(self) -> Mapping[str, float]:
        """Bounds by name."""

    @property
    def details(self) -> Mapping[str, float]:
        """Other figures by name."""


def missed(accuracy: Measured, bounds: Mapping[str, float] | None = None) -> list[tuple[str, float, float]]:
    """For every bound that a measurement misses: name, measured value, bound. NaN misses every bound.

    A bound of a figure that was not measured is passed over: the exporter refuses it, but earlier bundles may hold one.

    Args:
        accuracy: The measurement.
        bounds: Other bounds than its own.
    """
    figures = {**accuracy.details, "mean": accuracy.mean, "min": accuracy.min}
    return [
        (name, figures[name], bound)
        for name, bound in (accuracy.bound if bounds is None else bounds).items()
        if name in figures and not (figures[name] <= bound if name in AT_MOST else figures[name] >= bound)
    ]


def in_words(name: str, value: float, bound: float, title: str = "") -> str:
    """A missed bound, such as `mean cosine 0.91 < 0.985`.

    Args:
        name: What was bounded.
        value: What was measured.
        bound: The bound.
        title: How the figure is called; its name by default.
    """
    return f"{title or name} {value:.6g} {'>' if name in AT_MOST else '<'} {bound:g}"
