"""text-classification: a score per class for each text."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bounds import AGREEMENT, CLOSE_SCORES, LOGIT_BOUNDS, RELATIVE, pick
from .task import RAW, ModelFolder, Needs, States, Task, TaskError, not_finite

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = ["ACTIVATIONS", "PROBLEM_TYPES", "ClassifyOptions", "TextClassification", "softmax"]

ACTIVATIONS = ("sigmoid", "softmax", "none")
"""What makes scores of logits."""

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")

_ACTIVATION_OF = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}
_ACTIVATION_OF_CLASS = {"Sigmoid": "sigmoid", "Softmax": "softmax", "Identity": "none"}
"""What sentence-transformers puts over a cross-encoder's logits, by the class of torch that the files name."""


def read_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a classifier's classes, in the order of its logits.

    Args:
        config: The model's `config.json`.

    Raises:
        TaskError: The ids of its labels have gaps, or their number is none.
    """
    names = config.get("id2label")
    if isinstance(names, dict) and names:
        try:
            by_id = {int(key): str(value) for key, value in names.items()}
        except ValueError:
            by_id = {}
        if sorted(by_id) == list(range(len(by_id))) and by_id:
            return tuple(by_id[index] for index in range(len(by_id)))
        raise TaskError(f"id2label: expected the ids 0 to n-1, got {sorted(names)[:5]!s:.200}")
    count = config.get("num_labels", 2)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise TaskError(f"num_labels: expected at least 1, got {count!r:.80}")
    return tuple(f"LABEL_{index}" for index in range(count))


def read_problem_type(folder: ModelFolder, labels: int) -> str:
    """How the logits of a classifier were trained, as far as the config says; one logit alone: as a regression.

    Raises:
        TaskError: It says something else.
    """
    declared = folder.config.get("problem_type")
    if declared in PROBLEM_TYPES:
        return str(declared)
    if declared is not None:
        raise TaskError(f"problem_type: expected one of {', '.join(PROBLEM_TYPES)}, got {declared!r:.80}")
    return "regression" if labels == 1 else "single_label_classification"


def read_activation(folder: ModelFolder, labels: int) -> str:
    """What makes scores of a classifier's logits.

    The class that sentence-transformers' files name, else what its cross-encoders do without one, else what the
    pipelines of transformers do.

    Args:
        folder: What the model's folder says.
        labels: How many labels it has.

    Raises:
        TaskError: The files name a class that is not supported.
    """
    named = folder.named_activation
    # Others are code of somebody's, which sentence-transformers runs only where it is trusted.
    if named is not None and named.startswith("torch."):
        known = _ACTIVATION_OF_CLASS.get(named.rpartition(".")[2])
        if known is None:
            raise TaskError(
                f"the model's files put {named} over its logits, which is not supported (only "
                f"{', '.join(_ACTIVATION_OF_CLASS)}); change it under sentence_transformers.activation_fn"
            )
        return known
    if folder.cross_encoder:
        return "sigmoid" if labels == 1 else "none"
    problem_type = folder.config.get("problem_type")
    if problem_type == "regression":
        return "none"
    return "sigmoid" if labels == 1 or problem_type == "multi_label_classification" else "softmax"


@dataclass(frozen=True)
class ClassifyOptions:
    """What a classification request asks for.

    Attributes:
        raw_scores: Logits as scores, without the model's activation.
    """

    raw_scores: bool


class TextClassification(Task):
    """Answers per text its labels with their scores, the best first: `[{"label": ..., "score": ...}]`."""

    name = "text-classification"
    needs = Needs(head=True, labels=True)
    auto_class = "AutoModelForSequenceClassification"
    architecture = "ForSequenceClassification"
    optimum_task = "text-classification"
    answers_pairs = True
    close = CLOSE_SCORES
    usual = ClassifyOptions(False)

    @classmethod
    def takes_pairs(cls, folder: ModelFolder) -> bool:
        """See `Task.takes_pairs`; a cross-encoder was trained on nothing else."""
        return folder.cross_encoder or super().takes_pairs(folder)

    @classmethod
    def read(cls, folder: ModelFolder) -> dict[str, Any]:
        """See `Task.read`."""
        labels = read_labels(folder.config)
        return {
            "labels": labels,
            "problem_type": read_problem_type(folder, len(labels)),
            "activation": read_activation(folder, len(labels)),
        }

    @classmethod
    def bound_names(cls, folder: ModelFolder) -> tuple[str, ...]:
        """See `Task.bound_names`; raw logits have no probabilities, and texts are ranked by one score only."""
        fields = cls.read(folder)
        names = ("mean", "min", "logit_error") if fields["activation"] == "none" else LOGIT_BOUNDS
        return (*names, "rank_correlation") if len(fields["labels"]) == 1 else names

    @property
    def activation(self) -> str:
        """One of `ACTIVATIONS`; bundles of before this field existed have the problem type only."""
        return self.model.activation or _ACTIVATION_OF[self.model.problem_type or PROBLEM_TYPES[0]]

    def scores(self, logits: Sequence[float]) -> Sequence[float]:
        """Scores of one text's logits, f32 [labels]."""
        if self.activation == "softmax":
            return softmax(logits)
        if self.activation == "sigmoid":
            return array("f", map(_sigmoid, logits))
        return logits

    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """See `Task.answers`."""
        logits = states.text_logits()
        labels = self.model.labels or ()
        if logits.width != len(labels):
            raise ValueError(f"expected a logit for each of {len(labels)} labels, got {logits.width}")
        result: list[Any] = []
        for row, finite, option in zip(logits, logits.finite, options, strict=True):
            if not finite or option is RAW:
                result.append(row if finite else not_finite("a logit"))
                continue
            # No activation changes the order, but scores may become equal.
            values = row.tolist()
            order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
            raw = option is not None and option.raw_scores
            result.append(self.answer(values if raw else self.scores(values), order))
        return result

    def answer(self, scores: Sequence[float], order: Sequence[int]) -> Any:
        """What is answered to one text.

        Args:
            scores: Of its labels.
            order: Indices of the labels, the best first.
        """
        labels = self.model.labels or ()
        return [{"label": labels[index], "score": scores[index]} for index in order]

    def comparison(self, texts: int) -> Comparison:
        """See `Task.comparison`."""
        from .comparison import Labels

        return Labels(texts, self.activation)

    def default_bounds(self, variant: str, dtype: str) -> dict[str, float]:
        """See `Task.default_bounds`."""
        return pick(RELATIVE if self.activation == "none" else AGREEMENT, variant, dtype)


def softmax(logits: Sequence[float]) -> Sequence[float]:
    """Softmax of some finite logits, f32 [n]."""
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = math.fsum(powers)
    return array("f", [power / total for power in powers])


def _sigmoid(logit: float) -> float:
    """1 / (1 + e^-x), with a power that cannot overflow."""
    power = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else power) / (1.0 + power)
