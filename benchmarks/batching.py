"""How texts become batches, and with which batches a candidate is fastest."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.candidates import Candidate

SIZES = (1, 8, 16, 32, 64, 128)
BUDGETS = (512, 1024, 2048, 4096, 8192)
SWEPT_SHARE = 0.2


@dataclass(frozen=True)
class Setting:
    """How texts become batches.

    Attributes:
        size: texts of a batch, or its tokens.
        unit: ``texts`` or ``tokens``.
        by_length: whether texts are sorted by length before.
    """

    size: int
    unit: str
    by_length: bool

    def __str__(self) -> str:
        return f"{self.size} {self.unit if self.size > 1 else 'text'}, {'sorted' if self.by_length else 'as they come'}"


def settings(pads: bool) -> list[Setting]:
    """What the sweep tries. Budgets of tokens only suit engines without padding."""
    sizes = [("texts", size) for size in SIZES] + ([] if pads else [("tokens", budget) for budget in BUDGETS])
    # One by one, the order changes nothing.
    return [Setting(n, unit, order) for unit, n in sizes for order in ((False,) if n == 1 else (True, False))]


def split(lengths: Sequence[int], setting: Setting) -> list[list[int]]:
    """Indices of the texts of every batch.

    Args:
        lengths: tokens of each text.
        setting: how to batch them; a batch has at least one text.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__) if setting.by_length else range(len(lengths))
    batches: list[list[int]] = []
    filled = 0
    for index in order:
        cost = lengths[index] if setting.unit == "tokens" else 1
        if not batches or filled + cost > setting.size:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += cost
    return batches


class Work:
    """All texts, batched for one candidate."""

    def __init__(self, candidate: Candidate, ids: Sequence[Sequence[int]], setting: Setting) -> None:
        self.candidate = candidate
        self.setting = setting
        lengths = [len(text) for text in ids]
        self._texts = split(lengths, setting)
        self._tokens = [sum(lengths[text] for text in batch) for batch in self._texts]
        self._batches = [candidate.prepare([ids[text] for text in batch]) for batch in self._texts]

    def run(self) -> None:
        """Embeds every text once."""
        for batch in self._batches:
            self.candidate.run(batch)

    def embeddings(self, limit_s: float = math.inf) -> tuple[np.ndarray | None, int]:
        """Embeds every text, unless that takes too long.

        Args:
            limit_s: no batch begins after this time.

        Returns:
            f32 [texts, hidden], in the order of the texts, and their number; None and the number of texts that were
            embedded in this time if it is over.
        """
        import numpy as np
        import torch

        rows: list[Any] = [None] * sum(map(len, self._texts))
        done, begun = 0, time.perf_counter()
        for texts, batch in zip(self._texts, self._batches, strict=True):
            found = self.candidate.run(batch)
            if time.perf_counter() - begun > limit_s and done + len(texts) < len(rows):
                return None, done
            done += len(texts)
            found = found.float().numpy() if isinstance(found, torch.Tensor) else found
            for text, row in zip(texts, found, strict=True):
                rows[text] = row
        return np.asarray(rows, np.float32), done

    def probe_s(self, share: float, limit_s: float = math.inf) -> float:
        """Seconds per token on batches drawn at random, until they hold a share of all tokens or the time is over."""
        order = random.Random(0).sample(range(len(self._batches)), len(self._batches))
        started = time.perf_counter()
        self.candidate.run(self._batches[order[0]])
        tokens, begun = 0, time.perf_counter()
        if begun - started > limit_s:
            return (begun - started) / self._tokens[order[0]]
        for index in order:
            self.candidate.run(self._batches[index])
            tokens += self._tokens[index]
            if tokens >= share * sum(self._tokens) or time.perf_counter() - started > limit_s:
                break
        return (time.perf_counter() - begun) / tokens


def padded_tokens(lengths: Sequence[int], setting: Setting, pads: bool) -> int:
    """Tokens of the largest batch, padding included."""
    batches = ([lengths[index] for index in batch] for batch in split(lengths, setting))
    return max(len(batch) * max(batch) if pads else sum(batch) for batch in batches)


def trial_s(candidate: Candidate, ids: Sequence[Sequence[int]], limit_s: float) -> float:
    """Seconds per token, from batches that grow until one would take longer than a limit."""
    found = math.inf
    ordered = sorted(ids, key=len)
    for count in (1, 8, 32):
        middle = len(ordered) // 2
        texts = ordered[middle : middle + count]
        tokens = sum(map(len, texts))
        if tokens * found > limit_s and found < math.inf:
            break
        batch = candidate.prepare(texts)
        for _ in range(2):  # the first warms up
            begun = time.perf_counter()
            candidate.run(batch)
            took_s = time.perf_counter() - begun
            found = min(found, took_s / tokens)
            if took_s > limit_s:
                break
    return found


def best_setting(
    candidate: Candidate,
    ids: Sequence[Sequence[int]],
    tried: Sequence[Setting],
    budget_s: float = math.inf,
    token_s: float = 0.0,
) -> Work:
    """The setting with which a candidate is fastest: all on a share of the texts, the best three twice on all.

    Args:
        candidate: what is measured.
        ids: the texts.
        tried: the settings.
        budget_s: time for all of it. Settings get equal parts; one whose largest batch alone would take longer is not
            tried, unless none is left.
        token_s: what a token is known to take.
    """
    lengths = [len(text) for text in ids]
    most_s = 0.6 * budget_s / len(tried)
    largest = {setting: padded_tokens(lengths, setting, candidate.pads) for setting in tried}
    fitting = [setting for setting in tried if largest[setting] * token_s <= most_s]
    if not fitting:
        return Work(candidate, ids, min(tried, key=largest.__getitem__))
    found = {setting: Work(candidate, ids, setting).probe_s(SWEPT_SHARE, most_s) for setting in fitting}
    finalists = [Work(candidate, ids, setting) for setting in sorted(found, key=found.__getitem__)[:3]]
    if len(finalists) == 1:
        return finalists[0]
    # In turns, so that what else the machine does hits all of them.
    times = [[work.probe_s(1.0, 0.4 * budget_s / 6) for work in finalists] for _ in range(2)]
    return finalists[min(range(len(finalists)), key=lambda index: min(row[index] for row in times))]
