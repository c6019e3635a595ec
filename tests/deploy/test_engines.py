"""Engines: what verifies is what serves, every pooling, texts that fail alone, pairs."""

from __future__ import annotations

import base64
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import Client, FakeEngine, LiveServer, make_manifest, token_ids

from deploy.bundle import DEFAULT_VARIANTS, POOLING_MODES, VARIANTS, load_manifest
from deploy.engines.batch import BATCH_TOKENS, Batch, PairIds, batches, groups
from deploy.engines.engine import Engine
from deploy.engines.open import load_engine, open_engine
from deploy.engines.padded import PaddedEngine, padded
from deploy.engines.pooling import pool_padded
from deploy.engines.torch_ext import TorchExtEngine
from deploy.engines.transformers import TransformersEngine
from deploy.export.cli import main
from deploy.server.limits.bounds import Settings
from deploy.server.service.tokens import TextTokenizer
from deploy.server.variants.choice import Choice
from deploy.tasks import RAW, TASKS, Rows, open_task
from deploy.tasks.feature_extraction import EmbedOptions
from deploy.tasks.fill_mask import FillMaskOptions
from deploy.tasks.text_classification import TextClassification
from torch_ext import Encoder, Head, pool

QUICK = ["--max-texts", "24", "--speed-seconds", "0", "--quiet"]
BundleMaker = Callable[[str, str], Path]
ModelMaker = Callable[..., Path]


# What verifies is what serves.


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Any], list[Any], list[Any]]]:
    """What engines ran while an export verified: the file, ids, options and answers of every batch."""
    found: list[tuple[str, list[Any], list[Any], list[Any]]] = []
    files: dict[int, str] = {}
    run = Engine.run

    def remembered(self: Engine, ids: Sequence[Any], options: Sequence[Any]) -> list[Any]:
        answers = run(self, ids, options)
        if id(self) in files:
            found.append((files[id(self)], list(ids), list(options), answers))
        return answers

    def opened(manifest: Any, variant: Any, threads: int) -> Engine:
        engine = open_engine(manifest, variant, threads)
        files[id(engine)] = variant.file
        engines.append(engine)  # So that no other gets its id.
        return engine

    engines: list[Engine] = []
    monkeypatch.setattr(Engine, "run", remembered)
    monkeypatch.setattr("deploy.export.pipeline.open_engine", opened)
    return found


FIRST_TASKS = ("feature-extraction", "sparse-embedding", "token-embedding")
"""One with pooling, one with a head, one with neither; the others take 12 s each."""


@pytest.mark.parametrize("task", [pytest.param(t, marks=() if t in FIRST_TASKS else pytest.mark.long) for t in TASKS])
def test_verified_bits_are_served(task: str, tiny_model: ModelMaker, tmp_path: Path, runs: list[Any]) -> None:
    """The same bits for the same batch, for every variant: the figures of a manifest are those of what is served."""
    assert main([str(tiny_model("bert", task)), "-o", str(tmp_path / "out"), "--threads", "1", *QUICK]) == 0
    verified = list(runs)
    manifest = load_manifest(tmp_path / "out")
    assert set(manifest.variants) == set(DEFAULT_VARIANTS)
    tokenizer = TextTokenizer.from_manifest(manifest)
    for name, variant in manifest.variants.items():
        engine, _ = load_engine(manifest, variant, 1, tokenizer.token)
        mine = [row[1:] for row in verified if row[0] == variant.file]
        assert sum(len(ids) for ids, _, _ in mine) >= variant.accuracy.texts, name
        for ids, options, expected in mine:
            for first, second in zip(expected, engine.run(ids, options), strict=True):
                if manifest.sparse is not None:
                    assert first.indices.tolist() == second.indices.tolist()
                    first, second = first.values, second.values
                first, second = np.asarray(first), np.asarray(second)
                assert first.dtype == second.dtype == np.float32
                assert first.tobytes() == second.tobytes(), name
        # What a request gets is made of those bits.
        ids, _, expected = mine[0]
        usual = engine.run(ids, [engine.task.usual] * len(ids))
        for raw, answer in zip(expected, usual, strict=True):
            if task == "text-classification":
                scores = engine.task.scores(raw.tolist())  # type: ignore[attr-defined]
                assert {item["label"]: item["score"] for item in answer} == dict(
                    zip(manifest.labels or (), scores, strict=True)
                )
            elif task == "token-classification":
                assert [token[0][0] for token in answer] == np.argmax(raw, axis=1).tolist()
            elif task == "fill-mask":
                assert [place[0]["token_id"] for place in answer] == np.argmax(raw, axis=1).tolist()


