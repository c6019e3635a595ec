"""The padding-free encoder of torch_ext, without torch: a batch is one `[tokens, hidden]` matrix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torch_ext.runtime import Encoder
from torch_ext.runtime import States as HiddenStates

from ..bundle import BundleError
from ..tasks import States, Task
from .batch import Batch, Ids
from .engine import Engine

__all__ = ["TorchExtEngine"]

Floats = npt.NDArray[np.float32]


class _PackedStates:
    """Hidden states of a batch.

    Attributes:
        ids: Token ids of each text.
    """

    def __init__(self, batch: Batch, states: HiddenStates, bounds: npt.NDArray[np.int32]) -> None:
        self.ids = batch.ids
        self._states = states
        self._bounds = bounds

    def pooled(self, mode: str) -> Floats:
        """See `States.pooled`."""
        pooling: Any = mode
        return np.asarray(self._states.pool(pooling))

    def text_logits(self) -> Floats:
        """See `States.text_logits`."""
        return np.asarray(self._states.text_logits())

    def token_logits(self, texts: Ids, positions: Ids) -> Floats:
        """See `States.token_logits`."""
        return np.asarray(self._states.token_logits(self._bounds[texts] + positions))


class TorchExtEngine(Engine):
    """Runs an encoder of torch_ext, and the head that its task needs."""

    def __init__(self, encoder: Encoder, task: Task) -> None:
        super().__init__(task)
        self.isa = encoder.isa
        self._encoder = encoder

    @classmethod
    def load(cls, path: Path, dtype: str, threads: int, task: Task) -> TorchExtEngine:
        """Loads a file and packs its weights.

        Args:
            path: The file.
            dtype: Of its weights.
            threads: Threads of the engine.
            task: What the answers are.

        Raises:
            BundleError: The file has no head, though the task needs one.
            ValueError: It is damaged, or of another kind.
        """
        kind: Any = dtype
        encoder = Encoder.open(path, kind, threads=threads)
        if task.needs.head and not encoder.outputs:
            raise BundleError(f"{path}: no head for {task.name} in this file; export the model again")
        return cls(encoder, task)

    def _states(self, batch: Batch) -> Iterator[tuple[Batch, States]]:
        bounds = batch.bounds()
        types = None if batch.types is None else np.concatenate(batch.types)
        yield batch, _PackedStates(batch, self._encoder.encode(np.concatenate(batch.ids), bounds, types), bounds)
