"""What is checked of a tokenizer: whether it belongs to the model, how long texts may be, and where they are cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deploy.bundle import CONFIG_FILE, TRUNCATION_SIDES
from deploy.folder.errors import FolderError
from deploy.folder.source import Source

__all__ = ["check_unknown", "check_vocabulary", "checked_side", "ids_around", "longest_input", "side_of_file"]


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


def check_vocabulary(source: Source, highest: int) -> None:
    """Checks that the model has an embedding for every token id.

    Args:
        source: What the model's folder says.
        highest: The largest id that the tokenizer gives.

    Raises:
        FolderError: It has not.
    """
    size = source.config.get("vocab_size")
    if not isinstance(size, int | None):
        raise FolderError(f"{source.folder / CONFIG_FILE}: vocab_size: expected a whole number, got {size!r:.80}")
    if size is not None and highest >= size:
        raise FolderError(
            f"{source.folder}: the tokenizer has ids up to {highest}, the model a vocabulary of {size}; they do not "
            "belong together"
        )


def check_unknown(source: Source, model: object) -> None:
    """Checks that there is a token for unknown words, without which a tokenizer of words fails at texts with one.

    Raises:
        FolderError: There is none.
    """
    if not isinstance(model, dict) or model.get("type") not in ("WordPiece", "WordLevel"):
        return
    vocabulary, token = model.get("vocab"), model.get("unk_token")
    if isinstance(vocabulary, dict) and isinstance(token, str) and token not in vocabulary:
        raise FolderError(
            f"{source.folder}: the tokenizer has no {token!r:.80} in its vocabulary, which stands for unknown words; "
            "copy the model again"
        )


def ids_around(tokenizer: Mapping[str, Any]) -> Iterator[int]:
    """Ids of the tokens that are put around texts, which need not be those of the vocabulary."""
    processor = tokenizer.get("post_processor")
    tokens = processor.get("special_tokens") if isinstance(processor, dict) else None
    for token in tokens.values() if isinstance(tokens, dict) else ():
        ids = token.get("ids") if isinstance(token, dict) else None
        yield from (number for number in ids or () if isinstance(number, int))
