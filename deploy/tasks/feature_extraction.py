"""feature-extraction: one embedding per text, pooled from the hidden states of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bounds import COSINE, pick
from .task import Described, ModelFolder, Needs, States, Task, not_finite

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = ["EmbedOptions", "FeatureExtraction"]


@dataclass(frozen=True)
class EmbedOptions:
    """What an embedding request asks for.

    Attributes:
        normalize: Divide by the L2 norm.
    """

    normalize: bool


class FeatureExtraction(Task):
    """Answers a f32 row [hidden] per text."""

    name = "feature-extraction"
    needs = Needs(pooling=True)
    auto_class = "AutoModel"
    architecture = "Model"
    optimum_task = "feature-extraction"
    onnx_output = "last_hidden_state"
    spare_weights = (".pooler.",)  # sentence-transformers does not use it, and many models come without.
    usual = EmbedOptions(True)

    @classmethod
    def bound_names(cls, folder: ModelFolder) -> tuple[str, ...]:
        """See `Task.bound_names`."""
        return ("mean", "min")

    def __init__(self, model: Described, token_text: Callable[[int], str] = str) -> None:
        super().__init__(model, token_text)
        assert model.pooling is not None  # The manifest was checked.
        self._pooling = model.pooling

    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """See `Task.answers`."""
        import numpy as np

        rows = states.pooled(self._pooling.mode)
        wanted = np.fromiter((option.normalize for option in options), dtype=bool, count=len(options))
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        finite = np.isfinite(norms)
        if whole := bool(finite.all()):
            divisors = np.maximum(norms, 1e-12)
        else:
            divisors = np.where(finite, np.maximum(norms, 1e-12), np.nan)
        rows = rows / np.where(wanted, divisors, 1.0).astype(np.float32)[:, None]
        if whole:
            return list(rows)
        return [row if right else not_finite("an embedding") for row, right in zip(rows, finite, strict=True)]

    @property
    def exact(self) -> EmbedOptions:
        """Embeddings as they are served by default."""
        return EmbedOptions(self._pooling.normalize)

    def comparison(self, texts: int) -> Comparison:
        """See `Task.comparison`."""
        from .comparison import Cosine

        return Cosine(texts)

    def default_bounds(self, variant: str, dtype: str) -> dict[str, float]:
        """See `Task.default_bounds`."""
        return pick(COSINE, variant, dtype)
