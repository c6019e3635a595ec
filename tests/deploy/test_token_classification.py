"""Labels of tokens, and entities: those of transformers' pipeline, for every way to make entities of tokens."""

from __future__ import annotations

import json
import string
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import ask, make_manifest, running

from deploy.bundle import Manifest, load_manifest
from deploy.export.cli import main
from deploy.folder.describe import describe_folder
from deploy.server.limits.bounds import Limits, Settings
from deploy.server.limits.callers import Caller
from deploy.server.service import structured
from deploy.server.service.located import LocatingTokenizer
from deploy.tasks.comparison import TokenLabels
from deploy.tasks.entities import STRATEGIES, spans

QUICK = ["--max-texts", "12", "--speed-seconds", "0", "--quiet", "--variants", "torch_ext-fp32,torch_ext-bf16"]
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
TEXTS = [
    "Ada Lovelace lived in London, and wrote of numbers.",
    "un-believable; naïve façade (the name) of the file-object",
    "日本 and Καλημέρα 🙂🙂 don't  mix ",
    "x",
    "",
    "the list of the values of the objects " * 12,
]
LIMITS = Limits(inputs=100, chars=5000, values=1 << 20)

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def tagger(request: pytest.FixtureRequest, tiny_model: ModelMaker, tmp_path_factory: Any) -> tuple[Path, Manifest]:
    """A random model, and its bundle."""
    settings = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    folder = tiny_model(request.param, "token-classification", **settings)
    target = tmp_path_factory.mktemp("tagger") / "out"
    assert main([str(folder), "-o", str(target), "--max-tokens", "60", *QUICK]) == 0
    return folder, load_manifest(target)


def test_entities_are_those_of_the_pipeline(tagger: tuple[Path, Manifest]) -> None:
    folder, manifest = tagger
    assert manifest.task == "token-classification"
    assert manifest.labels == LABELS
    assert manifest.variants["torch_ext-fp32"].accuracy.details["entity_f1"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        pipe = transformers.pipeline("token-classification", str(folder), device="cpu")
        pipe.tokenizer.model_max_length = 60

        async def all_of_them(service: Any) -> list[Any]:
            return [
                await structured.classify_tokens(service, TEXTS, Caller(), LIMITS, aggregation_strategy=strategy)
                for strategy in STRATEGIES
            ]

        found = 0
        for strategy, result in zip(STRATEGIES, ask(manifest, "torch_ext-fp32", all_of_them), strict=True):
            for text, answer in zip(TEXTS, result.values, strict=True):
                expected = pipe(text, aggregation_strategy=strategy)
                assert [set(item) for item in answer] == [set(item) for item in expected]
                for item, right in zip(answer, expected, strict=True):
                    assert {**item, "score": 0} == {**right, "score": 0}, (strategy, text)
                    assert item["score"] == pytest.approx(float(right["score"]), abs=1e-4)
                found += len(answer)
        assert found > 200, "the model finds hardly anything"


def spaces_within(folder: Path, kind: str) -> Path:
    """A tagger whose tokenizer makes spaces a part of tokens, as transformers 4 saves those of sentencepiece models."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = [
        "\u2581",
        *string.ascii_letters,
        ",",
        "\u65e5\u672c",
        "\u2581the",
        "\u2581list",
        "\u2581in",
        "ve",
        "\u2581Lo",
        "on",
    ]
    scores = [(token, 0.0) for token in special] + [(piece, -2.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.add_special_tokens([AddedToken(token, lstrip=token == "<mask>", special=True) for token in special])
    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([one_space, normalizers.Strip(left=False, right=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    ends = {"special_tokens": [("<s>", 0), ("</s>", 2)]}
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", **ends)
    names = {"bos": 0, "cls": 0, "pad": 1, "eos": 2, "sep": 2, "unk": 3, "mask": 4}
    settings = {"tokenizer_class": f"{kind}Tokenizer", **{f"{key}_token": special[at] for key, at in names.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
        more = {"max_position_embeddings": 130, "type_vocab_size": 1, "pad_token_id": 1, "initializer_range": 0.4}
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=tokenizer.get_vocab_size(), **sizes, **labels, **more
        )
        getattr(transformers, f"{kind}ForTokenClassification")(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["XLMRoberta", "Camembert"])
def test_places_are_without_the_space_before(kind: str, tmp_path: Path) -> None:
    """As in transformers 5, which splits texts at spaces first, whatever the folder's tokenizer does."""
    folder = spaces_within(tmp_path / "model", kind)
    manifest = describe_folder(str(folder), None)
    texts = ["Ada Lovelace  lived in London,", " 日本 e\u0301a \u2602 y ", "the\n\n list\t", "x <mask> in", "a\u3000b"]

    async def all_of_them(service: Any) -> list[Any]:
        return [
            await structured.classify_tokens(service, texts, Caller(), LIMITS, aggregation_strategy=strategy)
            for strategy in STRATEGIES
        ]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from tokenizers.pre_tokenizers import Metaspace, Sequence, WhitespaceSplit

        found = 0
        pipe = transformers.pipeline("token-classification", str(folder), device="cpu")
        theirs: Any = pipe.tokenizer
        if int(transformers.__version__.partition(".")[0]) < 5:
            theirs.backend_tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Metaspace()])
        for strategy, result in zip(STRATEGIES, ask(manifest, "torch_ext-fp32", all_of_them), strict=True):
            for text, answer in zip(texts, result.values, strict=True):
                expected = [{**item, "score": 0} for item in pipe(text, aggregation_strategy=strategy)]
                assert [{**item, "score": 0} for item in answer] == expected, (strategy, text)
                # The mask takes the space before it, as it says itself.
                own = [item for item in answer if "<mask>" not in item["word"]]
                assert not any(text[item["start"]].isspace() for item in own)
                found += sum(item["start"] > 0 for item in own)
    assert found > 20, "the model finds hardly anything"


