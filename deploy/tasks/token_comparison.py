"""How far vectors of tokens are from those of transformers in fp32."""

from __future__ import annotations

from typing import Any

import numpy as np

from .comparison import Comparison, Doubles, Floats, Run

__all__ = ["TokenVectors"]


class TokenVectors(Comparison):
    """Vectors of tokens: the cosine of those of a text, one after the other, to the reference's."""

    metric = "cosine"

    def __init__(self, texts: int) -> None:
        self._texts = texts
        self._reference: dict[int, Floats] = {}

    def remember(self, text: int, output: Any) -> None:
        """See `Comparison.remember`."""
        self._reference[text] = np.array(output)

    def measure(self, run: Run) -> tuple[Doubles, dict[str, float]]:
        """See `Comparison.measure`."""
        cosines = np.full(self._texts, np.nan)
        for text, output in run:
            if not isinstance(output, Exception):
                right, got = self._reference[text].astype(np.float64), np.array(output, np.float64)
                cosines[text] = right @ got / max(float(np.linalg.norm(right) * np.linalg.norm(got)), 1e-12)
        return cosines, {}
