"""`--eval`: what a variant is worth by examples of the user's own, beside how near it is to fp32.

| a line of the file has | of a model for | the figure is |
|---|---|---|
| `text`, `label` | text-classification | share of texts whose best label it is |
| | feature-extraction | share of texts whose nearest other text has the same label |
| `query`, `positives` | feature-extraction | mean reciprocal rank of the first positive among those of all queries |
| | text-classification with one label | the same, among its own positives and those of 15 other queries |
| `tokens`, `tags` | token-classification | F1 of entities; the first piece of a word decides |
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deploy.bundle import Manifest
from deploy.engines.batch import batches
from deploy.engines.engine import Engine
from deploy.export.errors import ExportError
from deploy.tasks import Task, prompted
from deploy.tasks.entities import spans

__all__ = ["Encode", "Evaluation", "read_evaluation"]

Encode = Callable[[Sequence[Any], bool], list[tuple[Any, Any]]]
"""Inputs of the tokenizer (texts, pairs, or words of texts if the flag is set) to ids as engines take them, each with
the index of every token's word."""

_BATCH = 32
_OTHERS = 15
"""Queries whose positives a reranker has to tell from the right ones."""


class Evaluation(ABC):
    """Examples of a file, and a figure of an engine on them.

    Attributes:
        fields: What each line has.
        metric: The figure's name.
        count: Examples.
    """

    fields: ClassVar[tuple[str, str]]
    metric: ClassVar[str]

    def __init__(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest, task: Task, encode: Encode) -> None:
        self.count = len(rows)
        self._task = task
        self._prepare(rows, manifest, encode)

    @abstractmethod
    def _prepare(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest, encode: Encode) -> None:
        """Makes token ids, and what is right."""

    @abstractmethod
    def score(self, engine: Engine) -> float:
        """The figure of an engine, from 0 to 1; an answer that is not finite is wrong."""

    def _answers(self, engine: Engine, items: Sequence[Any]) -> list[Any]:
        found: list[Any] = [None] * len(items)
        for batch in batches(items, _BATCH):
            answers = engine.run(batch.items, [self._task.exact] * len(batch))
            for place, answer in zip(batch.texts, answers, strict=True):
                found[place] = answer
        return found

    def _rows(self, engine: Engine, items: Sequence[Any]) -> Any:
        """One row per input, f64 [inputs, n]; NaN for one that failed."""
        found = self._answers(engine, items)
        width = next((len(row) for row in found if not isinstance(row, Exception)), 1)
        return np.array([[np.nan] * width if isinstance(row, Exception) else list(row) for row in found], np.float64)


class _Labels(Evaluation):
    fields = ("text", "label")
    metric = "accuracy"

    def _prepare(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest, encode: Encode) -> None:
        names = list(manifest.labels or ())
        self._right = []
        for row in rows:
            label = row["label"]
            place = names.index(label) if label in names else label
            if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(names):
                raise ExportError(f"--eval: label {label!r:.60} is none of the model's: {', '.join(names)[:200]}")
            self._right.append(place)
        self._items = [ids for ids, _ in encode(prompted([row["text"] for row in rows], _prompt(manifest)), False)]

    def score(self, engine: Engine) -> float:
        """See `Evaluation.score`."""
        logits = self._rows(engine, self._items)
        best = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
        return float((best == np.array(self._right)).mean())


class _Neighbours(Evaluation):
    fields = ("text", "label")
    metric = "accuracy of the nearest text"

    def _prepare(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest, encode: Encode) -> None:
        if len(rows) < 2:
            raise ExportError("--eval: expected at least 2 texts with labels")
        self._right = np.array([str(row["label"]) for row in rows])
        texts = [_prompt(manifest) + row["text"] for row in rows]
        self._items = [ids for ids, _ in encode(texts, False)]

    def score(self, engine: Engine) -> float:
        """See `Evaluation.score`."""
        similarity = _similarity(*[_units(self._rows(engine, self._items))] * 2)
        np.fill_diagonal(similarity, -np.inf)
        return float((self._right[similarity.argmax(axis=1)] == self._right).mean())


class _Retrieval(Evaluation):
    fields = ("query", "positives")
    metric = "reciprocal rank"

    def _prepare(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest, encode: Encode) -> None:
        documents = list(dict.fromkeys(text for row in rows for text in row["positives"]))
        place = {text: index for index, text in enumerate(documents)}
        self._positives = [[place[text] for text in row["positives"]] for row in rows]
        queries = [_prompt(manifest, "query") + row["query"] for row in rows]
        given = [_prompt(manifest, "document", "passage") + text for text in documents]
        self._items = [ids for ids, _ in encode(queries + given, False)]

    def score(self, engine: Engine) -> float:
        """See `Evaluation.score`."""
        vectors = _units(self._rows(engine, self._items))
        similarity = _similarity(vectors[: self.count], vectors[self.count :])
        return _reciprocal_rank(similarity, self._positives)


