"""What all engines are: a batch of token ids goes in, the answers of a task come out."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from ..tasks import States, Task
from .batch import Batch, Item, plain_ids

__all__ = ["Engine", "Image"]


@dataclasses.dataclass(frozen=True)
class Image:
    """Packed weights of another process, and where they run.

    Attributes:
        fd: A descriptor of them; see `Engine.share`.
        cpus: CPUs of the engine's threads; none: those of the process.
        pin: Bind each of them to one.
    """

    fd: int
    cpus: tuple[int, ...] = ()
    pin: bool = False


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

    def run(self, ids: Sequence[Item], options: Sequence[Any]) -> list[Any]:
        """Runs a batch.

        Args:
            ids: Per text its token ids, or those of a pair, or of a text that is filled up.
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

    def cost(self, ids: Item) -> int:
        """What a text costs of a token budget; see `Task.cost_tokens`. On any thread."""
        return self.task.cost_tokens(plain_ids(ids))

    def rest(self) -> None:  # noqa: B027 (most keep nothing)
        """Frees what it keeps for the next batch; the caller has had none for a while."""

    def share(self) -> int | None:
        """A descriptor of the weights, which other processes can map; None: each process has to load its own."""
        return None

    def _mode(self) -> contextlib.AbstractContextManager[Any]:
        """What has to be on while a batch runs."""
        return contextlib.nullcontext()

    @abstractmethod
    def _states(self, batch: Batch) -> Iterator[tuple[Batch, States]]:
        """Runs the model on a batch, or on parts of it one after the other; yields each part with its states."""
