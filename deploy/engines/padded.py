"""Engines that run padded batches, with numpy: ONNX Runtime and, for reference, transformers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ..tasks import Rows, States, Task
from ..tasks.task import LOGITS_BYTES
from .batch import Batch, groups
from .dense import open_dense
from .engine import Engine
from .pooling import Floats, pool_padded, shortened

__all__ = ["PaddedEngine", "PaddedIds", "PaddedStates", "padded", "ranked", "splade"]

PaddedIds = npt.NDArray[np.int64]

_MIXING = ("ConvBert", "FNet", "Funnel", "Mra", "Nystromformer", "Yoso")
"""How architectures are called whose convolutions, transforms and poolings mix tokens with the padding beside them."""


def padded(batch: Batch, pad_id: int) -> tuple[PaddedIds, PaddedIds, PaddedIds]:
    """Token ids, attention mask and token types of a batch, each i64 [texts, longest].

    The mask is 0 for padding, and for tokens that are not attended to, though they have outputs.
    """
    longest = max(batch.lengths)
    ids = np.full((len(batch), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    types = np.zeros_like(ids)
    for row, text in enumerate(batch.ids):
        ids[row, : len(text)] = text
        mask[row, : len(text) if batch.attended is None else batch.attended[row]] = 1
        if batch.types is not None:
            types[row, : len(text)] = batch.types[row]
    return ids, mask, types


def ranked(logits: Floats, k: int) -> tuple[Rows, Rows]:
    """The best outputs of rows of logits [n, outputs], and their probabilities; see `States.top_k`."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    k = min(k, logits.shape[1])
    some = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    order = np.argsort(np.take_along_axis(-logits, some, axis=1), axis=1, kind="stable")
    best = np.take_along_axis(some, order, axis=1)
    scores = np.take_along_axis(powers, best, axis=1) / powers.sum(axis=1, keepdims=True)
    return Rows(np.ascontiguousarray(best, np.int64)), Rows(np.ascontiguousarray(scores, np.float32))


def splade(logits: Floats, total: bool, twice: bool) -> tuple[memoryview, memoryview]:
    """The sparse vector of a text, of its logits f32 [tokens, outputs]; see `States.sparse`."""
    with np.errstate(invalid="ignore"):
        kept = logits if total else logits.max(axis=0, keepdims=True)
        kept = np.log1p(np.maximum(kept, 0))
    vector = (np.log1p(kept) if twice else kept).sum(axis=0)
    indices = np.flatnonzero(vector)
    found: tuple[memoryview, memoryview]
    found = Rows(indices.astype(np.int64)[None])[0], Rows(vector[indices].astype(np.float32)[None])[0]
    return found


class PaddedStates:
    """First output of a padded model: hidden states or logits, f32 [texts, longest, n], or logits [texts, labels]."""

    def __init__(self, batch: Batch, output: Floats, project: Callable[[Floats], Floats] = lambda rows: rows) -> None:
        self.ids = batch.ids
        self._output = output
        self._project = project

    def pooled(self, mode: str, normalize: bool = False, dimensions: int | None = None, skipped: int = 0) -> Rows:
        """See `States.pooled`."""
        vectors = pool_padded(self._output, np.array([len(text) for text in self.ids]), mode, skipped)
        return Rows(shortened(self._project(vectors), normalize, dimensions))

    def text_logits(self) -> Rows:
        """See `States.text_logits`."""
        return Rows(np.ascontiguousarray(self._output))

    def token_logits(self, texts: Sequence[int], positions: Sequence[int]) -> Rows:
        """See `States.token_logits`."""
        return Rows(self._some(texts, positions))

    def top_k(self, texts: Sequence[int], positions: Sequence[int], k: int) -> tuple[Rows, Rows]:
        """See `States.top_k`."""
        return ranked(self._some(texts, positions), k)

    def token_vectors(self) -> list[tuple[Rows, bool]]:
        """See `States.token_vectors`."""
        texts = [Rows(np.ascontiguousarray(self._output[row, : len(ids)])) for row, ids in enumerate(self.ids)]
        return [(rows, all(rows.finite)) for rows in texts]

    def projected(self, normalize: bool) -> list[tuple[Rows, bool]]:
        """See `States.projected`."""
        outputs = [self._project(self._output[row, : len(ids)]) for row, ids in enumerate(self.ids)]
        texts = [Rows(shortened(output, normalize, None)) for output in outputs]
        return [(rows, all(rows.finite)) for rows in texts]

    def sparse(self, total: bool, twice: bool) -> list[tuple[memoryview, memoryview]]:
        """See `States.sparse`."""
        return [splade(self._output[row, : len(ids)], total, twice) for row, ids in enumerate(self.ids)]

    def _some(self, texts: Sequence[int], positions: Sequence[int]) -> Floats:
        return self._output[np.array(texts, np.int64), np.array(positions, np.int64)]


class PaddedEngine(Engine):
    """Runs texts of similar length padded to the longest of them.

    Attributes:
        padding_bound: How many tokens texts that run together may have with padding, in tokens without it.
    """

    padding_bound = math.inf

    def __init__(self, task: Task, max_padded: float = math.inf) -> None:
        """Keeps what all padded engines need.

        Args:
            task: What the answers are.
            max_padded: How many tokens may run together, with padding; a single text may have more.
        """
        super().__init__(task)
        self._project = open_dense(task.model)
        if task.model.model.architecture.startswith(_MIXING):
            self.padding_bound = 1.0  # Only texts of one length run together: what transformers makes of each alone.
        # A graph computes the logits of every token, wanted or not.
        wide = task.logits_per_token
        self._max_padded = min(max_padded, LOGITS_BYTES // (4 * wide)) if wide else max_padded

    def _states(self, batch: Batch) -> Iterator[tuple[Batch, States]]:
        for rows in groups(batch.lengths, self.padding_bound, self._max_padded):
            part = batch.part(rows)
            yield part, PaddedStates(part, self._forward(*padded(part, self.task.pad_id)), self._project)

    @abstractmethod
    def _forward(self, ids: PaddedIds, mask: PaddedIds, types: PaddedIds) -> Floats:
        """First output of the model; all arguments i64 [texts, longest]."""
