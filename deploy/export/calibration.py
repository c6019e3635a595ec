"""Texts that the weights of torch_ext-int8 are rounded for: others than those that it is judged by."""

from __future__ import annotations

import random
import re
from collections.abc import Collection

from deploy.texts import TextsError, docstrings, sample

__all__ = ["CALIBRATION_TOKENS", "calibration_texts"]

CALIBRATION_TOKENS = 96
"""Of each text, at most."""

_TEXTS = 120
_CHARS = 300
_WORDS = 1500


def calibration_texts(verified: Collection[str]) -> list[str]:
    """Beginnings of docstrings, and single words, which are short enough to show what a few tokens look like.

    Args:
        verified: Texts that are left out.

    Returns:
        The texts; none where Python came without its sources.
    """
    try:
        left = [text for text in reversed(sample(len(docstrings()))) if text not in verified]
    except TextsError:
        return []
    words = sorted({word.lower() for text in left for word in re.findall("[A-Za-z]{3,}", text)} - set(verified))
    random.Random(0).shuffle(words)
    return [text[:_CHARS] for text in left[:_TEXTS]] + words[:_WORDS]
