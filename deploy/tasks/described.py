"""What a task reads of a model: of its folder before there is a bundle, and of the manifest of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .rows import FilledIds, Ids

__all__ = ["Described", "ModelFolder"]


class _Pooling(Protocol):
    @property
    def mode(self) -> str: ...

    @property
    def normalize(self) -> bool: ...

    @property
    def dimensions(self) -> int | None: ...


class _Dense(Protocol):
    @property
    def activation(self) -> str: ...

    @property
    def folder(self) -> str | None: ...


class _Sparse(Protocol):
    @property
    def total(self) -> bool: ...

    @property
    def twice(self) -> bool: ...

    @property
    def most(self) -> int | None: ...


class _Role(Protocol):
    @property
    def max_tokens(self) -> int | None: ...

    @property
    def pad_to(self) -> int: ...

    def keeps(self, token: int) -> bool: ...

    def filled(self, ids: Ids, most: int | None = None) -> Ids | FilledIds: ...


class _TokenVectors(Protocol):
    @property
    def normalize(self) -> bool: ...

    @property
    def query(self) -> _Role | None: ...

    @property
    def document(self) -> _Role: ...


class _Token(Protocol):
    @property
    def id(self) -> int: ...


class ModelFolder(Protocol):
    """What a task reads of a model's folder; `export.source.Source` describes the fields."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Content of `config.json`."""

    @property
    def cross_encoder(self) -> bool:
        """Whether sentence-transformers calls it one."""

    @property
    def named_activation(self) -> str | None:
        """Class that the files name for scores."""


class _Model(Protocol):
    @property
    def architecture(self) -> str: ...


class Described(Protocol):
    """What a task reads of a manifest; `bundle.Manifest` describes the fields."""

    @property
    def root(self) -> Path:
        """Folder of the bundle."""

    @property
    def model(self) -> _Model:
        """Where the weights come from."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    @property
    def max_tokens(self) -> int:
        """Longest input."""

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids."""

    @property
    def width(self) -> int:
        """Of embeddings."""

    @property
    def pooling(self) -> _Pooling | None:
        """How embeddings are made."""

    @property
    def dense(self) -> Sequence[_Dense]:
        """Linear stages between pooling and norm."""

    @property
    def sparse(self) -> _Sparse | None:
        """How sparse vectors are made."""

    @property
    def token_vectors(self) -> _TokenVectors | None:
        """Which tokens have a vector."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of classes."""

    @property
    def problem_type(self) -> str | None:
        """What the classes are."""

    @property
    def activation(self) -> str | None:
        """What makes scores of logits."""

    @property
    def special_tokens(self) -> Mapping[str, _Token | None]:
        """`pad`, `mask`, `cls`, `sep`, `unk`."""
