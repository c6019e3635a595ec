"""Vectors of tokens, of a MultiVectorEncoder of sentence-transformers or PyLate's: what files say, and a manifest."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.bundle import Role, SpecialToken, TokenVectors
from deploy.folder.errors import FolderError, count_or_none

if TYPE_CHECKING:
    from deploy.folder.source import Source

__all__ = ["TokenFiles", "read_token_vectors"]

_QUERY_LENGTH = 32
"""Of PyLate, where its settings are silent."""

_MASKED = ("deberta", "deberta-v2", "esm")
"""Architectures of transformers in which a token that is not attended to has another embedding, or attends to nothing
itself: its vector is none that torch_ext computes."""


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
        prefixes: What PyLate puts before queries and documents: tokens, where the tokenizer has them.
    """

    normalize: bool = False
    skiplist_words: list[str] = field(default_factory=list)
    skiplist_tasks: list[str] = field(default_factory=lambda: ["document"])
    kept: list[int] = field(default_factory=list)
    query_length: int | None = None
    document_length: int | None = None
    expansion: Mapping[str, Any] | None = None
    prefixes: list[str] = field(default_factory=list)

    def read_lengths(self, settings: Mapping[str, Any]) -> None:
        """Takes what the settings of the Transformer module say."""
        self.query_length = count_or_none(settings.get("query_length"))
        self.document_length = count_or_none(settings.get("document_length"))
        expansion = settings.get("query_expansion")
        self.expansion = expansion if isinstance(expansion, dict) else None

    def read_pylate(self, settings: Mapping[str, Any], path: Path) -> dict[str, str]:
        """Takes what PyLate's settings say, as sentence-transformers reads them; modules for it are not listed.

        Args:
            settings: Content of the file.
            path: The file, for errors.

        Returns:
            The prompts of queries and documents, with their prefixes.

        Raises:
            FolderError: A setting is of another kind.
        """
        self.normalize = True
        words = settings.get("skiplist_words")
        self.skiplist_words = [*string.punctuation] if words is None else words
        if not isinstance(self.skiplist_words, list) or not all(isinstance(word, str) for word in self.skiplist_words):
            raise FolderError(f"{path}: skiplist_words: expected an array of words, got {words!r:.80}")
        self.document_length = count_or_none(settings.get("document_length"))
        length = count_or_none(settings.get("query_length"))
        if settings.get("do_query_expansion") is False:
            self.query_length = length
        else:
            attend = settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
            self.expansion = {"strategy": "fixed", "attend": bool(attend), "length": length or _QUERY_LENGTH}
        prompts = settings.get("prompts")
        texts = dict(prompts) if isinstance(prompts, dict) else {}
        for role in ("query", "document"):
            prefix, text = settings.get(f"{role}_prefix") or "", texts.get(role) or ""
            if not isinstance(prefix, str) or not isinstance(text, str):
                raise FolderError(f"{path}: {role}_prefix: expected a string, got {prefix!r:.80}")
            texts[role] = prefix + text.removeprefix(prefix)
            self.prefixes.append(prefix)
        return texts


def read_token_vectors(
    source: Source, token_id: Callable[[str], int | None], special: Mapping[str, SpecialToken | None]
) -> TokenVectors | None:
    """Which tokens of a text have a vector, for the manifest; None for another task.

    Args:
        source: What the model's folder says.
        token_id: The id of a token, or None.
        special: Special tokens by their names.

    Raises:
        FolderError: Queries are filled up in a way that is not known.
    """
    files = source.tokens
    if files is None:
        return None
    unknown = special["unk"]
    # A word that is not one token would stand for all unknown words.
    words = {word: token_id(word) for word in files.skiplist_words}
    skipped = frozenset(
        number
        for word, number in words.items()
        if number is not None and (unknown is None or number != unknown.id or word == unknown.token)
    )

    def skips(role: str) -> frozenset[int]:
        return skipped if role in files.skiplist_tasks else frozenset()

    document = Role(files.document_length, skips("document"), frozenset(files.kept))
    query: Role | None = Role(files.query_length, skips("query"))
    if files.expansion is not None:
        length, token = files.expansion.get("length"), files.expansion.get("token")
        strategy = files.expansion.get("strategy")
        mask = special["mask"]
        fill = token_id(token) if isinstance(token, str) else None if mask is None else mask.id
        if not isinstance(length, int) or length < 1 or strategy not in ("fixed", "min") or fill is None:
            raise FolderError(
                f"{source.folder}: query_expansion: expected a length, strategy fixed or min, and a token of the "
                f"tokenizer, got {dict(files.expansion)!r:.200}"
            )
        longest = length if strategy == "fixed" else files.query_length and max(files.query_length, length)
        attends = bool(files.expansion.get("attend"))
        query = Role(longest, skips("query"), pad_to=length, pad_id=fill, attends=attends)
        if not attends and source.config.get("model_type") in _MASKED:
            query = None
    return TokenVectors(files.normalize, document, query)
