"""Runs a variant on real texts, compares it with transformers in fp32, and holds it to bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deploy.bundle import Accuracy
from deploy.engines.batch import Batch
from deploy.engines.engine import Engine
from deploy.export.errors import ExportError
from deploy.tasks import Task
from deploy.tasks.bounds import in_words, missed

__all__ = ["Result", "Verification"]


@dataclass(frozen=True)
class Result:
    """What a variant measured, and which bounds it missed.

    Attributes:
        accuracy: The measurement.
        missed: For every bound that was missed: name, measured value, bound.
    """

    accuracy: Accuracy
    missed: Sequence[tuple[str, float, float]] = field(default_factory=list)

    def with_details(self, **figures: float) -> Result:
        """The same, with further figures by name, which may have bounds."""
        details = {**self.accuracy.details, **{name: float(value) for name, value in figures.items()}}
        accuracy = replace(self.accuracy, details=details)
        return Result(accuracy, missed(accuracy))

    def __str__(self) -> str:
        """The missed bounds, such as `mean cosine 0.91 < 0.985`."""
        return " and ".join(
            in_words(name, value, bound, f"{name} {self.accuracy.metric}" if name in {"mean", "min"} else name)
            for name, value, bound in self.missed
        )


class Verification:
    """The texts of an export, and what transformers answers to them.

    Attributes:
        work: The texts, in batches.
        task: What is answered.
    """

    def __init__(self, work: Sequence[Batch], task: Task) -> None:
        self.work = work
        self.task = task
        self._texts = sum(map(len, work))
        self._comparison = task.comparison(self._texts)

    def answers(self, engine: Engine) -> list[tuple[int, Any]]:
        """What an engine answers to every text, with the index of the text, in the order of `work`."""
        return [
            (text, answer)
            for batch in self.work
            for text, answer in zip(batch.texts, engine.run(batch.items, [self.task.exact] * len(batch)), strict=True)
        ]

    def remember(self, reference: Engine) -> None:
        """Runs the reference.

        Raises:
            ExportError: Its output is not finite; nothing can be compared with that.
        """
        for batch in self.work:
            answers = reference.run(batch.items, [self.task.exact] * len(batch))
            for text, answer in zip(batch.texts, answers, strict=True):
                if isinstance(answer, Exception):
                    raise ExportError(
                        "the model gives NaN or infinity in fp32 on the texts; its weights are not usable"
                    )
                self._comparison.remember(text, answer)

    def check(self, engine: Engine, bounds: Mapping[str, float]) -> Result:
        """Runs a variant on the same batches and compares."""
        return self.judge(self.answers(engine), bounds)

    def judge(self, answers: Sequence[tuple[int, Any]], bounds: Mapping[str, float]) -> Result:
        """Compares what a variant answered to every text."""
        per_text, details = self._comparison.measure(answers)
        values = np.nan_to_num(per_text, nan=-1.0, posinf=-1.0, neginf=-1.0)
        accuracy = Accuracy(
            metric=self._comparison.metric,
            mean=float(values.mean()),
            min=float(values.min()),
            texts=len(values),
            bound=dict(bounds),
            # A manifest holds finite numbers.
            details={name: value if math.isfinite(value) else 1e30 for name, value in details.items()},
            quantiles=tuple(np.quantile(values, np.linspace(0, 1, 21)).tolist()),
        )
        return Result(accuracy, missed(accuracy))