class RealServer(LiveServer):
    """A server in this process with the engine of a bundle's only variant."""

    def loaded(self, load: Callable[[], FakeEngine]) -> FakeEngine:
        self.choice = Choice(next(iter(self.manifest.variants)), "only")
        return super().loaded(load)


@pytest.mark.parametrize("variant", ["torch_ext-bf16", "onnx-int8"])
def test_verified_bits_come_out_of_the_server(
    variant: str, tiny_model: ModelMaker, tmp_path: Path, runs: list[Any]
) -> None:
    arguments = ["-o", str(tmp_path / "out"), "--threads", "1", "--variants", variant, "--normalize", *QUICK]
    assert main([str(tiny_model()), *arguments]) == 0
    manifest = load_manifest(tmp_path / "out")
    (ids, _, expected), *_ = [row[1:] for row in runs if row[0] == VARIANTS[variant].file]
    server = RealServer(
        manifest,
        Settings(port=0, max_batch_tokens=1 << 20, accept_token_ids=True),
        FakeEngine(),
        lambda: load_engine(manifest, manifest.variant(variant), 1)[0],
    )
    try:
        assert server.ready.wait(60)
        with Client(server.port) as client:
            body = {"input": [text.tolist() for text in ids], "encoding_format": "base64"}
            reply = client("POST", "/v1/embeddings", body)
        assert reply.status == 200, reply.body
        for row, answer in zip(expected, reply.json["data"], strict=True):
            assert base64.b64decode(answer["embedding"]) == row.tobytes()
    finally:
        assert server.stop() == 0


def test_batches_are_those_of_a_server() -> None:
    assert Settings().max_batch_tokens == BATCH_TOKENS
    ids = [token_ids([0] * length) for length in (700, 3, 900, 5, 3000, 4)]
    found = batches(ids, 3)
    assert [list(batch.texts) for batch in found] == [[1, 5, 3], [0, 2], [4]]
    assert groups([5, 3000, 4, 900], max_padded=1000) == [[1], [3], [0, 2]]


# Pooling.


