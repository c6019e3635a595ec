"""How to export: what the command line asks for, and the texts to verify on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy import texts as text_sources

__all__ = ["Options", "Texts", "read_texts"]

_DEFAULT_TEXTS = 256
_MOST_TEXTS = 2000


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        variants: Names of variants to write.
        bounds: Bounds that differ from the defaults, per variant.
        texts_file: Texts to verify on; None: the built-in sample.
        max_texts: How many texts at most.
        threads: Threads to measure with; None: all that this process may use.
        speed_s: Seconds of measuring per variant; 0 measures no speed.
        force: Whether a bundle that is there is replaced.
        accuracy: Mean cosine to fp32 that torch_ext-int8 has to reach, besides its bounds.
        eval_file: Examples of the user's, see `evaluation`; None: there are none.
    """

    variants: Sequence[str]
    bounds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    texts_file: Path | None = None
    max_texts: int | None = None
    threads: int | None = None
    speed_s: float = 2.0
    force: bool = False
    accuracy: float | None = None
    eval_file: Path | None = None


@dataclass(frozen=True)
class Texts:
    """What the variants are verified on.

    Attributes:
        texts: The texts.
        source: Where they are from.
        note: What the user should know about them, or None.
    """

    texts: Sequence[str]
    source: str
    note: str | None = None


def read_texts(options: Options) -> Texts:
    """The texts that the options ask for.

    Raises:
        TextsError: The file cannot be read, or holds none.
    """
    if options.texts_file is None:
        texts = text_sources.sample(options.max_texts or _DEFAULT_TEXTS)
        return Texts(texts, "docstrings of the Python standard library")
    texts = text_sources.load_texts(options.texts_file)
    most = options.max_texts or _MOST_TEXTS
    if len(texts) <= most:
        return Texts(texts, options.texts_file.name)
    # Evenly spread: files are often sorted.
    spread = [texts[index * len(texts) // most] for index in range(most)]
    return Texts(spread, options.texts_file.name, f"{most} of {len(texts)} texts, evenly spread (--max-texts)")
