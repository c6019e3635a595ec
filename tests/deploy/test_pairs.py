"""Pairs of texts: classified and reranked as sentence-transformers' cross-encoders do it, from text to score."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import FakeEngine, ask, make_manifest

from deploy.bundle import load_manifest
from deploy.export.cli import main
from deploy.export.reference import older_tokenizer_config
from deploy.folder.describe import describe_folder
from deploy.server.errors import ApiError
from deploy.server.limits.bounds import Limits, Settings
from deploy.server.limits.callers import Caller
from deploy.server.metrics import Metrics
from deploy.server.service import Batcher, Service, TextTokenizer
from deploy.tasks.figures import rank_correlation
from tests.deploy.conftest import save_tokenizer

QUICK = ["--max-texts", "12", "--speed-seconds", "0", "--quiet"]
QUERY = "how to read the name of a file"
TEXTS = ["the name of the file", "", "returns the values of all objects " * 20, "a list", "x " * 50]
LIMITS = Limits(inputs=100, chars=5000, values=1 << 20)

ModelMaker = Callable[..., Path]


def as_cross_encoder(folder: Path, target: Path) -> Path:
    """A folder as sentence-transformers saves a cross-encoder."""
    shutil.copytree(folder, target)
    settings = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Sigmoid"}
    (target / "config_sentence_transformers.json").write_text(json.dumps(settings), encoding="utf-8")
    return change_tokenizer(target, model_max_length=60)


def change_tokenizer(folder: Path, **settings: Any) -> Path:
    """Sets fields of the tokenizer's settings."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **settings}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_reranking_is_that_of_sentence_transformers(model_type: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    """With texts that are cut, the longer one first, and with token types where the model has them."""
    folder = as_cross_encoder(tiny_model(model_type, "text-classification", num_labels=1), tmp_path / "model")
    variants = ["--variants", "torch_ext-fp32,torch_ext-bf16"]
    assert main([str(folder), "-o", str(tmp_path / "out"), *variants, *QUICK]) == 0
    manifest = load_manifest(tmp_path / "out")
    accuracy = manifest.variants["torch_ext-fp32"].accuracy
    assert accuracy.details["rank_correlation"] > 0.99
    assert manifest.verification["mean_tokens"] > 40, "a cross-encoder is verified on pairs"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from sentence_transformers import CrossEncoder

        model = CrossEncoder(str(folder), device="cpu")
        pairs = [(QUERY, text) for text in TEXTS]
        expected = model.predict(pairs)
        logits = model.predict(pairs, activation_fn=torch.nn.Identity())
    assert np.ptp(expected) > 0.05
    for variant, close in (("torch_ext-fp32", 1e-4), ("torch_ext-bf16", 1e-2)):
        result = ask(manifest, variant, lambda service: service.rerank(QUERY, TEXTS, Caller(), LIMITS))
        np.testing.assert_allclose(result.values, expected, atol=close)
        raw = ask(manifest, variant, lambda service: service.rerank(QUERY, TEXTS, Caller(), LIMITS, raw_scores=True))
        np.testing.assert_allclose(raw.values, logits, atol=5 * close)


