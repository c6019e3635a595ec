"""What a manifest says of the stages behind the encoder, beside its head and its pooling."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from deploy.bundle.fields import Reader
from deploy.tasks.rows import FilledIds, Ids

__all__ = ["DENSE_ACTIVATIONS", "DENSE_FILE", "Dense", "Role", "Sparse", "TokenVectors"]

DENSE_FILE = "dense.npz"
"""Weights of the linear stages, for the ONNX variants; those of torch_ext have them in their own files."""

DENSE_ACTIVATIONS = ("none", "tanh", "relu", "silu", "gelu", "sigmoid", "leaky_relu")

_STRATEGIES = ("max", "sum")
_ACTIVATIONS = ("relu", "log1p_relu")


@dataclass(frozen=True)
class Dense:
    """A linear stage behind the pooling, before embeddings get length 1.

    Attributes:
        outputs: Width of what it makes.
        activation: One of `DENSE_ACTIVATIONS`.
        folder: Where its weights are, if they are in the model's folder and not in the bundle; it is not written.
    """

    outputs: int
    activation: str
    folder: str | None = None

    @classmethod
    def read(cls, reader: Reader) -> Dense:
        """Reads its JSON object."""
        return cls(reader.count("outputs", 1), reader.choice("activation", DENSE_ACTIVATIONS))

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {"outputs": self.outputs, "activation": self.activation}


@dataclass(frozen=True)
class Sparse:
    """How logits of tokens become one sparse vector per text, in the words of sentence-transformers' SpladePooling.

    Attributes:
        strategy: `max` or `sum` over the tokens.
        activation: `relu` for log(1 + max(x, 0)), or `log1p_relu` for log(1 + x) of that again.
        most: How many of the largest weights a vector keeps; None: all.
    """

    strategy: str = "max"
    activation: str = "relu"
    most: int | None = None

    @property
    def total(self) -> bool:
        """Whether tokens are added up."""
        return self.strategy == "sum"

    @property
    def twice(self) -> bool:
        """Whether the logarithm is taken twice."""
        return self.activation == "log1p_relu"

    @classmethod
    def read(cls, reader: Reader) -> Sparse:
        """Reads its JSON object, a manifest's or that of sentence-transformers."""
        return cls(
            reader.choice("strategy", _STRATEGIES, "max"),
            reader.choice("activation", _ACTIVATIONS, "relu"),
            None if reader.value.get("most") is None else reader.count("most", 1),
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        limit = {} if self.most is None else {"most": self.most}
        return {"strategy": self.strategy, "activation": self.activation, **limit}


@dataclass(frozen=True)
class Role:
    """What texts of one kind, queries or documents, have a vector for.

    Attributes:
        max_tokens: Longest text, if it is less than the model takes; None: what the model takes.
        skipped: Ids of tokens that have none.
        kept: Ids of the only tokens that have one; none: all.
        pad_to: Shorter texts are filled up to so many tokens; 0: they are not.
        pad_id: With which token.
        attends: Whether tokens attend to those; else they have vectors, and change no others.
    """

    max_tokens: int | None = None
    skipped: Collection[int] = frozenset()
    kept: Collection[int] = frozenset()
    pad_to: int = 0
    pad_id: int = 0
    attends: bool = True

    def keeps(self, token: int) -> bool:
        """Whether a token has a vector."""
        return token not in self.skipped and (not self.kept or token in self.kept)

    def filled(self, ids: Ids, most: int | None = None) -> Ids | FilledIds:
        """Token ids of a text, filled up.

        Args:
            ids: Of the text, special tokens included; they are changed.
            most: Up to so many tokens, if that is less than `pad_to`.
        """
        own = len(ids)
        length = self.pad_to if most is None else min(self.pad_to, most)
        ids.extend([self.pad_id] * (length - own))
        return ids if self.attends or len(ids) == own else FilledIds(ids, own)

    @classmethod
    def read(cls, reader: Reader) -> Role:
        """Reads its JSON object."""

        def ids(name: str) -> frozenset[int]:
            values = reader.get(name, list, optional=True) or []
            return frozenset(Reader(f"{reader.where}.{name}", {"0": value}).count("0") for value in values)

        return cls(
            None if reader.value.get("max_tokens") is None else reader.count("max_tokens", 1),
            ids("skipped"),
            ids("kept"),
            reader.count("pad_to") if "pad_to" in reader.value else 0,
            reader.count("pad_id") if "pad_id" in reader.value else 0,
            reader.get("attends", bool, optional=True) is not False,
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        result: dict[str, Any] = {"skipped": sorted(self.skipped), "kept": sorted(self.kept)}
        if self.max_tokens is not None:
            result["max_tokens"] = self.max_tokens
        if self.pad_to:
            result |= {"pad_to": self.pad_to, "pad_id": self.pad_id}
        if not self.attends:
            result["attends"] = False
        return result


@dataclass(frozen=True)
class TokenVectors:
    """Which tokens of a text have a vector, for late interaction.

    Attributes:
        normalize: Whether vectors are divided by their L2 norm.
        document: Of texts that are looked for.
        query: Of what is looked for; None: not supported, since the model fills queries up with tokens that others do
            not attend to, and its architecture has another use for the attention mask, or the bundle is from before
            they were supported.
    """

    normalize: bool
    document: Role
    query: Role | None

    @classmethod
    def read(cls, reader: Reader) -> TokenVectors:
        """Reads its JSON object."""
        query = None if reader.value.get("query") is None else Role.read(reader.child("query"))
        return cls(reader.get("normalize", bool), Role.read(reader.child("document")), query)

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        query = None if self.query is None else self.query.to_json()
        return {"normalize": self.normalize, "document": self.document.to_json(), "query": query}
