"""sparse-embedding: a weight for each of some words of the vocabulary, as SPLADE makes it of a masked-LM head."""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bounds import COSINE, pick
from .fill_mask import vocab_size
from .rows import Items
from .task import Described, ModelFolder, Needs, States, Task, not_finite

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = ["SparseEmbedding", "SparseVector"]


class SparseVector(Items):
    """The entries of a vector that are not 0, by rising index: `{"index": ..., "value": ...}`, made when they are read.

    Attributes:
        indices: Ids of words.
        values: Their weights.
    """

    __slots__ = ("indices", "values")

    def __init__(self, indices: Sequence[int], values: Sequence[float]) -> None:
        self.indices = indices
        self.values = values

    def __len__(self) -> int:
        return len(self.indices)

    def owned(self) -> tuple[SparseVector, int]:
        """See `Items.owned`."""
        return SparseVector(array("i", self.indices), array("f", self.values)), 256 + 8 * len(self)

    def _item(self, index: int) -> dict[str, Any]:
        return {"index": self.indices[index], "value": self.values[index]}


@dataclass(frozen=True)
class _Options:
    """What a request asks for: there is nothing to choose."""


class SparseEmbedding(Task):
    """Answers a `SparseVector` per text."""

    name = "sparse-embedding"
    needs = Needs(head=True, sparse=True)
    auto_class = "AutoModelForMaskedLM"
    architecture = "ForMaskedLM"
    optimum_task = "fill-mask"
    usual = _Options()

    @classmethod
    def bound_names(cls, folder: ModelFolder) -> tuple[str, ...]:
        """See `Task.bound_names`."""
        return ("mean", "min", "retrieval_overlap")

    def __init__(self, model: Described, token_text: Callable[[int], str] = str) -> None:
        super().__init__(model, token_text)
        assert model.sparse is not None  # The manifest was checked.
        self._pooling = model.sparse
        self.logits_per_token = vocab_size(model)

    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """See `Task.answers`."""
        vectors = states.sparse(self._pooling.total, self._pooling.twice)
        return [
            _largest(indices, values, self._pooling.most)
            if math.isfinite(math.fsum(values))
            else not_finite("a weight")
            for indices, values in vectors
        ]

    @property
    def exact(self) -> _Options:
        """Vectors as they are served."""
        return self.usual

    def comparison(self, texts: int) -> Comparison:
        """See `Task.comparison`."""
        from .comparison import SparseCosine

        return SparseCosine(texts)

    def default_bounds(self, variant: str, dtype: str) -> dict[str, float]:
        """See `Task.default_bounds`."""
        return pick(COSINE, variant, dtype)


def _largest(indices: Sequence[int], values: Sequence[float], most: int | None) -> SparseVector:
    """A vector of the largest weights; None: of all."""
    if most is None or len(values) <= most:
        return SparseVector(indices, values)
    places = sorted(heapq.nlargest(most, range(len(values)), key=values.__getitem__))
    return SparseVector(
        array("i", (indices[place] for place in places)), array("f", (values[place] for place in places))
    )