@pytest.mark.parametrize("mode", [*POOLING_MODES, "max+cls"])
def test_poolings_are_those_of_sentence_transformers(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Deprecations inside it.
        from sentence_transformers import models

        lengths = np.array([1, 7, 4])
        hidden = np.random.default_rng(0).normal(size=(3, 7, 32)).astype(np.float32)
        mask = np.arange(7) < lengths[:, None]
        features = {"token_embeddings": torch.from_numpy(hidden), "attention_mask": torch.from_numpy(mask).long()}
        expected = models.Pooling(32, pooling_mode=tuple(mode.split("+")))(features)["sentence_embedding"].numpy()
    padding = np.where(mask[..., None], hidden, 1e6).astype(np.float32)  # Counts for nothing.
    if mode not in ("max", "cls", "lasttoken", "max+cls"):
        padding = hidden
    np.testing.assert_allclose(pool_padded(padding, lengths, mode), expected, rtol=2e-6, atol=2e-6)
    packed = torch.from_numpy(hidden[mask])
    cu_seqlens = torch.tensor([0, 1, 8, 12], dtype=torch.int32)
    kind: Any = mode
    np.testing.assert_allclose(pool(packed, cu_seqlens, kind).numpy(), expected, rtol=2e-6, atol=2e-6)
    rounded = pool(packed.bfloat16(), cu_seqlens, kind)
    assert rounded.dtype == torch.float32
    np.testing.assert_allclose(rounded.numpy(), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("mode", ["mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_a_bundle_of_every_pooling(mode: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Each variant keeps its bound against the reference, and the reference is sentence-transformers'."""
    model = tiny_model()
    arguments = ["-o", str(tmp_path / "out"), "--pooling", mode, *QUICK]
    assert main([str(model), *arguments]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.pooling is not None
    assert manifest.pooling.mode == mode
    tokenizer = TextTokenizer.from_manifest(manifest)
    texts = ["the name of the file", "a list", "returns the values of all objects"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer, models

        modules = [models.Transformer(str(model)), models.Pooling(64, pooling_mode=mode)]
        expected = SentenceTransformer(modules=modules, device="cpu").encode(texts)
    for name in ("torch_ext-fp32", "onnx-fp32"):
        engine, _ = load_engine(manifest, manifest.variant(name), 1)
        found = np.stack(engine.run(tokenizer.encode(texts, True), [EmbedOptions(False)] * 3))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_onnx_runs_no_more_tokens_at_once_than_caches_hold(
    tiny_bundle: BundleMaker, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(tiny_bundle("bert", "feature-extraction"), verify=False)
    engine: Any = open_engine(manifest, manifest.variant("onnx-fp32"), threads)
    forward = engine._forward
    runs: list[int] = []

    def counted(ids: Any, *rest: Any) -> Any:
        runs.append(ids.size)
        return forward(ids, *rest)

    monkeypatch.setattr(engine, "_forward", counted)
    texts = [token_ids([5] * 30)] * 80
    assert len(engine.run(texts, [EmbedOptions(False)] * len(texts))) == len(texts)
    assert max(runs) <= 512 * threads + 30
    assert len(runs) == -(-80 // (max(runs) // 30))


def test_engines_cut_and_normalise_alike(tiny_bundle: BundleMaker) -> None:
    """Leading dimensions of an embedding, of length 1 after the cut."""
    manifest = load_manifest(tiny_bundle("bert", "feature-extraction"), verify=False)
    ids = [token_ids([2, 30, 31, 32, 3]), token_ids([2, 40, 3])]
    found = []
    for name in ("torch_ext-fp32", "onnx-fp32"):
        engine = open_engine(manifest, manifest.variant(name), 1)
        whole = np.asarray(engine.run(ids, [EmbedOptions(False)] * 2))
        cut = np.asarray(engine.run(ids, [EmbedOptions(True, 5)] * 2))
        kept = whole[:, :5]
        np.testing.assert_allclose(cut, kept / np.linalg.norm(kept, axis=1, keepdims=True), rtol=1e-5)
        found.append(cut)
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torch_ext-fp32", "onnx-fp32"])
def test_the_best_outputs_are_those_of_the_logits(name: str, tiny_bundle: BundleMaker) -> None:
    manifest = load_manifest(tiny_bundle("bert", "fill-mask"), verify=False)
    engine = open_engine(manifest, manifest.variant(name), 1)
    masked = token_ids([2, 30, 4, 31, 4, 3])
    (logits,) = engine.run([masked], [RAW])
    (answer,) = engine.run([masked], [FillMaskOptions(1 << 20)])  # More than there are words.
    for row, found in zip(logits, answer, strict=True):
        numbers = np.asarray(row, np.float64)
        powers = np.exp(numbers - numbers.max())
        assert sorted(item["token_id"] for item in found) == list(range(len(row)))
        scores = np.array([item["score"] for item in found])
        assert (np.diff(scores) <= 0).all()
        np.testing.assert_allclose(scores, (powers / powers.sum())[[item["token_id"] for item in found]], rtol=1e-4)


# Numbers that are not finite.


def poisoned(folder: Path, task: str) -> tuple[Any, int]:
    """A model with one token id that makes NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, TASKS[task].auto_class).from_pretrained(folder).eval()
    poison = model.config.vocab_size - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    return model, poison


def numbers(answer: Any) -> np.ndarray:
    """A row, rows, or a sparse vector as an array."""
    if isinstance(answer, list):
        return np.concatenate([np.asarray(row).ravel() for row in answer])
    if not hasattr(answer, "indices"):
        return np.asarray(answer)
    dense = np.zeros(1000, np.float32)
    dense[np.asarray(answer.indices)] = answer.values
    return dense


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_a_text_that_is_not_finite_fails_alone(
    task: str, dtype: Any, tiny_model: ModelMaker, tiny_bundle: BundleMaker, tmp_path: Path
) -> None:
    """The others get what they get without it, whatever the engine."""
    model, poison = poisoned(tiny_model("bert", task), task)
    bound = open_task(load_manifest(tiny_bundle("bert", task), verify=False))
    engines: list[Engine] = [TransformersEngine(model, bound)]
    if bound.needs.mask_token or bound.needs.sparse:  # Its output layer is the table of words: every text would fail.
        torch.manual_seed(0)
        model.cls.predictions.decoder.weight = torch.nn.Parameter(torch.randn(poison + 1, 64))
    head = Head.from_transformers(model, dtype) if bound.needs.head else None
    Encoder.from_transformers(model, dtype).save(tmp_path / "encoder.safetensors", head)
    engines.append(TorchExtEngine.load(tmp_path / "encoder.safetensors", dtype, 2, bound))
    good = bound.prepare([token_ids([2, 30, 31, 32, 3]), token_ids([2, 40, 41, 3])])
    (bad,) = bound.prepare([token_ids([2, 50, 51, 3])])
    bad = token_ids([poison if token in (50, 51) else token for token in bad])
    for engine in engines:
        answers = engine.run([good[0], bad, good[1]], [engine.task.usual] * 3)
        assert [isinstance(answer, FloatingPointError) for answer in answers] == [False, True, False]
        alone = engine.run(good, [engine.task.exact] * 2)
        beside = engine.run([good[0], bad, good[1]], [engine.task.exact] * 3)
        for row, expected in zip([beside[0], beside[2]], alone, strict=True):
            # Kernels for another number of rows add in another order.
            first, second = numbers(row), numbers(expected)
            np.testing.assert_allclose(
                first, second, rtol=0, atol=(1e-4 if dtype == "fp32" else 0.02) * np.abs(second).max()
            )


class OneScale(PaddedEngine):
    """As int8 with one scale for all activations: NaN in one text is NaN in all of its group."""

    couples_texts = True

    def _forward(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        rows = np.repeat(ids[..., None], 8, axis=2).astype(np.float32)
        return np.full_like(rows, np.nan) if (ids == 13).any() else rows


def test_texts_that_share_a_scale_are_run_alone_after_a_failure(tmp_path: Path) -> None:
    engine = OneScale(open_task(make_manifest(tmp_path)))
    texts = [token_ids([2, 7, 3]), token_ids([2, 13, 3]), token_ids([2, 9, 3])]
    answers = engine.run(texts, [EmbedOptions(False)] * 3)
    np.testing.assert_allclose([answers[0], answers[2]], [[4.0] * 8, [14 / 3] * 8], rtol=1e-6)
    assert isinstance(answers[1], FloatingPointError)


def test_a_model_that_is_broken_is_not_served(tiny_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(tiny_bundle("bert", "feature-extraction"), verify=False)
    monkeypatch.setattr(
        "deploy.engines.torch_ext._PackedStates.pooled",
        lambda self, *how: Rows(np.full((len(self.ids), 64), np.nan, "f4")),
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        load_engine(manifest, manifest.variant("torch_ext-fp32"), 1)


# Scores, and pairs of texts.

PAIRS = [("the name of the file", "a file and its name"), ("a list", "returns the values of all objects"), ("x", "y")]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_labels": 1}, None),
        ({"num_labels": 1}, "torch.nn.modules.activation.Sigmoid"),
        ({"num_labels": 1}, "torch.nn.modules.linear.Identity"),
        ({"num_labels": 1, "problem_type": "regression"}, None),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, None),
        ({"num_labels": 3}, None),
    ],
)
def test_scores_are_those_of_the_libraries(
    settings: dict[str, Any], named: str | None, tiny_model: ModelMaker, tmp_path: Path
) -> None:
    """Of transformers' pipeline, and where the files name an activation, of sentence-transformers' CrossEncoder."""
    folder = shutil.copytree(tiny_model("bert", "text-classification", **settings), tmp_path / "model")
    if named is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["sentence_transformers"] = {"activation_fn": named}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arguments = ["-o", str(tmp_path / "out"), "--variants", "torch_ext-fp32,onnx-fp32", *QUICK]
    assert main([str(folder), *arguments]) == 0
    manifest = load_manifest(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        encoded = [tokenizer(*pair) for pair in PAIRS]
        if named is None:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
            pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
            given = [{"text": first, "text_pair": second} for first, second in PAIRS]
            expected = [{item["label"]: item["score"] for item in pipe(one, top_k=None)} for one in given]
        else:
            from sentence_transformers import CrossEncoder

            expected = [{"LABEL_0": float(score)} for score in CrossEncoder(str(folder), device="cpu").predict(PAIRS)]
    ids = [PairIds(token_ids(item["input_ids"]), token_ids(item["token_type_ids"])) for item in encoded]
    for name in manifest.variants:
        engine, _ = load_engine(manifest, manifest.variant(name), 1)
        for answer, right in zip(engine.run(ids, [None] * len(ids)), expected, strict=True):
            assert {item["label"]: item["score"] for item in answer} == pytest.approx(right, abs=1e-4)


def test_pairs_have_types(tiny_model: ModelMaker, tiny_bundle: BundleMaker) -> None:
    """The second text of a pair has type 1: without, a model that was trained with it reads something else."""
    pair = PairIds(token_ids([2, 30, 31, 3, 40, 3]), token_ids([0, 0, 0, 0, 1, 1]))
    batch = Batch([pair, token_ids([2, 30, 3])])
    assert batch.lengths == [6, 3]
    ids, mask, types = padded(batch.part([1, 0]), 0)
    assert types.tolist() == [[0] * 6, [0, 0, 0, 0, 1, 1]]
    assert (ids[0].tolist(), mask[0].tolist()) == ([2, 30, 3, 0, 0, 0], [1, 1, 1, 0, 0, 0])
    manifest = load_manifest(tiny_bundle("bert", "text-classification"), verify=False)
    for name in ("torch_ext-fp32", "onnx-fp32"):
        engine = open_engine(manifest, manifest.variant(name), 1)
        typed, plain = engine.run([pair], [RAW]), engine.run([pair.ids], [RAW])
        both = engine.run([pair, pair.ids], [RAW] * 2)
        assert np.abs(np.subtract(typed[0], plain[0])).max() > 1e-4
        np.testing.assert_allclose(both, [typed[0], plain[0]], rtol=1e-4, atol=1e-5)
        assert engine.cost(pair) == 6


class PairScore(TextClassification):
    """What a file for a cross-encoder's similarity of two texts would hold: one score per pair."""

    name = "sentence-similarity"
    needs = type(TextClassification.needs)(head=True, labels=True, pairs=True)

    def answer(self, scores: Sequence[float], order: Sequence[int]) -> float:
        return scores[0]


def test_a_new_task_is_one_class(tiny_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported, verified on pairs, and served by the same engine: nothing else knows the task's name."""
    monkeypatch.setitem(TASKS, PairScore.name, PairScore)  # type: ignore[misc]
    folder = tiny_model("bert", "text-classification", num_labels=1)
    assert main([str(folder), "-o", str(tmp_path / "out"), "--task", PairScore.name, *QUICK]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.task, set(manifest.variants)) == (PairScore.name, set(DEFAULT_VARIANTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import CrossEncoder

        expected = CrossEncoder(str(folder), device="cpu").predict(PAIRS)
    ids = TextTokenizer.from_manifest(manifest).encode_pairs(PAIRS, truncate=True)
    for name in ("torch_ext-fp32", "onnx-fp32"):
        engine, _ = load_engine(manifest, manifest.variant(name), 1)
        np.testing.assert_allclose(engine.run(ids, [None] * len(ids)), expected, atol=1e-4)
