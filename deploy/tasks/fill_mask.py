"""fill-mask: the tokens that fit best in place of each mask token."""

from __future__ import annotations

import functools
import json
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bounds import AGREEMENT, CLOSE_TOKENS, pick
from .rows import Ids, Items, places
from .task import LOGITS_BYTES, RAW, Described, Needs, States, Task, TaskError, not_finite

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = ["FillMask", "FillMaskOptions", "Filled", "vocab_size"]

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


def vocab_size(model: Described) -> int:
    """Number of token ids; bundles of before the manifest's field existed have the model's `config.json`."""
    if model.vocab_size is not None:
        return model.vocab_size
    try:
        size = json.loads((model.root / "config.json").read_bytes())["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _USUAL_VOCABULARY
    return size if isinstance(size, int) and size > 0 else _USUAL_VOCABULARY


class Filled(Items):
    """The best tokens of one mask, best first: `{"token": ..., "token_id": ..., "score": ...}`.

    They are made when they are read: 8 bytes each until then, in place of 250.
    """

    __slots__ = ("_ids", "_scores", "_token_text")

    def __init__(self, ids: Sequence[int], scores: Sequence[float], token_text: Callable[[int], str]) -> None:
        # Copies: the rows that they come from are views of those of a whole batch.
        self._ids = array("i", ids)
        self._scores = array("f", scores)
        self._token_text = token_text

    def owned(self) -> tuple[Filled, int]:
        """See `Items.owned`."""
        return self, 256 + 8 * len(self)

    def __len__(self) -> int:
        return len(self._ids)

    def _item(self, index: int) -> dict[str, Any]:
        token_id = self._ids[index]
        return {"token": self._token_text(token_id), "token_id": token_id, "score": self._scores[index]}


class FillMask(Task):
    """Answers per text, per mask its best tokens, a `Filled`."""

    name = "fill-mask"
    needs = Needs(head=True, mask_token=True)
    auto_class = "AutoModelForMaskedLM"
    architecture = "ForMaskedLM"
    optimum_task = "fill-mask"
    close = CLOSE_TOKENS
    usual = FillMaskOptions(5)

    def __init__(self, model: Described, token_text: Callable[[int], str] = str) -> None:
        super().__init__(model, token_text)
        self._token_text = functools.lru_cache(maxsize=1 << 16)(token_text)
        mask = model.special_tokens["mask"]
        assert mask is not None  # The manifest was checked.
        self.mask_id = mask.id
        self.logits_per_token = vocab_size(model)
        # The widest row that an encoder computes for a token is that of its feed-forward part, 4 times the hidden size.
        self._mask_tokens = -(-self.logits_per_token // (4 * model.hidden_size))

    def prepare(self, rows: Sequence[Any]) -> list[Any]:
        """Hides one token of every text that has no mask token yet."""
        import random

        special = {token.id for token in self.model.special_tokens.values() if token is not None}
        chance = random.Random(_SEED)
        result = []
        for row in rows:
            if self.mask_id not in row:
                candidates = [place for place, token in enumerate(row) if token not in special]
                if not candidates:
                    continue
                row = row[:]
                row[chance.choice(candidates)] = self.mask_id
            result.append(row)
        if not result:
            raise TaskError("none of the texts has a token that could be masked; pass other ones with --texts")
        return result

    def cost_tokens(self, ids: Ids) -> int:
        """A mask's row of logits counts as the tokens that take as much memory: 10 with BERT-base, 82 with XLM-R."""
        return len(ids) + ids.count(self.mask_id) * self._mask_tokens

    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """See `Task.answers`; to `RAW`, the rows of logits of its masks."""
        masks = [(text, place) for text, ids in enumerate(states.ids) for place in places(ids, self.mask_id)]
        raw = [mask for mask in masks if options[mask[0]] is RAW]
        found: list[list[Any]] = [[] for _ in options]
        failed: set[int] = set()
        step = max(1, LOGITS_BYTES // (4 * self.logits_per_token))
        for start in range(0, len(raw), step):
            texts, positions = zip(*raw[start : start + step], strict=True)
            logits = states.token_logits(texts, positions)
            for text, row, finite in zip(texts, logits, logits.finite, strict=True):
                if not finite:
                    failed.add(text)
                found[text].append(row)
        ranked = [mask for mask in masks if options[mask[0]] is not RAW]
        for start in range(0, len(ranked), step):
            texts, positions = zip(*ranked[start : start + step], strict=True)
            wanted = [getattr(options[text], "top_k", 1) for text in texts]
            best, scores = states.top_k(texts, positions, max(wanted))
            for text, top_k, indices, probabilities in zip(texts, wanted, best, scores, strict=True):
                if not math.isfinite(probabilities[0]):
                    failed.add(text)
                found[text].append(Filled(indices[:top_k], probabilities[:top_k], self._token_text))
        return [not_finite("a logit") if text in failed else rows for text, rows in enumerate(found)]

    def comparison(self, texts: int) -> Comparison:
        """See `Task.comparison`."""
        from .comparison import Masks

        return Masks(texts)

    def default_bounds(self, variant: str, dtype: str) -> dict[str, float]:
        """See `Task.default_bounds`."""
        return pick(AGREEMENT, variant, dtype)
