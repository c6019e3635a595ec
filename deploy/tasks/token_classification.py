"""token-classification: a label for each token of a text, and entities made of tokens with one label.

An engine answers the labels of tokens with their probabilities; `entities.py` makes entities of them with the help of
the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .bounds import AGREEMENT, CLOSE_TOKENS, LOGIT_BOUNDS, pick
from .task import RAW, ModelFolder, Needs, States, Task, not_finite
from .text_classification import PROBLEM_TYPES, read_labels

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = ["TokenClassification", "TokenOptions"]


@dataclass(frozen=True)
class TokenOptions:
    """What a request for labels of tokens asks for.

    Attributes:
        all_labels: The probabilities of all labels, not of the best one alone.
    """

    all_labels: bool


class TokenClassification(Task):
    """Answers per text, per token pairs of a label's index and its probability, likeliest first."""

    name = "token-classification"
    needs = Needs(head=True, labels=True)
    auto_class = "AutoModelForTokenClassification"
    architecture = "ForTokenClassification"
    optimum_task = "token-classification"
    close = CLOSE_TOKENS
    usual = TokenOptions(False)

    @classmethod
    def read(cls, folder: ModelFolder) -> dict[str, Any]:
        """See `Task.read`."""
        return {"labels": read_labels(folder.config), "problem_type": PROBLEM_TYPES[0], "activation": "softmax"}

    @classmethod
    def bound_names(cls, folder: ModelFolder) -> tuple[str, ...]:
        """See `Task.bound_names`."""
        return (*LOGIT_BOUNDS, "entity_f1")

    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """See `Task.answers`; to `RAW`, the rows of logits of its tokens."""
        result: list[Any] = [None] * len(options)
        for wanted in dict.fromkeys(options):
            rows = [index for index, option in enumerate(options) if option == wanted]
            texts = [index for index in rows for _ in states.ids[index]]
            positions = [place for index in rows for place in range(len(states.ids[index]))]
            if wanted is RAW:
                logits = states.token_logits(texts, positions)
                answers: list[tuple[Any, Any]] = list(zip(logits, logits.finite, strict=True))
            else:
                labels = len(self.model.labels or ())
                best, scores = states.top_k(texts, positions, labels if wanted.all_labels else 1)
                answers = [
                    (list(zip(indices, row, strict=True)), math.isfinite(row[0]))
                    for indices, row in zip(best, scores, strict=True)
                ]
            for index, found in groupby(zip(texts, answers, strict=True), key=lambda item: item[0]):
                tokens = [answer for _, answer in found]
                right = all(finite for _, finite in tokens)
                result[index] = [token for token, _ in tokens] if right else not_finite("a logit")
        return result

    def comparison(self, texts: int) -> Comparison:
        """See `Task.comparison`."""
        from .comparison import TokenLabels

        return TokenLabels(texts, self.model.labels or ())

    def default_bounds(self, variant: str, dtype: str) -> dict[str, float]:
        """See `Task.default_bounds`."""
        return pick(AGREEMENT, variant, dtype)
