"""Compares a variant with transformers in fp32, and holds it to bounds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from deploy.bundle import VARIANTS, Accuracy
from deploy.export.engines import Batch, Engine
from deploy.export.errors import ExportError

__all__ = ["BOUND_NAMES", "Comparison", "Result", "default_bounds", "make_comparison"]

Floats = npt.NDArray[np.floating]

TIE = 0.01
"""Two classes or tokens whose probabilities in fp32 differ by less are equally right."""

_COSINE_BOUNDS: Mapping[str, Mapping[str, float]] = {
    "fp32": {"mean": 0.99999, "min": 0.99999},
    "bf16": {"mean": 0.9999, "min": 0.9995},
    "int8": {"mean": 0.985},
    "torch_ext-int8": {"mean": 0.996, "min": 0.99},
}
# logit_error is the relative error of the logits over all texts: bf16 keeps 8 bits and errors of the layers add up.
_AGREEMENT_BOUNDS: Mapping[str, Mapping[str, float]] = {
    "fp32": {"mean": 0.999, "max_prob_diff": 0.005, "logit_error": 0.005},
    "bf16": {"mean": 0.98, "max_prob_diff": 0.15, "logit_error": 0.05},
    "int8": {"mean": 0.9, "logit_error": 0.4},
    "torch_ext-int8": {"mean": 0.95, "logit_error": 0.2},
}
_REGRESSION_BOUNDS: Mapping[str, Mapping[str, float]] = {
    "fp32": {"logit_error": 0.005},
    "bf16": {"logit_error": 0.05},
    "int8": {"logit_error": 0.4},
    "torch_ext-int8": {"logit_error": 0.2},
}
_AT_MOST = frozenset({"max_prob_diff", "mean_prob_diff", "logit_error"})

BOUND_NAMES = ("mean", "min", "max_prob_diff", "mean_prob_diff", "logit_error")
"""What can be bounded; `mean` and `min` from below, the others from above."""


def default_bounds(task: str, problem_type: str | None, variant: str) -> dict[str, float]:
    """The bounds of a variant: its own, or those of everything that is stored with its dtype."""
    bounds = _REGRESSION_BOUNDS if problem_type == "regression" else _AGREEMENT_BOUNDS
    if task == "feature-extraction":
        bounds = _COSINE_BOUNDS
    return dict(bounds.get(variant) or bounds[VARIANTS[variant].dtype])


@dataclass(frozen=True)
class Result:
    """What a variant measured, and which bounds it missed.

    Attributes:
        accuracy: The measurement.
        missed: For every bound that was missed: name, measured value, bound.
        worst: Index of the worst text.
    """

    accuracy: Accuracy
    missed: Sequence[tuple[str, float, float]] = field(default_factory=list)
    worst: int = 0

    def with_details(self, **figures: float) -> Result:
        """The same, with further figures by name."""
        details = {**self.accuracy.details, **{name: float(value) for name, value in figures.items()}}
        return replace(self, accuracy=replace(self.accuracy, details=details))

    def __str__(self) -> str:
        """The missed bounds, such as `mean cosine 0.91 < 0.985`."""
        parts = []
        for name, value, bound in self.missed:
            title = f"{name} {self.accuracy.metric}" if name in {"mean", "min"} else name
            parts.append(f"{title} {value:.6g} {'>' if name in _AT_MOST else '<'} {bound:g}")
        return " and ".join(parts)


class Comparison(ABC):
    """Holds what transformers computed, and compares others with it."""

    metric: str

    @abstractmethod
    def remember(self, batch: Batch, output: Floats) -> None:
        """Keeps the reference's output for a batch."""

    @abstractmethod
    def measure(self, runs: Sequence[tuple[Batch, Floats]]) -> tuple[npt.NDArray[np.float64], dict[str, float]]:
        """The metric per text (NaN where the output is not finite), and other figures."""

    def fill(self, engine: Engine, work: Sequence[Batch]) -> None:
        """Runs the reference.

        Raises:
            ExportError: Its output is not finite; nothing can be compared with that.
        """
        for batch in work:
            output = engine.run(batch)
            if not np.isfinite(output).all():
                raise ExportError("the model gives NaN or infinity in fp32 on the texts; its weights are not usable")
            self.remember(batch, output)

    def check(self, engine: Engine, work: Sequence[Batch], bounds: Mapping[str, float]) -> Result:
        """Runs a variant on the same batches and compares."""
        return self.judge([(batch, engine.run(batch)) for batch in work], bounds)

    def judge(self, runs: Sequence[tuple[Batch, Floats]], bounds: Mapping[str, float]) -> Result:
        """Compares what a variant made of the batches."""
        per_text, details = self.measure(runs)
        values = np.nan_to_num(per_text, nan=-1.0, posinf=-1.0, neginf=-1.0)
        figures = {"mean": float(values.mean()), "min": float(values.min())}
        clean = {name: value if math.isfinite(value) else 1e30 for name, value in details.items()}
        missed = [
            (name, measured, bound)
            for name, bound in bounds.items()
            for measured in [{**figures, **clean}.get(name)]
            if measured is not None and not (measured <= bound if name in _AT_MOST else measured >= bound)
        ]
        accuracy = Accuracy(self.metric, figures["mean"], figures["min"], len(values), dict(bounds), clean)
        return Result(accuracy, missed, int(values.argmin()))


