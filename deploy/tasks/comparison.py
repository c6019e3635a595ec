"""How far answers are from those of transformers in fp32: several ways, of which a task takes one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .answers import best_spans
from .entities import spans
from .figures import centred_cosines, overlap, rank_correlation

__all__ = ["AnswerSpans", "Comparison", "Cosine", "Labels", "Masks", "SparseCosine", "TokenLabels"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Run = Sequence[tuple[int, Any]]
"""Index of a text and what an engine answered to it, with the task's exact options: a row, rows, or an exception."""

TIE = 0.01
"""Two classes or tokens whose probabilities in fp32 differ by less are equally right."""


_FEWEST = 4
"""Texts that are compared with each other, at least: with fewer there is no other choice of a near one."""


class Comparison(ABC):
    """Holds what transformers computed, and compares others with it.

    Attributes:
        metric: What `measure` gives per text.
    """

    metric: str

    @abstractmethod
    def remember(self, text: int, output: Any) -> None:
        """Keeps the reference's output for a text: a row, or rows, of f32."""

    @abstractmethod
    def measure(self, run: Run) -> tuple[Doubles, dict[str, float]]:
        """The metric per text (NaN where the output is not finite), and other figures."""


class _Rows(Comparison):
    """For outputs that are one row per text."""

    def __init__(self, texts: int) -> None:
        self._texts = texts
        self._reference: dict[int, Floats] = {}

    def remember(self, text: int, output: Any) -> None:
        """See `Comparison.remember`."""
        self._reference[text] = np.array(output)  # A copy: a row holds on to those of its batch.

    def _pairs(self, run: Run) -> tuple[list[int], Doubles, Doubles]:
        """Indices of texts, and a row of the reference and of the run for each."""
        order = [text for text, _ in run]
        right = np.stack([self._reference[text] for text in order]).astype(np.float64)
        nothing = np.full(right.shape[1], np.nan)
        got = [nothing if isinstance(output, Exception) else output for _, output in run]
        return order, right, np.stack(got).astype(np.float64)


