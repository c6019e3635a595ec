"""Tasks: what they answer to what an engine computed, what a text costs, and what they make of token ids."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import make_manifest, token_ids

from deploy.engines.padded import PaddedEngine, ranked
from deploy.engines.pooling import shortened
from deploy.tasks import RAW, TASKS, Rows, TaskError, open_task
from deploy.tasks.bounds import BOUND_NAMES
from deploy.tasks.feature_extraction import EmbedOptions
from deploy.tasks.fill_mask import FillMaskOptions
from deploy.tasks.sparse_embedding import SparseVector
from deploy.tasks.text_classification import PROBLEM_TYPES, read_labels

MASK = 4
NAN, INF = float("nan"), float("inf")


class FakeStates:
    """What an engine would hand to a task."""

    def __init__(self, output: Any, ids: Sequence[Sequence[int]] = ()) -> None:
        self.output = np.array(output, np.float32)
        self.ids = [token_ids(text) for text in ids]
        self.asked: list[tuple[Any, ...]] = []

    def pooled(self, mode: str, normalize: bool = False, dimensions: int | None = None, skipped: int = 0) -> Rows:
        self.asked.append((mode, normalize, dimensions))
        return Rows(shortened(self.output, normalize, dimensions))

    def text_logits(self) -> Rows:
        return Rows(self.output)

    def token_logits(self, texts: Sequence[int], positions: Sequence[int]) -> Rows:
        return Rows(self.output[list(texts)] + np.float32(positions)[:, None])

    def top_k(self, texts: Sequence[int], positions: Sequence[int], k: int) -> tuple[Rows, Rows]:
        return ranked(np.asarray(self.token_logits(texts, positions)), k)


MULTI, SINGLE = "multi_label_classification", "single_label_classification"

# Answers.


def classifier(folder: Path, activation: str | None, problem_type: str, labels: Sequence[str]) -> Any:
    manifest = make_manifest(folder, "text-classification")
    fields = {"activation": activation, "problem_type": problem_type, "labels": tuple(labels)}
    return open_task(dataclasses.replace(manifest, **fields))


@pytest.mark.parametrize(
    ("activation", "problem_type", "logits", "scores"),
    [
        ("sigmoid", MULTI, [2.0], [0.8807971]),
        ("sigmoid", SINGLE, [-200.0], [0.0]),
        ("none", "regression", [2.0], [2.0]),
        ("softmax", SINGLE, [0.0, 2.0], [0.8807971, 0.1192029]),
        # Bundles of before the field existed.
        (None, "regression", [2.0], [2.0]),
        (None, SINGLE, [0.0, 2.0], [0.8807971, 0.1192029]),
        (None, MULTI, [0.0, 2.0], [0.8807971, 0.5]),
    ],
)
def test_scores(
    activation: str | None, problem_type: str, logits: list[float], scores: list[float], tmp_path: Path
) -> None:
    task = classifier(tmp_path, activation, problem_type, [str(index) for index in range(len(logits))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (answer,) = task.answers(FakeStates([logits]), [None])
    assert [item["score"] for item in answer] == pytest.approx(scores, abs=1e-6)
    (raw,) = task.answers(FakeStates([logits]), [RAW])
    assert raw.tolist() == logits


def test_a_text_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    """Its answer is an exception, whatever the task; the others are as without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = classifier(tmp_path, "softmax", SINGLE, ["no", "yes"])
        rows = [[0.0, 1.0], [NAN, 0.0], [INF, 0.0], [1.0, -INF], [2.0, 0.0]]
        answers = task.answers(FakeStates(rows), [None] * 5)
        assert [isinstance(answer, FloatingPointError) for answer in answers] == [False, True, True, True, False]
        assert answers[4] == task.answers(FakeStates(rows[4:]), [None])[0]

        task = open_task(make_manifest(tmp_path, "feature-extraction"))
        rows = [[3.0, 4.0], [NAN, 1.0], [1e30, 1e30], [0.0, 0.0]]
        answers = task.answers(FakeStates(rows), [EmbedOptions(True), EmbedOptions(False)] * 2)
        assert [isinstance(answer, FloatingPointError) for answer in answers] == [False, True, True, False]
        np.testing.assert_allclose(answers[0], [0.6, 0.8], rtol=1e-6)

        task = open_task(make_manifest(tmp_path, "fill-mask"))
        ids = [[2, MASK, 3], [2, MASK, 9, MASK, 3], [2, MASK, MASK, 3]]
        states = FakeStates([[0.0, 1.0, 2.0], [0.0, NAN, 0.0], [INF, 0.0, 0.0]], ids)
        answers = task.answers(states, [FillMaskOptions(2)] * 3)
        assert [isinstance(answer, FloatingPointError) for answer in answers] == [False, True, True]
        assert [item["token_id"] for item in answers[0][0]] == [2, 1]


def test_embeddings_of_requests_that_differ(tmp_path: Path) -> None:
    """Texts of one batch, cut and normalised as each one's request says; each kind is asked for once."""
    task = open_task(make_manifest(tmp_path, "feature-extraction"))
    states = FakeStates([[3.0, 4.0, 12.0]] * 4)
    options = [EmbedOptions(True), EmbedOptions(True, 2), EmbedOptions(False), EmbedOptions(True, 2)]
    answers = task.answers(states, options)
    expected: list[list[float]] = [[3 / 13, 4 / 13, 12 / 13], [0.6, 0.8], [3, 4, 12], [0.6, 0.8]]
    for answer, row in zip(answers, expected, strict=True):
        assert answer.tolist() == pytest.approx(row, rel=1e-6)
    assert states.asked == [("mean", True, None), ("mean", True, 2), ("mean", False, None)]


