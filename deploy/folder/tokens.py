"""Which tokens of a text have a vector, as a MultiVectorEncoder of sentence-transformers says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deploy.bundle import Role, SpecialToken, TokenVectors
from deploy.folder.errors import FolderError
from deploy.folder.source import Source

__all__ = ["read_token_vectors"]


def read_token_vectors(
    source: Source, token_id: Callable[[str], int | None], special: Mapping[str, SpecialToken | None]
) -> TokenVectors | None:
    """What the manifest says of it; None for another task.

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
        query = Role(longest, skips("query"), pad_to=length, pad_id=fill) if files.expansion.get("attend") else None
    return TokenVectors(files.normalize, document, query)
