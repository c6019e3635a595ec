"""How long texts may be, and from which side longer ones are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.bundle import TRUNCATION_SIDES
from deploy.folder.errors import FolderError
from deploy.folder.source import Source

__all__ = ["checked_side", "longest_input", "side_of_file"]


def side_of_file(tokenizer: Mapping[str, Any]) -> str:
    """The side from which `tokenizer.json` cuts longer texts; it counts where the settings are silent."""
    truncation = tokenizer.get("truncation")
    return "left" if isinstance(truncation, dict) and truncation.get("direction") == "Left" else "right"


def checked_side(source: Source, side: object) -> str:
    """The side from which longer texts are cut.

    Args:
        source: What the model's folder says.
        side: `truncation_side` of its tokenizer.

    Raises:
        FolderError: It is none.
    """
    if side not in TRUNCATION_SIDES:
        raise FolderError(
            f"{source.folder / 'tokenizer_config.json'}: truncation_side: expected one of "
            f"{', '.join(TRUNCATION_SIDES)}, got {side!r:.80}"
        )
    return str(side)


def longest_input(source: Source, limit: object) -> int:
    """The longest input in tokens: what the model's folder says, else its tokenizer, within the model's positions.

    Args:
        source: What the model's folder says.
        limit: `model_max_length` of its tokenizer, which files may have as anything; 1e30 stands for none.
    """
    known = isinstance(limit, int | float) and 3 <= limit <= source.max_positions
    return source.max_tokens or (int(limit) if known else source.max_positions)  # type: ignore[call-overload]