def test_texts_and_pairs_of_one_request(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """A classifier with several labels takes both, in any order, and answers as transformers' pipeline."""
    folder = tiny_model("bert", "text-classification", num_labels=3)
    assert main([str(folder), "-o", str(tmp_path / "out"), "--variants", "torch_ext-fp32", *QUICK]) == 0
    manifest = load_manifest(tmp_path / "out")
    inputs: list[Any] = ["a list", ("a list", "the file"), ("x", "y"), "the values", "the name of the file"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = transformers.pipeline("text-classification", str(folder), device="cpu")
        given = [one if isinstance(one, str) else {"text": one[0], "text_pair": one[1]} for one in inputs]
        expected = [pipe(one, top_k=None) for one in given]
        logits = [pipe(one, top_k=None, function_to_apply="none") for one in given]

    async def both(service: Service) -> Any:
        first = await service.classify(inputs, Caller(), LIMITS)
        return first, await service.classify(inputs, Caller(), LIMITS, raw_scores=True)

    for result, rows in zip(ask(manifest, "torch_ext-fp32", both), (expected, logits), strict=True):
        for answer, row in zip(result.values, rows, strict=True):
            right = row[0] if isinstance(row[0], list) else row
            assert [item["label"] for item in answer] == [item["label"] for item in right]
            assert [item["score"] for item in answer] == pytest.approx([item["score"] for item in right], abs=1e-4)


def test_token_types_are_those_that_transformers_gives(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """A tokenizer may keep them to itself: then all are 0, though its file has types for pairs."""
    folder = shutil.copytree(tiny_model("bert", "text-classification", num_labels=1), tmp_path / "model")
    change_tokenizer(folder, model_input_names=["input_ids", "attention_mask"])
    manifests = []
    for name, source in (("with", tiny_model("bert", "text-classification", num_labels=1)), ("without", folder)):
        assert main([str(source), "-o", str(tmp_path / name), "--variants", "torch_ext-fp32", *QUICK]) == 0
        manifests.append(load_manifest(tmp_path / name))
    assert [manifest.token_types for manifest in manifests] == [True, False]
    pairs = [("a list", "the file")]
    types = [
        TextTokenizer.from_manifest(manifest).encode_pairs(pairs, truncate=True)[0].types.tolist()
        for manifest in manifests
    ]
    assert types == [[0, 0, 0, 0, 1, 1, 1], [0] * 7]


@pytest.mark.parametrize(
    ("settings", "types"),
    [
        ({"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}, False),
        ({"tokenizer_class": "AlbertTokenizer", "backend": "tokenizers"}, False),
        ({"tokenizer_class": "BertTokenizer", "backend": "tokenizers"}, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, True),
        ({"tokenizer_class": "AlbertTokenizer"}, True),
    ],
)
def test_token_types_are_those_of_the_version_that_saved_the_model(
    settings: dict[str, str], types: bool, tiny_model: ModelMaker, tmp_path: Path
) -> None:
    """Transformers 5.24 gives them in fewer classes than 4.57."""
    folder = shutil.copytree(tiny_model("bert", "text-classification", num_labels=1), tmp_path / "model")
    change_tokenizer(folder, **settings)
    assert describe_folder(str(folder), None).token_types is types
    assert ("model_input_names" in older_tokenizer_config(settings)) is not types


def test_onnx_without_token_types_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Optimum's BigBird takes none: it would answer pairs otherwise, and is verified on single texts."""
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    size = save_tokenizer(folder, "bert")
    config = transformers.BigBirdConfig(vocab_size=size, max_position_embeddings=64, block_size=8, **sizes)
    torch.manual_seed(0)
    transformers.BigBirdForSequenceClassification(config).save_pretrained(folder)
    assert main([str(folder), "-o", str(tmp_path / "out"), *QUICK]) == 0
    assert list(load_manifest(tmp_path / "out").variants) == ["torch-export-bf16"]
    assert "onnx-fp32 is left out of the bundle: optimum wrote an ONNX model without token" in capsys.readouterr().err


def test_what_cannot_be_reranked(tmp_path: Path) -> None:
    async def run() -> None:
        manifest = make_manifest(tmp_path, "text-classification")
        batcher = Batcher(FakeEngine, 1000, 100_000)
        await batcher.start()

        def service(labels: tuple[str, ...]) -> Service:
            changed = dataclasses.replace(manifest, labels=labels)
            return Service(changed, TextTokenizer.from_manifest(manifest), batcher, Settings(), Metrics())

        many, one = service(("no", "yes", "maybe")), service(("fits",))
        with pytest.raises(ApiError, match=r"one label, this one has 3 \(no, yes, maybe\)") as error:
            await many.rerank("w1", ["w2"], Caller(), LIMITS)
        assert error.value.kind == "wrong_task"
        with pytest.raises(ApiError, match="query: expected text, got a NUL"):
            await one.rerank("\0", ["w2"], Caller(), LIMITS)
        with pytest.raises(ApiError, match="input 1: expected at most 16 tokens in a pair, got 18"):
            await one.rerank("w1", ["w2", "w3 " * 17], Caller(), LIMITS, truncate=False)
        with pytest.raises(ApiError, match="expected at least one input"):
            await one.rerank("w1", [], Caller(), LIMITS)
        with pytest.raises(ApiError, match="expected at most 100 inputs"):
            await one.rerank("w1", ["w2"] * 101, Caller(), LIMITS)
        for each in (many, one):
            each.close()
        await batcher.close()

    asyncio.run(run())


def test_pairs_are_cut_the_longer_text_first(tiny_model: ModelMaker) -> None:
    folder = tiny_model("roberta", "text-classification", num_labels=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pairs = [("a b c d e f g h", "a"), ("a", "a b c d e f g h"), ("a b c d e f", "g h i j k l m n"), ("a", "")]
    for limit in (7, 8, 12):
        served = TextTokenizer(folder / "tokenizer.json", limit)
        found = [pair.ids.tolist() for pair in served.encode_pairs(pairs, truncate=True)]
        assert found == tokenizer(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=limit)["input_ids"]
    assert isinstance(served._tokenizer, Tokenizer)


def test_rank_correlation() -> None:
    right = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(right, right * 3 - 1) == pytest.approx(1)
    assert rank_correlation(right, -right) == pytest.approx(-1)
    assert rank_correlation(right, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(0.8)
    assert rank_correlation(right, np.array([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.894427, abs=1e-5)
    assert rank_correlation(np.ones(3), np.ones(3)) == 1
    assert rank_correlation(right, np.array([1.0, np.nan, 3.0, 4.0])) == -1