def test_rows() -> None:
    rows = Rows(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert (len(rows), rows.width) == (2, 3)
    assert [row.tolist() for row in rows] == rows.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert rows[0].format == "f"
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match="expected rows from 0 to 1"):
            rows[wrong]
    for shape in ((0, 3), (2, 0)):
        empty = Rows(np.empty(shape, np.float32))
        assert [len(row) for row in empty] == [0] * shape[0]
        assert empty.finite == bytes([1] * shape[0])
    assert Rows(np.array([[1, 2]])).tolist() == [[1, 2]]


def test_fill_mask_keeps_masks_apart_and_memory_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of several texts, in calls that each fit the memory: the same as all at once."""
    ids = [[2, MASK, MASK, 3], [2, 9, 3], [2, 9, 8, MASK, 3]]
    logits = np.random.default_rng(0).normal(size=(3, 50))
    task = open_task(make_manifest(tmp_path, "fill-mask"))
    options = [FillMaskOptions(3), FillMaskOptions(1), FillMaskOptions(50)]
    whole = task.answers(FakeStates(logits, ids), options)
    assert [[len(place) for place in text] for text in whole] == [[3, 3], [], [50]]
    monkeypatch.setattr("deploy.tasks.fill_mask.LOGITS_BYTES", 1)
    assert task.answers(FakeStates(logits, ids), options) == whole
    raw = task.answers(FakeStates(logits, ids), [RAW] * 3)
    np.testing.assert_array_equal(raw[0], np.float32(logits[0]) + np.float32([[1], [2]]))


# Token ids.


def test_cost_counts_the_vocabulary(tmp_path: Path) -> None:
    ids = token_ids([2, MASK, 9, MASK, 3])
    for task in TASKS.values():
        if not task.needs.mask_token:
            assert open_task(make_manifest(tmp_path, task.name)).cost_tokens(ids) == 5
    manifest = dataclasses.replace(make_manifest(tmp_path, "fill-mask"), hidden_size=768)
    for size, tokens in ((30_522, 10), (250_002, 82)):
        assert open_task(dataclasses.replace(manifest, vocab_size=size)).cost_tokens(ids) == 5 + 2 * tokens
        # A bundle of before the manifest's field existed.
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}), encoding="utf-8")
        assert open_task(manifest).cost_tokens(ids) == 5 + 2 * tokens
        assert open_task(manifest).logits_per_token == size


def test_texts_that_padding_would_change_run_beside_those_of_their_length(tmp_path: Path) -> None:
    class Engine(PaddedEngine):
        alone = False

        def _forward(self, ids: Any, mask: Any, types: Any) -> Any:
            assert mask.all() or not self.alone
            return np.ones((*ids.shape, 8), np.float32)

    manifest = make_manifest(tmp_path)
    for name in ("BertModel", "ConvBertModel"):
        model = dataclasses.replace(manifest.model, architecture=name)
        engine = Engine(open_task(dataclasses.replace(manifest, model=model)))
        engine.alone = name == "ConvBertModel"
        texts = [token_ids([2, *range(5, 5 + size), 3]) for size in (1, 4, 4, 2)]
        assert len(engine.run(texts, [EmbedOptions(True)] * 4)) == 4


def test_fill_mask_prepares_texts(tmp_path: Path) -> None:
    task = open_task(make_manifest(tmp_path, "fill-mask"))
    rows = [token_ids(row) for row in ([2, 9, 8, 3], [2, MASK, 8, 3], [2, 3], [2, 7, 3])]
    made = task.prepare(rows)
    assert [len(row) for row in made] == [4, 4, 3]
    assert all(row.count(MASK) == 1 for row in made)
    assert rows[0].tolist() == [2, 9, 8, 3]
    with pytest.raises(TaskError, match="none of the texts has a token that could be masked"):
        task.prepare([token_ids([2, 3])])


@pytest.mark.parametrize("count", [None, 0, -1, True, "x", 2.0])
def test_a_number_of_labels_that_is_none_is_refused(count: object) -> None:
    with pytest.raises(TaskError, match="num_labels: expected at least 1"):
        read_labels({"num_labels": count})


def test_labels_without_names_are_numbered() -> None:
    assert read_labels({}) == ("LABEL_0", "LABEL_1")
    assert read_labels({"num_labels": 1}) == ("LABEL_0",)


def test_what_can_be_bounded_is_measured(tmp_path: Path) -> None:
    for task in TASKS.values():
        for problem, labels in itertools.product(PROBLEM_TYPES, (1, 2)):
            folder = SimpleNamespace(
                config={"num_labels": labels, "problem_type": problem}, cross_encoder=False, named_activation=None
            )
            fields = task.read(folder)
            manifest = dataclasses.replace(make_manifest(tmp_path, task.name), **fields)
            comparison = open_task(manifest).comparison(24)
            of_tokens = task.name in ("token-classification", "question-answering", "fill-mask")
            rows = np.random.default_rng(0).normal(size=(24, 1, 2) if of_tokens else (24, 2)).astype(np.float32)
            rows = rows[..., :labels] if task.needs.labels else rows
            answers = [SparseVector([2, 5], row) for row in rows] if task.needs.sparse else rows
            for text, row in enumerate(answers):
                comparison.remember(text, row)
            _, details = comparison.measure(list(enumerate(answers)))
            assert set(task.bound_names(folder)) == {"mean", "min"} | (set(details) & set(BOUND_NAMES))
