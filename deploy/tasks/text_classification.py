"""text-classification: a score per class for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .bounds import AGREEMENT, BOUND_NAMES, RELATIVE, pick
from .task import RAW, ModelFolder, Needs, States, Task, TaskError, not_finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .comparison import Comparison

__all__ = ["ACTIVATIONS", "PROBLEM_TYPES", "TextClassification", "softmax"]

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
        raise TaskError(f"id2label: expected the ids 0 to n-1, got {sorted(names)[:5]}")
    count = config.get("num_labels", 2)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise TaskError(f"num_labels: expected at least 1, got {count!r:.80}")
    return tuple(f"LABEL_{index}" for index in range(count))


def read_problem_type(folder: ModelFolder, labels: int) -> str:
    """How the logits of a classifier were trained, as far as the config says; one logit alone: as a regression."""
    declared = folder.config.get("problem_type")
    if declared in PROBLEM_TYPES:
        return str(declared)
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


class TextClassification(Task):
    """Answers per text its labels with their scores, the best first: `[{"label": ..., "score": ...}]`."""

    name = "text-classification"
    needs = Needs(head=True, labels=True)
    auto_class = "AutoModelForSequenceClassification"
    architecture = "ForSequenceClassification"
    optimum_task = "text-classification"

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
        """See `Task.bound_names`; logits that are answered as they are have no probabilities."""
        if cls.read(folder)["activation"] == "none":
            return ("mean", "min", "logit_error")
        return BOUND_NAMES

    @property
    def activation(self) -> str:
        """One of `ACTIVATIONS`; bundles of before this field existed have the problem type only."""
        return self.model.activation or _ACTIVATION_OF[self.model.problem_type or PROBLEM_TYPES[0]]

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores of logits, f32 [texts, labels]."""
        import numpy as np

        if self.activation == "softmax":
            return softmax(logits)
        if self.activation == "sigmoid":
            with np.errstate(over="ignore"):
                return np.asarray(1.0 / (1.0 + np.exp(-logits)), np.float32)
        return logits

    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """See `Task.answers`."""
        import numpy as np

        logits = states.text_logits()
        labels = self.model.labels or ()
        if logits.shape[1] != len(labels):
            raise ValueError(f"expected {len(labels)} logits as the manifest's labels, got {logits.shape[1]}")
        finite = np.asarray(np.isfinite(logits).all(axis=1))
        with np.errstate(invalid="ignore"):
            scores = self.scores(logits)
        order = np.argsort(-scores, axis=1, kind="stable").tolist()
        result: list[Any] = []
        for index, option in enumerate(options):
            if not finite[index]:
                result.append(not_finite("a logit"))
            elif option is RAW:
                result.append(logits[index])
            else:
                result.append(self.answer(scores[index], order[index]))
        return result

    def answer(self, scores: NDArray[np.float32], order: Sequence[int]) -> Any:
        """What is answered to one text.

        Args:
            scores: Of its labels.
            order: Indices of the labels, the best first.
        """
        labels = self.model.labels or ()
        return [{"label": labels[index], "score": float(scores[index])} for index in order]

    def comparison(self, texts: int) -> Comparison:
        """See `Task.comparison`."""
        from .comparison import Labels

        return Labels(texts, self.activation)

    def default_bounds(self, variant: str, dtype: str) -> dict[str, float]:
        """See `Task.default_bounds`."""
        return pick(RELATIVE if self.activation == "none" else AGREEMENT, variant, dtype)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the last axis, f32 [rows, n]."""
    import numpy as np

    powers: NDArray[np.float32] = np.exp(logits - logits.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers
