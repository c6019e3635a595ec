"""What :mod:`torch_ext.runtime` makes of a batch: hidden states, vectors and logits, as arrays without a library."""

from __future__ import annotations

import operator
from array import array
from typing import Any, Literal, Protocol

__all__ = ["Array", "Pooling", "States", "integers", "whole_number"]

Pooling = Literal["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]


class Array(Protocol):
    """Rows of numbers, ``numpy.asarray`` and ``torch.from_dlpack`` take them without a copy."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def __len__(self) -> int:
        """Rows."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """The memory."""

    def __dlpack__(self, **options: Any) -> Any:
        """A DLPack capsule over the memory."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """The CPU."""

    def tolist(self) -> list[list[float]]:
        """Rows as lists of Python numbers."""


class States:
    """The hidden states of one batch, and what the model makes of them. All results are fp32."""

    def __init__(self, states: Any) -> None:
        self._states = states

    def hidden(self) -> Array:
        """The last hidden states, ``[tokens, hidden_size]``."""
        result: Array = self._states.hidden()
        return result

    def pool(
        self, mode: Pooling | str = "mean", normalize: bool = False, dimensions: int | None = None, skipped: int = 0
    ) -> Array:
        """One vector for each text, ``[texts, dimensions]``; a head for feature-extraction comes after the pooling.

        Args:
            mode: How the states of its tokens become one; as sentence-transformers names it. Of several, such as
                ``cls+mean``, the vectors stand side by side.
            normalize: Divide each vector by its Euclidean length.
            dimensions: Leading dimensions to keep, before normalizing; None: all. For models that were trained for it
                (Matryoshka).
            skipped: Leading tokens of each text that do not count, such as those of a prompt; a text without others
                becomes 0.

        Raises:
            ValueError: ``mode`` is not known or not what the head was made for, there are not as many dimensions, or
                ``skipped`` is negative.
            TypeError: an argument is of another type.
        """
        if not isinstance(mode, str):
            raise TypeError(f"Encoder: expected the name of a pooling, got {type(mode).__name__}")
        kept = 0 if dimensions is None else whole_number("dimensions", dimensions, 1)
        result: Array = self._states.pool(mode, normalize, kept, whole_number("skipped", skipped, 0))
        return result

    def token_vectors(self, normalize: bool = False) -> Array:
        """One vector for each token, ``[tokens, embedding_size]``, behind a head for feature-extraction, if any.

        Args:
            normalize: Divide each vector by its Euclidean length.

        Raises:
            ValueError: The head takes the vectors of several poolings.
        """
        result: Array = self._states.token_vectors(normalize)
        return result

    def text_logits(self) -> Array:
        """What a head for text classification says of each text, ``[texts, outputs]``.

        Raises:
            ValueError: The model has no such head.
        """
        result: Array = self._states.text_logits()
        return result

    def token_logits(self, rows: Any = None) -> Array:
        """What the head says of tokens: labels, start and end of an answer, or words for a mask.

        Args:
            rows: Which of the batch's tokens, int64 ``[n]``; None: all.

        Returns:
            ``[n, outputs]``.

        Raises:
            ValueError: The model has no head, or a row is out of range.
            TypeError: ``rows`` are no int64.
        """
        result: Array = self._states.token_logits(None if rows is None else integers(rows, "q"))
        return result

    def top_k(self, rows: Any, k: int) -> tuple[Array, Array]:
        """The likeliest outputs of the head for some tokens: the best words for each mask.

        Args:
            rows: Which of the batch's tokens, int64 ``[n]``.
            k: How many, at most ``outputs``.

        Returns:
            Their indices, int64, and their probabilities (softmax over all), each ``[n, k]``, likeliest first.

        Raises:
            ValueError: The model has no head, or ``k`` or a row is out of range.
            TypeError: ``rows`` are no int64.
        """
        indices, probabilities = self._states.top_k(integers(rows, "q"), whole_number("k", k))
        return indices, probabilities

    def sparse(self, *, total: bool = False, twice: bool = False) -> tuple[Array, Array, Array]:
        """A sparse vector over the head's outputs for each text, as SPLADE makes it of the words for a mask.

        It is ``log(1 + max(x, 0))`` of the outputs for each token, and the largest over the tokens of a text. Only a
        few tokens' outputs are in memory at a time.

        Args:
            total: The sum over the tokens, instead of the largest.
            twice: ``log(1 + x)`` of that again.

        Returns:
            Where the entries of each text begin, and the end, int64 ``[1, texts + 1]``; their indices, rising in each
            text, int64 ``[1, entries]``; their values, ``[1, entries]``: none is 0, and one is NaN or infinite where an
            output is.

        Raises:
            ValueError: The model has no head for tokens.
        """
        bounds, indices, values = self._states.sparse(total, twice)
        return bounds, indices, values


def whole_number(name: str, number: int, least: int | None = None) -> int:
    """The number.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below ``least``, or does not fit into 32 bits.
    """
    try:
        number = operator.index(number)
    except TypeError:
        raise TypeError(f"Encoder: expected {name} as an integer, got {type(number).__name__}") from None
    if least is not None and number < least:
        raise ValueError(f"Encoder: expected {name} of at least {least}, got {number}")
    if number.bit_length() > 31:
        raise ValueError(f"Encoder: expected {name} of at most 32 bits, got {number}")
    return number


def integers(values: Any, kind: Literal["q", "i"]) -> Any:
    """Lists as arrays; everything else as it is."""
    if not isinstance(values, (list, tuple, range)):
        return values
    bits = 64 if kind == "q" else 32
    try:
        return array(kind, values)
    except OverflowError as error:
        raise ValueError(f"Encoder: expected integers of {bits} bits, got one that is larger: {error}") from error
    except TypeError as error:
        raise TypeError(f"Encoder: expected a list of integers or an array of int{bits}: {error}") from error
