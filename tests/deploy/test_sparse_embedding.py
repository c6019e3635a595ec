"""Sparse vectors: those of sentence-transformers' SparseEncoder, from its folders."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import write_splade_files
from server_harness import ask, make_manifest, running

from deploy.bundle import Sparse, load_manifest
from deploy.export.cli import main
from deploy.folder.describe import describe_folder
from deploy.server.limits.bounds import Limits
from deploy.server.limits.callers import Caller
from deploy.server.service import structured
from deploy.tasks.comparison import SparseCosine
from deploy.tasks.sparse_embedding import SparseVector

QUICK = ["--max-texts", "12", "--speed-seconds", "0", "--quiet"]
TEXTS = ["the name of the file", "", "returns the values of all objects " * 12, "x"]
LIMITS = Limits(inputs=100, chars=5000, values=1 << 20)

ModelMaker = Callable[..., Path]


@pytest.mark.parametrize(
    ("model_type", "strategy", "activation", "other"),
    [
        ("bert", "max", "relu", "onnx-fp32"),
        ("bert", "sum", "log1p_relu", "onnx-fp32"),
        ("roberta", "max", "log1p_relu", "torch_ext-bf16"),
        ("distilbert", "sum", "relu", "torch_ext-int8"),
    ],
)
def test_vectors_are_those_of_sentence_transformers(
    model_type: str, strategy: str, activation: str, other: str, tiny_model: ModelMaker, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model(model_type, "fill-mask"), tmp_path / "model")
    write_splade_files(folder, pooling_strategy=strategy, activation_function=activation)
    arguments = ["--variants", f"torch_ext-fp32,{other}", "--max-tokens", "60", *QUICK]
    assert main([str(folder), "-o", str(tmp_path / "out"), *arguments]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.task, manifest.sparse) == ("sparse-embedding", Sparse(strategy, activation))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SparseEncoder

        encoder = SparseEncoder(str(folder), device="cpu")
        encoder.max_seq_length = 60
        expected = encoder.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    for name in manifest.variants:
        result = ask(manifest, name, lambda service: structured.embed_sparse(service, TEXTS, Caller(), LIMITS))
        for vector, right in zip(result.values, expected, strict=True):
            assert [item["index"] for item in vector] == sorted(item["index"] for item in vector)
            found = np.zeros_like(right)
            found[[item["index"] for item in vector]] = [item["value"] for item in vector]
            if name in ("torch_ext-fp32", "onnx-fp32"):
                np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)
            else:
                assert found @ right / np.linalg.norm(found) / np.linalg.norm(right) > 0.99


def test_a_vector_keeps_the_largest_weights(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("bert", "fill-mask"), tmp_path / "model")
    write_splade_files(folder)
    settings = {"model_type": "SparseEncoder", "max_active_dims": 7}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SparseEncoder

        encoder = SparseEncoder(str(folder), device="cpu")
        expected = encoder.encode(TEXTS[:1], convert_to_sparse_tensor=False, max_active_dims=7).numpy()[0]
    assert main([str(folder), "-o", str(tmp_path / "out"), "--variants", "torch_ext-fp32", *QUICK]) == 0
    for manifest in (load_manifest(tmp_path / "out"), describe_folder(str(folder), None)):
        assert manifest.sparse == Sparse(most=7)
        result = ask(
            manifest, "torch_ext-fp32", lambda service: structured.embed_sparse(service, TEXTS[:1], Caller(), LIMITS)
        )
        assert [item["index"] for item in result.values[0]] == np.flatnonzero(expected).tolist()


def test_folders_that_are_refused(tiny_model: ModelMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(change: Callable[[Path], None]) -> str:
        folder = shutil.copytree(tiny_model("bert", "fill-mask"), tmp_path / "model")
        write_splade_files(folder)
        change(folder)
        assert main([str(folder), "-o", str(tmp_path / "out"), *QUICK]) == 2
        shutil.rmtree(folder)
        return capsys.readouterr().err

    def add(kind: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
            modules.append({"idx": 2, "name": "2", "path": "", "type": f"sentence_transformers.models.{kind}"})
            (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")

        return change

    assert "Normalize behind a SpladePooling is not supported" in refused(add("Normalize"))
    assert "expected a sparse encoder of a masked-LM Transformer and a SpladePooling" in refused(add("Router"))
    settings = {"pooling_strategy": "mean"}
    found = refused(
        lambda folder: (folder / "1_SpladePooling" / "config.json").write_text(json.dumps(settings)) and None
    )
    assert "strategy: expected one of max, sum, got 'mean'" in found
    found = refused(
        lambda folder: (
            (folder / "modules.json").write_text(
                json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}])
            )
            and None
        )
    )
    assert "expected a sparse encoder" in found


def test_a_vector_is_made_when_it_is_read() -> None:
    vector = SparseVector([3, 7], [0.5, 2.0])
    assert len(vector) == 2
    assert vector == [{"index": 3, "value": 0.5}, {"index": 7, "value": 2.0}]
    assert vector[-1:] == [{"index": 7, "value": 2.0}]
    assert SparseVector([], []) == []


def test_cosines_of_sparse_vectors() -> None:
    comparison = SparseCosine(4)
    for text, indices in enumerate(([1, 5], [2], [], [4])):
        comparison.remember(text, SparseVector(indices, [3.0, 4.0][: len(indices)]))
    run: list[tuple[int, Any]] = [
        (0, SparseVector([1, 5], [6.0, 8.0])),
        (1, SparseVector([3], [1.0])),
        (2, SparseVector([], [])),
    ]
    cosines, details = comparison.measure(run)
    assert cosines[:3].tolist() == pytest.approx([1, 0, 1])
    assert details["length_error"] == pytest.approx(1)
    cosines, details = comparison.measure([*run, (3, FloatingPointError())])
    assert np.isnan(cosines[3])
    assert details["length_error"] == float("inf")


def test_the_route(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path, "sparse-embedding")) as server:
        server.engine.run = lambda ids, options: [  # type: ignore[method-assign]
            SparseVector(sorted(set(text)), [0.5] * len(set(text))) for text in ids
        ]
        reply = server("POST", "/embed_sparse", {"inputs": ["w0 w1", "w2"], "truncate": False, "unknown": 1})
        assert reply.status == 200, reply.body
        rows = [[2, 3, 5, 6], [2, 3, 7]]
        assert reply.json == [[{"index": index, "value": 0.5} for index in row] for row in rows]
        assert reply.headers["x-compute-tokens"] == "7"
        assert server("POST", "/embed_sparse", {"inputs": "w0"}).json[0][0]["index"] == 2
        for path in ("/", "/invocations"):
            assert server("POST", path, {"inputs": ["w0 w1", "w2"]}).body == reply.body
        for body, kind in (
            ({"inputs": []}, "Empty"),
            ({"inputs": "w0 " * 40, "truncate": False}, "Validation"),
            ({"inputs": "w0", "prompt_name": "query"}, "Validation"),
        ):
            assert server("POST", "/embed_sparse", body).json["error_type"] == kind