class Cosine(_Rows):
    """Embeddings: the cosine to the reference's, per text; with their mean taken off, too; and which texts are near."""

    metric = "cosine"

    def measure(self, run: Run) -> tuple[Doubles, dict[str, float]]:
        """See `Comparison.measure`."""
        order, right, got = self._pairs(run)
        cosines = np.full(self._texts, np.nan)
        norms = np.linalg.norm(right, axis=1), np.linalg.norm(got, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosines[order] = (right * got).sum(axis=1) / (norms[0] * norms[1])
            length_error = float(np.abs(norms[1] / norms[0] - 1).max())
        details = {"length_error": length_error}
        if len(right) >= _FEWEST:
            centred = np.nan_to_num(centred_cosines(right, got), nan=-1.0)
            details |= {"centred_mean": float(centred.mean()), "centred_min": float(centred.min())}
            details["retrieval_overlap"] = overlap(right, got)
        return cosines, details


class SparseCosine(Comparison):
    """Sparse vectors: the cosine to the reference's, per text, and which texts are near."""

    metric = "cosine"
    _MOST = 500  # of texts that are compared with each other: rows are as wide as the words that are in use

    def __init__(self, texts: int) -> None:
        self._texts = texts
        self._reference: dict[int, tuple[npt.NDArray[np.int64], Doubles]] = {}

    @staticmethod
    def _vector(output: Any) -> tuple[npt.NDArray[np.int64], Doubles]:
        return np.array(output.indices, np.int64), np.array(output.values, np.float64)

    def remember(self, text: int, output: Any) -> None:
        """See `Comparison.remember`."""
        self._reference[text] = self._vector(output)

    def measure(self, run: Run) -> tuple[Doubles, dict[str, float]]:
        """See `Comparison.measure`."""
        cosines = np.full(self._texts, np.nan)
        length_error = 0.0
        for text, output in run:
            if isinstance(output, Exception):
                length_error = math.inf
                continue
            (words, right), (mine, got) = self._reference[text], self._vector(output)
            _, here, there = np.intersect1d(words, mine, assume_unique=True, return_indices=True)
            norms = float(np.linalg.norm(right)), float(np.linalg.norm(got))
            if not all(norms):  # Texts without any word: alike if both are.
                cosines[text] = float(norms[0] == norms[1])
                continue
            cosines[text] = float(right[here] @ got[there]) / (norms[0] * norms[1])
            length_error = max(length_error, abs(norms[1] / norms[0] - 1))
        details = {"length_error": length_error}
        if len(run) >= _FEWEST:
            details["retrieval_overlap"] = self._overlap(run[:: -(-len(run) // self._MOST)])
        return cosines, details

    def _overlap(self, run: Run) -> float:
        pairs = [
            (self._reference[text], None if isinstance(output, Exception) else self._vector(output))
            for text, output in run
        ]
        used = np.unique(np.concatenate([words for pair in pairs for words, _ in filter(None, pair)]))
        right, got = np.zeros((2, len(pairs), len(used)))
        for row, (first, second) in enumerate(pairs):
            right[row, np.searchsorted(used, first[0])] = first[1]
            if second is None:
                got[row] = np.nan
            else:
                got[row, np.searchsorted(used, second[0])] = second[1]
        return overlap(right, got)


def _softmax(logits: Doubles) -> Doubles:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


class _LogitError:
    """The error of logits over all texts, relative to their size: the ratio of the roots of mean squares.

    Logits smaller than 1 count as 1. The size of differences between logits is what probabilities are made of: an error
    of 0.05 changes them by 1.3 % at most, whether the logits are 0.1 apart or 10. Relative to logits that are all near
    0, as those of a head that cannot tell its classes apart, any rounding of the hidden states would be large.

    Attributes:
        failed: Whether an output was not finite, or was none.
    """

    def __init__(self, centred: bool, least: float = 1.0) -> None:
        """Starts at 0.

        Args:
            centred: Leave out the mean of each row, where softmax does not see it.
            least: What smaller logits count as; 0 where they are the answer, with a unit of their own.
        """
        self._centred = centred
        self._least = least
        self._error = self._size = 0.0
        self._count = 0
        self.failed = False

    def add(self, right: Doubles, got: Doubles) -> None:
        """Counts rows of logits."""
        if self._centred:
            right = right - right.mean(axis=-1, keepdims=True)
            got = got - got.mean(axis=-1, keepdims=True)
        self._error += float(((right - got) ** 2).sum())
        self._size += float((right**2).sum())
        self._count += right.size

    def value(self) -> float:
        """Of everything that was counted."""
        if self.failed:
            return math.inf
        size = max(self._size, self._least**2 * self._count)
        return math.sqrt(self._error / size) if size > 0 else (0.0 if self._error == 0 else math.inf)


class Labels(_Rows):
    """Class logits: whether the best label is the same, and how far probabilities are apart.

    With one label also whether texts are ranked alike: the Spearman correlation of its logits over the texts.
    """

    def __init__(self, texts: int, activation: str) -> None:
        """Prepares.

        Args:
            texts: How many there are.
            activation: What makes scores of logits: `softmax`, `sigmoid` or `none`.
        """
        super().__init__(texts)
        self._activation = activation
        self.metric = "closeness" if activation == "none" else "agreement"

    def measure(self, run: Run) -> tuple[Doubles, dict[str, float]]:
        """See `Comparison.measure`."""
        order, right, got = self._pairs(run)
        single = self._activation == "softmax"
        error = _LogitError(centred=single and right.shape[1] > 1, least=0.0 if self._activation == "none" else 1.0)
        error.add(right, got)
        details = {"logit_error": error.value()}
        if right.shape[1] == 1:
            details["rank_correlation"] = rank_correlation(right[:, 0], got[:, 0])
        per_text = np.full(self._texts, np.nan)
        if self._activation == "none":
            # 1 for the same value, 0 for one that is off by the size of the reference's values.
            size = np.sqrt((right**2).mean(axis=0))
            per_text[order] = (1 - np.abs(got - right) / np.maximum(size, 1e-12)).min(axis=1)
            return per_text, {**details, "max_diff": float(np.abs(got - right).max())}
        if single:
            first, second = _softmax(right), _softmax(got)
            rows = np.arange(len(first))
            same = first[rows, second.argmax(axis=1)] >= first.max(axis=1) - TIE
        else:
            with np.errstate(over="ignore"):
                first, second = 1 / (1 + np.exp(-right)), 1 / (1 + np.exp(-got))
            same = (((first >= 0.5) == (second >= 0.5)) | (np.abs(first - 0.5) < TIE)).all(axis=1)
        per_text[order] = np.where(np.isfinite(second).all(axis=1), same, np.nan)
        difference = np.abs(first - second).max(axis=1)
        return per_text, {
            "max_prob_diff": float(difference.max()),
            "mean_prob_diff": float(difference.mean()),
            **details,
        }


class _Tokens(Comparison):
    """For outputs that are a row per token of a text, f32 [tokens, n]."""

    def __init__(self, texts: int) -> None:
        self._texts = texts
        self._reference: dict[int, Doubles] = {}

    def remember(self, text: int, output: Any) -> None:
        """See `Comparison.remember`."""
        self._reference[text] = self._table(output)

    @staticmethod
    def _table(output: Any) -> Doubles:
        return np.stack([np.asarray(row) for row in output]).astype(np.float64)

    def measure(self, run: Run) -> tuple[Doubles, dict[str, float]]:
        """See `Comparison.measure`."""
        per_text = np.full(self._texts, np.nan)
        error, differences = _LogitError(centred=True), [np.empty(0)]
        for text, output in run:
            if isinstance(output, Exception):
                error.failed = True
                differences.append(np.array([1.0]))
                continue
            right, got = self._reference[text], self._table(output)
            per_text[text], difference = self._compare(right, got, error)
            differences.append(difference)
        together = np.concatenate(differences)
        return per_text, {
            "max_prob_diff": float(together.max()),
            "mean_prob_diff": float(together.mean()),
            "logit_error": error.value(),
        }

    @abstractmethod
    def _compare(self, right: Doubles, got: Doubles, error: _LogitError) -> tuple[float, Doubles]:
        """The metric of a text, and differences of probabilities; adds its logits to `error`."""


class TokenLabels(_Tokens):
    """Logits of tokens: how many get the same label, and the F1 of the entities that neighbours with one label make."""

    metric = "agreement"

    def __init__(self, texts: int, labels: Sequence[str]) -> None:
        super().__init__(texts)
        self._labels = labels
        self._found = [0, 0, 0]

    def measure(self, run: Run) -> tuple[Doubles, dict[str, float]]:
        """See `Comparison.measure`."""
        self._found = [0, 0, 0]
        per_text, details = super().measure(run)
        expected, found, both = self._found
        details["entity_f1"] = 2 * both / (expected + found) if expected + found else 1.0
        return per_text, details

    def _compare(self, right: Doubles, got: Doubles, error: _LogitError) -> tuple[float, Doubles]:
        first, second = _softmax(right), _softmax(got)
        best = second.argmax(axis=1)
        same = first[np.arange(len(first)), best] >= first.max(axis=1) - TIE
        # A label that is as right as the reference's makes no other entities.
        expected = spans([self._labels[label] for label in first.argmax(axis=1)])
        chosen = np.where(same, first.argmax(axis=1), best)
        found = spans([self._labels[label] for label in chosen])
        for place, count in enumerate((len(expected), len(found), len(expected & found))):
            self._found[place] += count
        error.add(right, got)
        return float(same.mean()), np.abs(first - second).max(axis=1)


class AnswerSpans(_Tokens):
    """Logits of tokens that answers begin and end there: whether the likeliest answer is the same."""

    metric = "exact_match"
    _LONGEST = 15

    def _compare(self, right: Doubles, got: Doubles, error: _LogitError) -> tuple[float, Doubles]:
        first, second = _softmax(right.T), _softmax(got.T)
        starts, ends = first.tolist()
        ((best, _, _),) = best_spans(starts, ends, 1, self._LONGEST)
        starts, ends = second.tolist()
        found = best_spans(starts, ends, 1, self._LONGEST)
        same = bool(found) and first[0, found[0][1]] * first[1, found[0][2]] >= best - TIE
        error.add(right.T, got.T)
        return float(same), np.abs(first - second).max(axis=1)


class Masks(Comparison):
    """Logits at masked tokens: whether the best token is the same, and how far probabilities are apart.

    Per text they are f32 [masks, vocabulary].
    A vocabulary is wide: of every row only the logits of the best tokens and of some others are kept, and what is
    needed to make probabilities of them.
    """

    metric = "agreement"
    _BEST = 64
    _OTHERS = 192

    def __init__(self, texts: int) -> None:
        self._texts = texts
        self._columns: dict[int, list[npt.NDArray[np.int64]]] = {}
        self._reference: dict[int, list[tuple[Doubles, float]]] = {}

    @staticmethod
    def _log_sum_exp(row: Doubles) -> float:
        top = float(row.max())
        return top + math.log(float(np.exp(row - top).sum()))

    def remember(self, text: int, output: Any) -> None:
        """See `Comparison.remember`."""
        self._columns[text], self._reference[text] = [], []
        for narrow in output:
            row = np.asarray(narrow).astype(np.float64)
            count = min(self._BEST, len(row))
            best = np.argpartition(-row, count - 1)[:count]
            best = best[np.argsort(-row[best], kind="stable")]
            others = np.linspace(0, len(row) - 1, min(self._OTHERS, len(row))).astype(np.int64)
            columns = np.concatenate([best, others])
            self._columns[text].append(columns)
            self._reference[text].append((row[columns], self._log_sum_exp(row)))

    def measure(self, run: Run) -> tuple[Doubles, dict[str, float]]:
        """See `Comparison.measure`."""
        per_text = np.full(self._texts, np.nan)
        logit_error, differences = _LogitError(centred=True), []
        for text, output in run:
            if isinstance(output, Exception):
                logit_error.failed = True
                continue
            same = []
            for columns, (right, total), narrow in zip(self._columns[text], self._reference[text], output, strict=True):
                row = np.asarray(narrow).astype(np.float64)
                got = row[columns]
                first, second = np.exp(right - total), np.exp(got - self._log_sum_exp(row))
                place = np.flatnonzero(columns == int(row.argmax()))
                same.append(float(len(place) > 0 and first[place[0]] >= first[0] - TIE))
                differences.append(float(np.abs(first - second).max()))
                logit_error.add(right, got)
            per_text[text] = float(np.mean(same))
        return per_text, {
            "max_prob_diff": max(differences, default=math.inf),
            "mean_prob_diff": float(np.mean(differences)) if differences else math.inf,
            "logit_error": logit_error.value(),
        }