def test_entities_in_bf16(tagger: tuple[Path, Manifest]) -> None:
    """Nearly those in fp32: a label may change where two are about as likely."""
    _, manifest = tagger
    assert manifest.variants["torch_ext-bf16"].accuracy.details["entity_f1"] > 0.9


def test_the_route(tmp_path: Path) -> None:
    """Through a socket, with an engine that labels each token by its id."""
    with running(make_manifest(tmp_path, "token-classification"), Settings(port=0, max_values=200)) as server:

        def run(ids: Any, options: Any) -> list[Any]:
            assert not any(option.all_labels for option in options)
            return [[[(token % 2, 0.75)] for token in text] for text in ids]

        server.engine.run = run  # type: ignore[method-assign]
        reply = server("POST", "/api/token-classify", {"inputs": ["w0 w1 w2", "w3"]})
        assert reply.status == 200, reply.body
        assert reply.json["usage"] == {"tokens": 8}
        # `w0` has id 5.
        assert reply.json["predictions"] == [
            [
                {"entity_group": "yes", "score": 0.75, "word": "w0", "start": 0, "end": 2},
                {"entity_group": "no", "score": 0.75, "word": "w1", "start": 3, "end": 5},
                {"entity_group": "yes", "score": 0.75, "word": "w2", "start": 6, "end": 8},
            ],
            [{"entity_group": "no", "score": 0.75, "word": "w3", "start": 0, "end": 2}],
        ]
        reply = server("POST", "/api/token-classify", {"inputs": "w0 w1", "aggregation_strategy": "none"})
        assert reply.json["predictions"][0][1] == {
            "entity": "no",
            "score": 0.75,
            "index": 2,
            "word": "w1",
            "start": 3,
            "end": 5,
        }
        for body, status in (
            ({"inputs": "w0", "aggregation_strategy": "most"}, 422),
            ({"inputs": []}, 422),
            ({"inputs": "w0 " * 40, "truncate": False}, 422),
            ({"inputs": ["w0 w1 w2 w3 w4 w5 w6 w7"] * 5}, 413),  # 50 tokens of 5 numbers each.
        ):
            assert server("POST", "/api/token-classify", body).status == status, body


def test_spans() -> None:
    assert spans(["O", "B-PER", "I-PER", "B-PER", "O", "MISC", "MISC", "I-LOC"]) == {
        (1, 2, "PER"),
        (3, 3, "PER"),
        (5, 6, "MISC"),
        (7, 7, "LOC"),
    }


def test_entities_that_differ_lower_the_figure() -> None:
    def rows(labels: list[int]) -> list[np.ndarray]:
        return list(4 * np.eye(3, dtype=np.float32)[labels])

    comparison = TokenLabels(2, ("O", "B-PER", "I-PER"))
    comparison.remember(0, rows([0, 1, 2, 0, 1]))
    comparison.remember(1, rows([0, 0]))
    per_text, details = comparison.measure([(0, rows([0, 1, 2, 0, 1])), (1, rows([0, 0]))])
    assert per_text.tolist() == [1, 1]
    assert details["entity_f1"] == 1
    per_text, details = comparison.measure([(0, rows([0, 1, 0, 0, 1])), (1, FloatingPointError())])
    assert per_text.tolist()[0] == pytest.approx(0.8)
    assert np.isnan(per_text[1])
    assert details["entity_f1"] == pytest.approx(0.5)
    assert details["logit_error"] == float("inf")


def test_many_empty_texts_do_not_hold_the_event_loop_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    class Watched(LocatingTokenizer):
        def encode(self, *arguments: Any) -> list[Any]:
            threads.add(threading.current_thread().name.partition("_")[0])
            return super().encode(*arguments)

    monkeypatch.setattr("deploy.server.service.service.LocatingTokenizer", Watched)
    with running(make_manifest(tmp_path, "token-classification")) as server:
        server.engine.run = lambda ids, options: [[(0, 0.5)] * len(text) for text in ids]  # type: ignore[method-assign]
        reply = server("POST", "/api/token-classify", {"inputs": [""] * 1025})
        assert reply.json["predictions"] == [[]] * 1025
    assert threads == {"helper"}
