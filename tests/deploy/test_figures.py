"""Figures beside the cosine: they see what the cosine does not."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy.bundle import load_manifest
from deploy.export.report import print_table
from deploy.tasks.comparison import Cosine, SparseCosine
from deploy.tasks.figures import centred_cosines, overlap
from deploy.tasks.sparse_embedding import SparseVector


def measured(comparison: Cosine, right: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    for text, row in enumerate(right):
        comparison.remember(text, row)
    return comparison.measure(list(enumerate(got)))


def test_embeddings_that_all_point_one_way() -> None:
    """Noise as large as what tells texts apart: the cosine is near 1, the centred one is not, nor are neighbours."""
    rng = np.random.default_rng(0)
    right = 10 + rng.normal(size=(64, 32))
    noisy = right + rng.normal(size=right.shape)
    cosines, details = measured(Cosine(64), right, noisy)
    assert cosines.min() > 0.98
    assert details["centred_mean"] < 0.8
    assert details["retrieval_overlap"] < 0.5
    # The mean alone moved: nothing that matters, and the cosine to the reference's centre still sees it.
    _, same = measured(Cosine(64), right, right)
    assert same["centred_min"] == pytest.approx(1)
    assert same["retrieval_overlap"] == 1


def test_centred_cosine_at_the_centre() -> None:
    right = np.array([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]])
    assert centred_cosines(right, right).tolist() == pytest.approx([1, 1, 1])
    moved = right + np.array([[0.5, 0], [0, 0], [0, 0]])
    assert centred_cosines(right, moved)[0] == 0
    assert np.isnan(centred_cosines(right, right * [[1], [1], [np.nan]])[2])


def test_overlap_counts_the_nearest() -> None:
    angles = np.deg2rad([0, 10, 25, 90, 100, 115])
    right = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert overlap(right, right, 2) == 1
    # Text 2 moves into the other group: two texts in a group of two stay, and each has one of two other neighbours.
    angles[2] = np.deg2rad(107)
    moved = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert 0.3 < overlap(right, moved, 2) < 0.8
    moved[0] = np.nan
    assert overlap(right, moved, 2) < overlap(right, right, 2)
    # Never so many that none of the others could be missed.
    assert overlap(right, right[[0, 3, 1, 4, 2, 5]]) < 1


def test_few_texts_have_no_neighbours() -> None:
    _, details = measured(Cosine(3), np.eye(3), np.eye(3))
    assert details.keys() == {"length_error"}


def test_sparse_vectors() -> None:
    rng = np.random.default_rng(1)
    words = [sorted(rng.choice(50, 6, replace=False)) for _ in range(30)]
    vectors = [SparseVector(array("q", chosen), array("f", [1] * 6)) for chosen in words]
    comparison = SparseCosine(30)
    for text, vector in enumerate(vectors):
        comparison.remember(text, vector)
    assert comparison.measure(list(enumerate(vectors)))[1]["retrieval_overlap"] == 1
    turned = [*vectors[1:], vectors[0]]
    assert comparison.measure(list(enumerate(turned)))[1]["retrieval_overlap"] < 0.7
    failed = [FloatingPointError(), *vectors[1:]]
    assert comparison.measure(list(enumerate(failed)))[1]["retrieval_overlap"] < 1


def test_they_are_in_manifest_and_table(tiny_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    manifest = load_manifest(tiny_bundle("bert", "feature-extraction"))
    accuracy = manifest.variant("torch_ext-bf16").accuracy
    assert accuracy is not None
    assert 0.99 < accuracy.details["centred_min"] <= accuracy.details["centred_mean"] <= 1
    assert 0.8 < accuracy.details["retrieval_overlap"] <= 1
    assert len(accuracy.quantiles) == 21
    assert accuracy.quantiles[0] == accuracy.min
    assert list(accuracy.quantiles) == sorted(accuracy.quantiles)
    print_table(manifest)
    assert "cosine mean       min   centred  top-10 overlap  texts/s" in capsys.readouterr().out