class _Reranking(Evaluation):
    fields = ("query", "positives")
    metric = "reciprocal rank"

    def _prepare(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest, encode: Encode) -> None:
        if len(manifest.labels or ()) != 1:
            raise ExportError("--eval: query and positives need a model with one label, or one that makes embeddings")
        pairs: list[tuple[str, str]] = []
        self._ends, self._right = [], []
        for index, row in enumerate(rows):
            others = [rows[(index + step) % len(rows)] for step in range(1, min(_OTHERS + 1, len(rows)))]
            wrong = [text for other in others for text in other["positives"] if text not in row["positives"]]
            pairs += [(row["query"], text) for text in (*row["positives"], *wrong)]
            self._ends.append(len(pairs))
            self._right.append(len(row["positives"]))
        self._items = [ids for ids, _ in encode(prompted(pairs, _prompt(manifest)), False)]

    def score(self, engine: Engine) -> float:
        """See `Evaluation.score`."""
        scores = np.nan_to_num(self._rows(engine, self._items)[:, 0], nan=-np.inf)
        parts = np.split(scores, self._ends[:-1])
        ranks = [_reciprocal_rank(part[None], [range(right)]) for part, right in zip(parts, self._right, strict=True)]
        return float(np.mean(ranks))


class _Tags(Evaluation):
    fields = ("tokens", "tags")
    metric = "F1 of entities"

    def _prepare(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest, encode: Encode) -> None:
        self._names = list(manifest.labels or ())
        for row in rows:
            if len(row["tokens"]) != len(row["tags"]):
                raise ExportError(
                    f"--eval: expected a tag for each token, got {len(row['tags'])} for {len(row['tokens'])}"
                )
            unknown = [tag for tag in row["tags"] if tag not in self._names]
            if unknown:
                raise ExportError(
                    f"--eval: tag {unknown[0]!r:.60} is none of the model's: {', '.join(self._names)[:200]}"
                )
        encoded = encode([row["tokens"] for row in rows], True)
        self._items = [ids for ids, _ in encoded]
        # Words that were cut off have no token: nothing can be found in them.
        self._first = [[list(words).index(word) for word in sorted({*words} - {None})] for _, words in encoded]
        self._right = [row["tags"][: len(first)] for row, first in zip(rows, self._first, strict=True)]

    def score(self, engine: Engine) -> float:
        """See `Evaluation.score`."""
        both = total = 0
        for answer, first, tags in zip(self._answers(engine, self._items), self._first, self._right, strict=True):
            expected = spans(tags)
            found: set[Any] = set()
            if not isinstance(answer, Exception):
                best = [int(np.argmax(np.asarray(answer[place]))) for place in first]
                found = set(spans([self._names[label] for label in best]))
            both += len(set(expected) & found)
            total += len(expected) + len(found)
        return 2 * both / total if total else 1.0


_KINDS: Mapping[str, tuple[type[Evaluation], ...]] = {
    "feature-extraction": (_Retrieval, _Neighbours),
    "text-classification": (_Labels, _Reranking),
    "token-classification": (_Tags,),
}


def read_evaluation(path: Path, manifest: Manifest, task: Task, encode: Encode) -> Evaluation:
    """Reads a file of examples.

    Args:
        path: JSON lines; see the module.
        manifest: What is known of the model.
        task: Its task.
        encode: See `Encode`.

    Raises:
        ExportError: The file cannot be read, or a line is not what the model's task takes.
    """
    kinds = _KINDS.get(task.name, ())
    wanted = " or ".join(f"{kind.fields[0]}, {kind.fields[1]}" for kind in kinds)
    if not kinds:
        raise ExportError(f"--eval: there is no figure for {task.name}; it is for {', '.join(_KINDS)}")
    rows: list[Mapping[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # A text may hold U+2028, an end for `splitlines`.
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"--eval {path}: cannot be read: {error}") from error
    chosen: type[Evaluation] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ExportError(f"--eval {path}, line {number}: expected JSON ({error})") from error
        fits = [kind for kind in kinds if isinstance(row, dict) and _fits(row, kind.fields)]
        if not fits or (chosen is not None and chosen not in fits):
            raise ExportError(f"--eval {path}, line {number}: expected an object with {wanted} ({task.name})")
        chosen = chosen or fits[0]
        rows.append(row)
    if chosen is None:
        raise ExportError(f"--eval {path}: no examples; expected JSON lines with {wanted}")
    return chosen(rows, manifest, task, encode)


def _fits(row: Mapping[str, Any], fields: tuple[str, str]) -> bool:
    def strings(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)

    first, second = (row.get(name) for name in fields)
    if fields == ("tokens", "tags"):
        return strings(first) and strings(second)
    if fields == ("query", "positives"):
        return isinstance(first, str) and strings(second)
    return isinstance(first, str) and isinstance(second, (str, int))


def _prompt(manifest: Manifest, *names: str) -> str:
    """What goes before a text: the model's prompt of one of these names, else its default one."""
    if manifest.prompts is None:
        return ""
    texts = manifest.prompts.texts
    return next((texts[name] for name in names if name in texts), manifest.prompts.default_text)


def _units(rows: Any) -> Any:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def _similarity(first: Any, second: Any) -> Any:
    return np.nan_to_num(first @ second.T, nan=-np.inf)


def _reciprocal_rank(scores: Any, positives: Sequence[Sequence[int]]) -> float:
    """Mean of 1 / rank of the best positive; others with the same score come before it."""
    found = []
    for row, right in zip(scores, positives, strict=True):
        best = max(row[place] for place in right)
        wrong = np.delete(row, list(right))
        found.append(1 / (1 + int((wrong >= best).sum())))
    return float(np.mean(found))
