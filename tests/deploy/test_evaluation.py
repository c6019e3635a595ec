"""--eval: examples of the user's own, measured of every variant."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from deploy.bundle import load_manifest
from deploy.export.cli import main
from deploy.export.evaluation import _reciprocal_rank
from deploy.export.tokenizer import Tokens
from deploy.texts import sample

ModelMaker = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
QUICK = ["--max-texts", "4", "--speed-seconds", "0", "--variants", "torch_ext-bf16"]
TEXTS = sample(12, seed=3)


def written(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n", encoding="utf-8")
    return path


def exported(model: Path, rows: Sequence[Any], folder: Path, *options: str) -> dict[str, Any]:
    """The manifest's part on examples, with the figure of the variant."""
    file = written(folder / "own.jsonl", rows)
    assert main([str(model), "-o", str(folder / "out"), "--eval", str(file), *QUICK, *options]) == 0
    manifest = load_manifest(folder / "out")
    accuracy = manifest.variant("torch_ext-bf16").accuracy
    assert accuracy is not None
    found: dict[str, Any] = dict(manifest.verification["eval"])
    assert found["file"] == "own.jsonl"
    assert found["examples"] == len(rows)
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert f"{found['metric']} on {len(rows)} examples of own.jsonl" in page
    return {**found, "variant": accuracy.details["eval"]}


def test_labels_of_texts(tiny_model: ModelMaker, tmp_path: Path, capsys: Capture) -> None:
    """The labels that transformers gives, a third of them turned: all figures are 2 / 3."""
    model = tiny_model("bert", "text-classification")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows: list[dict[str, Any]] = []
    for index, text in enumerate(TEXTS):
        with torch.inference_mode():
            logits = loaded(**tokenizer(text, truncation=True, max_length=66, return_tensors="pt")).logits[0]
        best = int(logits.argmax()) if index % 3 else 1 - int(logits.argmax())
        rows.append({"text": text, "label": f"LABEL_{best}" if index % 2 else best})
    found = exported(model, rows, tmp_path)
    assert found["metric"] == "accuracy"
    assert found["reference"] == pytest.approx(2 / 3)
    assert found["variant"] == pytest.approx(2 / 3, abs=1 / 12)
    printed = capsys.readouterr().out
    assert "--eval: accuracy on 12 examples (own.jsonl); transformers fp32 0.666667" in printed

    # A bound on it.
    file = str(tmp_path / "own.jsonl")
    bound = ["--bound", "torch_ext-bf16.eval=0.9"]
    assert main([str(model), "-o", str(tmp_path / "b"), *QUICK, *bound, "--eval", file]) == 2
    assert re.search(r"eval 0\.\d+ < 0\.9", capsys.readouterr().err)
    assert main([str(model), "-o", str(tmp_path / "b"), *QUICK, *bound]) == 2
    assert "torch_ext-bf16.eval: expected a figure that is measured" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_queries_of_embeddings(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Each text finds itself among all. U+2028 in JSON is no end of a line."""
    rows = [{"query": text, "positives": [text]} for text in (f"{text}\u2028end" for text in TEXTS)]
    found = exported(tiny_model("bert", "feature-extraction"), rows, tmp_path)
    assert found["metric"] == "reciprocal rank"
    assert found["reference"] == found["variant"] == 1


def test_labels_of_embeddings(tiny_model: ModelMaker, tmp_path: Path) -> None:
    rows = [{"text": text, "label": index // 2} for index, text in enumerate(text for text in TEXTS for _ in (0, 1))]
    found = exported(tiny_model("bert", "feature-extraction"), rows, tmp_path)
    assert found["reference"] == found["variant"] == 1


def test_queries_of_a_reranker(tiny_model: ModelMaker, tmp_path: Path) -> None:
    rows = [{"query": text[:20], "positives": [text]} for text in TEXTS]
    found = exported(tiny_model("bert", "text-classification", num_labels=1), rows, tmp_path)
    assert 0 < found["reference"] < 1
    assert found["variant"] == pytest.approx(found["reference"], abs=0.2)


@pytest.mark.parametrize("labels", [1, 2])
def test_the_prompt_of_a_cross_encoder(
    labels: int, tiny_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes before the first text of a pair, as the server puts it there."""
    model = shutil.copytree(tiny_model("bert", "text-classification", num_labels=labels), tmp_path / "model")
    settings = {"model_type": "CrossEncoder", "prompts": {"find": "a list: "}, "default_prompt_name": "find"}
    (model / "config_sentence_transformers.json").write_text(json.dumps(settings), encoding="utf-8")
    given: list[Any] = []
    encode = Tokens.encode_inputs

    def remembered(self: Tokens, inputs: Sequence[Any], words: bool) -> Any:
        given.extend(inputs)
        return encode(self, inputs, words)

    monkeypatch.setattr(Tokens, "encode_inputs", remembered)
    text, *others = TEXTS
    rows = [{"query": text, "positives": others}] if labels == 1 else [{"text": text, "label": 0}]
    exported(model, rows, tmp_path)
    assert given == ([(f"a list: {text}", other) for other in others] if labels == 1 else [f"a list: {text}"])


def test_tags(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """The labels that transformers gives to the first piece of each word."""
    labels = ["O", "B-A", "I-A", "B-B"]
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    model = tiny_model("bert", "token-classification", **names)
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = []
    for text in TEXTS:
        tokens = text.split()[:8]
        encoded = tokenizer(tokens, is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            best = loaded(**encoded).logits[0].argmax(-1).tolist()
        words = encoded.word_ids()
        rows.append({"tokens": tokens, "tags": [labels[best[words.index(word)]] for word in range(len(tokens))]})
    found = exported(model, rows, tmp_path)
    assert found["reference"] == 1
    assert found["variant"] > 0.9


def test_files_that_are_wrong(tiny_model: ModelMaker, tmp_path: Path, capsys: Capture) -> None:
    classifier, encoder = tiny_model("bert", "text-classification"), tiny_model("bert", "feature-extraction")
    right = {"text": "a", "label": "LABEL_0"}
    for model, rows, message in (
        (classifier, [right, {"text": "a"}], "line 2: expected an object with text, label or query, positives"),
        (classifier, [right, {"query": "a", "positives": ["b"]}], "line 2: expected"),
        (classifier, [{"text": "a", "label": "LABEL_7"}], "label 'LABEL_7' is none of the model's: LABEL_0, LABEL_1"),
        (classifier, [{"query": "a", "positives": ["b"]}], "need a model with one label"),
        (
            encoder,
            [{"tokens": ["a"], "tags": ["O"]}],
            "line 1: expected an object with query, positives or text",
        ),
        (encoder, [], "no examples; expected JSON lines"),
        (tiny_model("bert", "fill-mask"), [right], "there is no figure for fill-mask"),
    ):
        file = written(tmp_path / "own.jsonl", rows)
        assert main([str(model), "-o", str(tmp_path / "out"), "--eval", str(file), *QUICK, "--quiet"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main([str(encoder), "-o", str(tmp_path / "out"), "--eval", str(tmp_path / "none"), *QUICK]) == 2
    assert "none: no such file" in capsys.readouterr().err


def test_reciprocal_rank() -> None:
    scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.3]])
    assert _reciprocal_rank(scores, [[1], [1]]) == pytest.approx((1 + 1 / 3) / 2)
    assert _reciprocal_rank(scores, [[0, 2], [0]]) == pytest.approx(1 / 2)
    assert _reciprocal_rank(np.array([[-np.inf, 1.0]]), [[0]]) == 1 / 2
