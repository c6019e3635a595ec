"""What the files of a MultiVectorEncoder of sentence-transformers say of vectors of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deploy.folder.errors import count_or_none

__all__ = ["TokenFiles"]


@dataclass
class TokenFiles:
    """What the files of a MultiVectorEncoder say; `None` and empty where they are silent.

    Attributes:
        normalize: Whether vectors of tokens are normalized.
        skiplist_words: Tokens that have no vector.
        skiplist_tasks: In which kinds of texts.
        kept: Ids of the only tokens of documents that have one.
        query_length: Longest query.
        document_length: Longest document.
        expansion: How queries are filled up, or None.
    """

    normalize: bool = False
    skiplist_words: list[str] = field(default_factory=list)
    skiplist_tasks: list[str] = field(default_factory=lambda: ["document"])
    kept: list[int] = field(default_factory=list)
    query_length: int | None = None
    document_length: int | None = None
    expansion: Mapping[str, Any] | None = None

    def read_lengths(self, settings: Mapping[str, Any]) -> None:
        """Takes what the settings of the Transformer module say."""
        self.query_length = count_or_none(settings.get("query_length"))
        self.document_length = count_or_none(settings.get("document_length"))
        expansion = settings.get("query_expansion")
        self.expansion = expansion if isinstance(expansion, dict) else None
