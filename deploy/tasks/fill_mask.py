"""fill-mask: the tokens that fit best in place of each mask token."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bounds import AGREEMENT, pick
from .task import LOGITS_BYTES, RAW, Described, Needs, States, Task, TaskError, not_finite
from .text_classification import softmax

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .comparison import Comparison

__all__ = ["FillMask", "FillMaskOptions", "Filled"]

_USUAL_VOCABULARY = 32_768
"""Assumed where neither the manifest nor the model's configuration has its size."""

_SEED = 0


@dataclass(frozen=True)
class FillMaskOptions:
    """What a fill-mask request asks for.

    Attributes:
        top_k: Predictions per mask.
    """

    top_k: int


def _vocab_size(model: Described) -> int:
    """Number of token ids; bundles of before the manifest's field existed have the model's `config.json`."""
    if model.vocab_size is not None:
        return model.vocab_size
    try:
        size = json.loads((model.root / "config.json").read_bytes())["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _USUAL_VOCABULARY
    return size if isinstance(size, int) and size > 0 else _USUAL_VOCABULARY


class Filled(Sequence[dict[str, Any]]):
    """The best tokens of one mask, best first: `{"token": ..., "token_id": ..., "score": ...}`.

    They are made when they are read: 8 bytes each until then, in place of 250.
    """

    __slots__ = ("_ids", "_scores", "_token_text")

    def __init__(self, ids: NDArray[np.int32], scores: NDArray[np.float32], token_text: Callable[[int], str]) -> None:
        self._ids = ids
        self._scores = scores
        self._token_text = token_text

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        token_id = int(self._ids[index])
        return {"token": self._token_text(token_id), "token_id": token_id, "score": float(self._scores[index])}


class FillMask(Task):
    """Answers per text, per mask its best tokens, a `Filled`."""

    name = "fill-mask"
    needs = Needs(head=True, mask_token=True)
    auto_class = "AutoModelForMaskedLM"
    architecture = "ForMaskedLM"
    optimum_task = "fill-mask"
    usual = FillMaskOptions(5)

    def __init__(self, model: Described, token_text: Callable[[int], str] = str) -> None:
        super().__init__(model, token_text)
        self._token_text = functools.lru_cache(maxsize=1 << 16)(token_text)
        mask = model.special_tokens["mask"]
        assert mask is not None  # The manifest was checked.
        self.mask_id = mask.id
        self.logits_per_token = _vocab_size(model)
        # The widest row that an encoder computes for a token is that of its feed-forward part, 4 times the hidden size.
        self._mask_tokens = -(-self.logits_per_token // (4 * model.hidden_size))

    def prepare(self, rows: Sequence[Any]) -> list[Any]:
        """Hides one token of every text that has no mask token yet."""
        import random

        import numpy as np

        special = np.array([token.id for token in self.model.special_tokens.values() if token is not None])
        chance = random.Random(_SEED)
        result = []
        for row in rows:
            if not (row == self.mask_id).any():
                candidates = np.flatnonzero(~np.isin(row, special)).tolist()
                if not candidates:
                    continue
                row = row.copy()
                row[chance.choice(candidates)] = self.mask_id
            result.append(row)
        if not result:
            raise TaskError("none of the texts has a token that could be masked; pass other ones with --texts")
        return result

    def cost_tokens(self, ids: NDArray[np.int64]) -> int:
        """A mask's row of logits counts as the tokens that take as much memory: 10 with BERT-base, 82 with XLM-R."""
        return len(ids) + int((ids == self.mask_id).sum()) * self._mask_tokens

    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """See `Task.answers`."""
        import numpy as np

        places = [np.flatnonzero(text == self.mask_id) for text in states.ids]
        texts = np.repeat(np.arange(len(places)), [len(found) for found in places])
        positions = np.concatenate([np.empty(0, np.int64), *places])
        found: list[list[Any]] = [[] for _ in places]
        failed: set[int] = set()
        step = max(1, LOGITS_BYTES // (4 * self.logits_per_token))
        for start in range(0, len(texts), step):
            chunk = slice(start, start + step)
            logits = states.token_logits(texts[chunk], positions[chunk])
            for row, text in zip(logits, texts[chunk].tolist(), strict=True):
                if text in failed or not np.isfinite(row).all():
                    failed.add(text)
                elif options[text] is RAW:
                    found[text].append(row)
                else:
                    found[text].append(self._best(row, getattr(options[text], "top_k", 1)))
        return [
            not_finite("a logit") if text in failed else np.array(rows) if options[text] is RAW else rows
            for text, rows in enumerate(found)
        ]

    def _best(self, logits: NDArray[np.float32], top_k: int) -> Filled:
        """The best tokens of one mask; logits f32 [vocabulary]."""
        import numpy as np

        top_k = min(top_k, len(logits))
        scores = softmax(logits[None])[0]
        best = np.argpartition(-scores, top_k - 1)[:top_k]
        best = best[np.argsort(-scores[best], kind="stable")]
        return Filled(best.astype(np.int32), scores[best], self._token_text)

    def comparison(self, texts: int) -> Comparison:
        """See `Task.comparison`."""
        from .comparison import Masks

        return Masks(texts)

    def default_bounds(self, variant: str, dtype: str) -> dict[str, float]:
        """See `Task.default_bounds`."""
        return pick(AGREEMENT, variant, dtype)
