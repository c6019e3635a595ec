"""token-embedding: a vector for each token of a text, for late interaction, as ColBERT makes them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .bounds import COSINE, pick
from .feature_extraction import TokenVectorOptions
from .rows import FilledIds, Ids
from .task import RAW, Described, ModelFolder, Needs, States, Task, not_finite

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = ["TokenEmbedding"]

_MOST_FILLED = 32
"""Tokens that a query is filled up with where variants are verified.

Farther behind a text, a token of local attention sees none of it, and versions of transformers differ: since 5 such a
token attends to nothing, as in torch_ext; before, to all tokens alike."""


class TokenEmbedding(Task):
    """Answers per text a row per token, f32 [width], without those that its role leaves out."""

    name = "token-embedding"
    needs = Needs(token_vectors=True)
    auto_class = "AutoModel"
    architecture = "Model"
    optimum_task = "feature-extraction"
    onnx_outputs = ("last_hidden_state",)
    spare_weights = (".pooler.",)
    usual = TokenVectorOptions()

    @classmethod
    def bound_names(cls, folder: ModelFolder) -> tuple[str, ...]:
        """See `Task.bound_names`."""
        return ("mean", "min")

    def __init__(self, model: Described, token_text: Callable[[int], str] = str) -> None:
        super().__init__(model, token_text)
        assert model.token_vectors is not None  # The manifest was checked.
        self._vectors = model.token_vectors

    def trials(self, rows: Sequence[Any]) -> list[Any]:
        """See `Task.trials`: where queries are filled up, every other text becomes one."""
        return [self._query(ids) if index % 2 else ids for index, ids in enumerate(self.prepare(rows))]

    def _query(self, ids: Ids) -> Ids | FilledIds:
        role = self._vectors.query
        if role is None or not role.pad_to:
            return ids
        most = role.max_tokens
        if most is not None and len(ids) > most:
            ids = ids[: most - 1] + ids[-1:]
        return role.filled(ids[:], len(ids) + _MOST_FILLED)

    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """See `Task.answers`."""
        result: list[Any] = []
        texts = zip(states.ids, states.projected(self._vectors.normalize), options, strict=True)
        for ids, (rows, finite), option in texts:
            if not finite:
                result.append(not_finite("a vector"))
            elif option is RAW:
                result.append(array("f", b"".join(rows)))
            else:
                role = self._vectors.query if option.query else self._vectors.document
                kept = [row for token, row in zip(ids, rows, strict=True) if role is None or role.keeps(token)]
                result.append(kept)
        return result

    def comparison(self, texts: int) -> Comparison:
        """See `Task.comparison`: of the vectors of all tokens of a text, one after the other."""
        from .token_comparison import TokenVectors

        return TokenVectors(texts)

    def default_bounds(self, variant: str, dtype: str) -> dict[str, float]:
        """See `Task.default_bounds`."""
        return {name: bound for name, bound in pick(COSINE, variant, dtype).items() if name in ("mean", "min")}