class Cosine(Comparison):
    """Embeddings: the cosine to the reference's, per text."""

    metric = "cosine"

    def __init__(self, texts: int) -> None:
        self._texts = texts
        self._reference: dict[int, Floats] = {}

    def remember(self, batch: Batch, output: Floats) -> None:
        """See `Comparison.remember`."""
        self._reference.update(zip(batch.texts, output, strict=True))

    def measure(self, runs: Sequence[tuple[Batch, Floats]]) -> tuple[npt.NDArray[np.float64], dict[str, float]]:
        """See `Comparison.measure`."""
        cosines = np.full(self._texts, np.nan)
        length_error = 0.0
        for batch, output in runs:
            right = np.stack([self._reference[text] for text in batch.texts]).astype(np.float64)
            got = output.astype(np.float64)
            norms = np.linalg.norm(right, axis=1), np.linalg.norm(got, axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                cosines[list(batch.texts)] = (right * got).sum(axis=1) / (norms[0] * norms[1])
                length_error = max(length_error, float(np.abs(norms[1] / norms[0] - 1).max()))
        return cosines, {"length_error": length_error}


def _softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def _relative_error(right: Floats, got: Floats, centred: bool) -> tuple[float, float]:
    """Squared error and squared size of logits; without the mean of each row, where softmax does not see it."""
    first, second = right.astype(np.float64), got.astype(np.float64)
    if centred:
        first = first - first.mean(axis=-1, keepdims=True)
        second = second - second.mean(axis=-1, keepdims=True)
    return float(((first - second) ** 2).sum()), float((first**2).sum())


def _ratio(error: float, size: float) -> float:
    return math.sqrt(error / size) if size > 0 else (0.0 if error == 0 else math.inf)


class Labels(Comparison):
    """Class logits: whether the best label is the same, and how far probabilities are apart."""

    def __init__(self, texts: int, problem_type: str) -> None:
        self._texts = texts
        self._problem_type = problem_type
        self._reference: dict[int, Floats] = {}
        self.metric = "closeness" if problem_type == "regression" else "agreement"

    def remember(self, batch: Batch, output: Floats) -> None:
        """See `Comparison.remember`."""
        self._reference.update(zip(batch.texts, output, strict=True))

    def measure(self, runs: Sequence[tuple[Batch, Floats]]) -> tuple[npt.NDArray[np.float64], dict[str, float]]:
        """See `Comparison.measure`."""
        single = self._problem_type == "single_label_classification"
        order = [text for batch, _ in runs for text in batch.texts]
        right = np.stack([self._reference[text] for text in order]).astype(np.float64)
        got = np.concatenate([output for _, output in runs]).astype(np.float64)
        error = _ratio(*_relative_error(right, got, centred=single and right.shape[1] > 1))
        per_text = np.full(self._texts, np.nan)
        if self._problem_type == "regression":
            # 1 for the same value, 0 for one that is off by the size of the reference's values.
            size = np.sqrt((right**2).mean(axis=0))
            per_text[order] = (1 - np.abs(got - right) / np.maximum(size, 1e-12)).min(axis=1)
            return per_text, {"logit_error": error, "max_diff": float(np.abs(got - right).max())}
        if single:
            first, second = _softmax(right), _softmax(got)
            rows = np.arange(len(first))
            same = first[rows, second.argmax(axis=1)] >= first.max(axis=1) - TIE
        else:
            with np.errstate(over="ignore"):
                first, second = 1 / (1 + np.exp(-right)), 1 / (1 + np.exp(-got))
            same = (((first >= 0.5) == (second >= 0.5)) | (np.abs(first - 0.5) < TIE)).all(axis=1)
        per_text[order] = np.where(np.isfinite(second).all(axis=1), same, np.nan)
        difference = np.abs(first - second).max(axis=1)
        return per_text, {
            "max_prob_diff": float(difference.max()),
            "mean_prob_diff": float(difference.mean()),
            "logit_error": error,
        }


class Masks(Comparison):
    """Logits at masked tokens: whether the best token is the same, and how far probabilities are apart.

    A vocabulary is wide: of every row only the logits of the best tokens and of some others are kept, and what is
    needed to make probabilities of them.
    """

    metric = "agreement"
    _BEST = 64
    _OTHERS = 192

    def __init__(self, texts: int) -> None:
        self._texts = texts
        self._columns: dict[int, list[npt.NDArray[np.int64]]] = {}
        self._reference: dict[int, list[tuple[npt.NDArray[np.float64], float]]] = {}

    @staticmethod
    def _log_sum_exp(row: npt.NDArray[np.float64]) -> float:
        top = float(row.max())
        return top + math.log(float(np.exp(row - top).sum()))

    def remember(self, batch: Batch, output: Floats) -> None:
        """See `Comparison.remember`."""
        rows = iter(output)
        for text, positions in zip(batch.texts, batch.masks, strict=True):
            self._columns[text], self._reference[text] = [], []
            for _ in positions:
                row = next(rows).astype(np.float64)
                count = min(self._BEST, len(row))
                best = np.argpartition(-row, count - 1)[:count]
                best = best[np.argsort(-row[best], kind="stable")]
                others = np.linspace(0, len(row) - 1, min(self._OTHERS, len(row))).astype(np.int64)
                columns = np.concatenate([best, others])
                self._columns[text].append(columns)
                self._reference[text].append((row[columns], self._log_sum_exp(row)))

    def measure(self, runs: Sequence[tuple[Batch, Floats]]) -> tuple[npt.NDArray[np.float64], dict[str, float]]:
        """See `Comparison.measure`."""
        per_text = np.full(self._texts, np.nan)
        errors, sizes, differences = 0.0, 0.0, []
        for batch, output in runs:
            rows = iter(output)
            for text, positions in zip(batch.texts, batch.masks, strict=True):
                same = []
                for columns, (right, total) in zip(self._columns[text], self._reference[text], strict=True):
                    row = next(rows).astype(np.float64)
                    if not np.isfinite(row).all():
                        same.append(math.nan)
                        errors = math.inf
                        continue
                    got = row[columns]
                    first, second = np.exp(right - total), np.exp(got - self._log_sum_exp(row))
                    best = int(row.argmax())
                    place = np.flatnonzero(columns == best)
                    same.append(float(len(place) > 0 and first[place[0]] >= first[0] - TIE))
                    differences.append(float(np.abs(first - second).max()))
                    error, size = _relative_error(right, got, centred=True)
                    errors, sizes = errors + error, sizes + size
                per_text[text] = float(np.mean(same)) if len(same) == len(positions) and same else math.nan
        return per_text, {
            "max_prob_diff": max(differences, default=math.inf),
            "mean_prob_diff": float(np.mean(differences)) if differences else math.inf,
            "logit_error": _ratio(errors, sizes),
        }


def make_comparison(task: str, texts: int, problem_type: str | None) -> Comparison:
    """The comparison that fits a task."""
    if task == "feature-extraction":
        return Cosine(texts)
    return Masks(texts) if task == "fill-mask" else Labels(texts, problem_type or "single_label_classification")
