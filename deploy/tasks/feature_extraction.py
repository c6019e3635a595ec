"""feature-extraction: one embedding per text, pooled from the hidden states of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bounds import COSINE, EMBEDDING_BOUNDS, pick
from .task import Described, ModelFolder, Needs, States, Task, not_finite

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = ["EmbedOptions", "FeatureExtraction", "TokenVectorOptions"]


@dataclass(frozen=True)
class EmbedOptions:
    """What an embedding request asks for.

    Attributes:
        normalize: Divide by the L2 norm.
        dimensions: Leading dimensions to keep, before the norm is taken; None: all. For models that were trained for it
            (Matryoshka).
        skipped: Leading tokens of the text that are not pooled: those of its prompt, where the model leaves them out.
    """

    normalize: bool
    dimensions: int | None = None
    skipped: int = 0


@dataclass(frozen=True)
class TokenVectorOptions:
    """A request for a vector of each token.

    Attributes:
        query: Of a query, not of a document, where the model tells them apart.
    """

    query: bool = False


class FeatureExtraction(Task):
    """Answers a row per text, f32 [dimensions]; to `TokenVectorOptions`, a row per token of it."""

    name = "feature-extraction"
    needs = Needs(pooling=True)
    auto_class = "AutoModel"
    architecture = "Model"
    optimum_task = "feature-extraction"
    onnx_outputs = ("last_hidden_state",)
    spare_weights = (".pooler.",)  # sentence-transformers does not use it, and many models come without.
    usual = EmbedOptions(True)

    @classmethod
    def bound_names(cls, folder: ModelFolder) -> tuple[str, ...]:
        """See `Task.bound_names`."""
        return EMBEDDING_BOUNDS

    def __init__(self, model: Described, token_text: Callable[[int], str] = str) -> None:
        super().__init__(model, token_text)
        assert model.pooling is not None  # The manifest was checked.
        self._pooling = model.pooling
        # sentence-transformers cuts embeddings to more dimensions than they have: nothing happens.
        self._kept = None if model.pooling.dimensions is None else model.width

    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """See `Task.answers`."""
        result: list[Any] = [None] * len(options)
        # Nearly always one kind; then each is a pass over all texts, which is little beside the model's.
        for kind in dict.fromkeys(options):
            rows: Sequence[Any]
            finite: Sequence[Any]
            if isinstance(kind, TokenVectorOptions):
                rows, finite = zip(*states.token_vectors(), strict=True)
            else:
                kept = kind.dimensions or self._kept
                pooled = states.pooled(self._pooling.mode, kind.normalize, kept, kind.skipped)
                rows, finite = pooled, pooled.finite
            for index, option in enumerate(options):
                if option == kind:
                    result[index] = rows[index] if finite[index] else not_finite("an embedding")
        return result

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
