"""Names of layers by pattern: what ``skip`` and ``keep_bf16`` mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

__all__ = ["as_patterns", "matches", "select"]


def as_patterns(patterns: str | Iterable[str]) -> list[str]:
    """A pattern or several, as a list.

    Raises:
        TypeError: they are neither a string nor several.
    """
    several = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
    for pattern in several:
        if not isinstance(pattern, str):
            raise TypeError(f"expected a name or pattern of layers, or several, got {type(pattern).__name__}")
    return several


def matches(name: str, patterns: Iterable[str]) -> set[str]:
    """The patterns that match a name, or the beginning of it up to a dot.

    Args:
        name: such as ``layers.0.ffn.down``, which ``layers.0``, ``*.ffn`` and ``*.down`` match.
        patterns: names or ``fnmatch`` patterns; case counts.
    """
    parts = name.split(".")
    prefixes = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return {pattern for pattern in patterns if any(fnmatchcase(prefix, pattern) for prefix in prefixes)}


def select(what: str, names: Sequence[str], patterns: str | Iterable[str]) -> tuple[str, ...]:
    """The names that patterns match, in their order.

    Args:
        what: of whom the patterns are; begins the message of an error.
        names: what there is.
        patterns: one or several, as for :func:`matches`.

    Raises:
        ValueError: a pattern matches no name.
    """
    wanted = as_patterns(patterns)
    hits = {name: matches(name, wanted) for name in names}
    unused = [pattern for pattern in wanted if not any(pattern in found for found in hits.values())]
    if unused:
        raise ValueError(f"{what} names no linear layer: {', '.join(unused)}; there are {', '.join(names)}")
    return tuple(name for name in names if hits[name])
