"""What all engines are: a batch of token ids goes in, the answers of a task come out."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..tasks import States, Task
from ..tasks.task import LOGITS_BYTES
from .batch import Batch, Ids, PairIds, groups
from .pooling import pool_padded

__all__ = ["Engine", "PaddedEngine"]


class Engine(ABC):
    """Runs batches. All methods but `cost` are called on one thread.

    Attributes:
        task: Makes answers of states.
        isa: What runs the model: an instruction set of torch_ext, or a library and its version.
        couples_texts: Whether texts in one batch change each other's results by more than rounding.
    """

    isa: str = ""
    couples_texts: bool = False

    def __init__(self, task: Task) -> None:
        self.task = task

    def run(self, ids: Sequence[Ids | PairIds], options: Sequence[Any]) -> list[Any]:
        """Runs a batch.

        Args:
            ids: Per text token ids, i64 [tokens], or those of a pair.
            options: Per text the options of its request: those of the task, or `RAW`.

        Returns:
            Per text its answer; a `FloatingPointError` for a text whose output is not finite.
        """
        results: list[Any] = [None] * len(ids)
        with self._mode():
            for batch, states in self._states(Batch(ids)):
                wanted = [options[text] for text in batch.texts]
                answers = self.task.answers(states, wanted)
                if self.couples_texts and len(batch) > 1 and any(isinstance(item, Exception) for item in answers):
                    # Whose numbers broke those of others is unknown: each text alone.
                    answers = [self._alone(batch, row, option) for row, option in enumerate(wanted)]
                for text, answer in zip(batch.texts, answers, strict=True):
                    results[text] = answer
        return results

    def _alone(self, batch: Batch, row: int, option: Any) -> Any:
        ((_, states),) = self._states(batch.part([row]))
        (answer,) = self.task.answers(states, [option])
        return answer

    def cost(self, ids: Ids | PairIds) -> int:
        """What a text costs of a token budget; see `Task.cost_tokens`. On any thread."""
        return self.task.cost_tokens(ids.ids if isinstance(ids, PairIds) else ids)

    def _mode(self) -> contextlib.AbstractContextManager[Any]:
        """What has to be on while a batch runs."""
        return contextlib.nullcontext()

    @abstractmethod
    def _states(self, batch: Batch) -> Iterator[tuple[Batch, States]]:
        """Runs the model on a batch, or on parts of it one after the other; yields each part with its states."""


class _PaddedStates:
    """First output of a padded model: hidden states or logits, f32 [texts, longest, n], or logits [texts, labels]."""

    def __init__(self, batch: Batch, output: npt.NDArray[np.float32]) -> None:
        self.ids = batch.ids
        self._output = output

    def pooled(self, mode: str) -> npt.NDArray[np.float32]:
        """See `States.pooled`."""
        return pool_padded(self._output, np.array([len(text) for text in self.ids]), mode)

    def text_logits(self) -> npt.NDArray[np.float32]:
        """See `States.text_logits`."""
        return self._output

    def token_logits(self, texts: Ids, positions: Ids) -> npt.NDArray[np.float32]:
        """See `States.token_logits`."""
        return self._output[texts, positions]


class PaddedEngine(Engine):
    """Runs texts of similar length padded to the longest of them.

    Attributes:
        padding_bound: How many tokens texts that run together may have with padding, in tokens without it.
    """

    padding_bound = math.inf

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        # A graph computes the logits of every token, wanted or not.
        wide = task.logits_per_token
        self._max_padded = LOGITS_BYTES // (4 * wide) if wide else math.inf

    def _states(self, batch: Batch) -> Iterator[tuple[Batch, States]]:
        for rows in groups(batch.lengths, self.padding_bound, self._max_padded):
            part = batch.part(rows)
            yield part, _PaddedStates(part, self._forward(*part.padded(self.task.pad_id)))

    @abstractmethod
    def _forward(self, ids: Ids, mask: Ids, types: Ids) -> npt.NDArray[np.float32]:
        """First output of the model; all arguments i64 [texts, longest]."""
