"""Tokens that PyLate puts before queries and documents, as sentence-transformers reads them.

PyLate puts their ids into a text. sentence-transformers writes them before it, and has the tokenizer find them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.folder.library import read_by_library
from deploy.folder.source import Source

__all__ = ["make_special", "shattered"]


def shattered(tokenizer: str, source: Source) -> dict[str, int]:
    """Prefixes that are tokens, but that the tokenizer takes apart in a text, and their ids.

    Args:
        tokenizer: Content of `tokenizer.json`.
        source: What the model's folder says.

    Raises:
        FolderError: The tokenizer is damaged.
    """
    prefixes = [text for text in (source.tokens.prefixes if source.tokens is not None else ()) if text.split()]
    if not prefixes:
        return {}
    read = read_by_library(tokenizer, source.folder)
    found = {}
    for text in prefixes:
        token = text if read.token_to_id(text) is not None else text.split()[0]
        number = read.token_to_id(token)
        if number is not None and read.encode(token, add_special_tokens=False).tokens != [token]:
            found[token] = number
    return found


def make_special(tokenizer: dict[str, Any], tokens: Mapping[str, int]) -> None:
    """Has a tokenizer find tokens of its vocabulary in texts as they are.

    Args:
        tokenizer: Content of `tokenizer.json`, which changes.
        tokens: The tokens, and their ids.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [item for item in tokenizer.get("added_tokens") or [] if item["id"] not in tokens.values()]
    added += [{"id": number, "content": token, **flags} for token, number in tokens.items()]
    tokenizer["added_tokens"] = sorted(added, key=lambda item: int(item["id"]))
