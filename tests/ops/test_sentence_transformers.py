"""Models of sentence-transformers, optimized or read by the encoder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_ext
from torch_ext import Encoder, Head

pytestmark = [
    pytest.mark.needs_transformers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEXTS = ["the key to a door", "a door", "keys and the doors of a house"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split()))]


@pytest.fixture(scope="module")
def sentence_transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sentence_transformers
    return sentence_transformers


def save(folder: Path, kind: str, **options: Any) -> str:
    """A small random model of transformers with a tokenizer."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **sizes, **options)
    getattr(transformers, f"Bert{kind}")(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def test_accuracy_is_measured_on_what_the_model_takes(sentence_transformers: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, "Model")
    reports: list[torch_ext.sensitivity.Report] = []
    for number in range(2):
        model = sentence_transformers.SentenceTransformer(folder, device="cpu")
        features = getattr(model, "preprocess", model.tokenize)(TEXTS)
        sample = (features, lambda model: model.encode(TEXTS))[number]
        torch_ext.optimize(model, "int8", accuracy=0.9, sample=[sample], report=reports.append)
        assert isinstance(model[0].auto_model.pooler.dense, torch_ext.PackedLinear)
    # Both compare the embeddings.
    assert reports[0].int8.mean == pytest.approx(reports[1].int8.mean, abs=1e-4)


def test_scores_are_compared_with_each_other(sentence_transformers: Any, tmp_path: Path) -> None:
    model = sentence_transformers.CrossEncoder(save(tmp_path, "ForSequenceClassification", num_labels=1), device="cpu")
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[2]), (TEXTS[2], TEXTS[0])]
    reports: list[torch_ext.sensitivity.Report] = []
    torch_ext.optimize(model, "int8", accuracy=0.9, sample=[lambda model: model.predict(pairs)], report=reports.append)
    assert 0.9 < reports[0].chosen.mean < 1


def test_encoder_and_head_of_the_model_inside(sentence_transformers: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, "ForSequenceClassification", num_labels=1)
    crossing = sentence_transformers.CrossEncoder(folder, device="cpu")
    embedding = sentence_transformers.SentenceTransformer(folder, device="cpu")
    for part, model in ((Encoder, embedding), (Encoder, crossing), (Head, crossing)):
        expected = part.from_pretrained(folder).weights()
        found = part.from_transformers(model).weights()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(TypeError, match="expected a Hugging Face model"):
        Encoder.from_transformers(sentence_transformers.SentenceTransformer(modules=[embedding[1]], device="cpu"))


def test_one_of_several_models_is_not_chosen(sentence_transformers: Any, tmp_path: Path) -> None:
    one, other = (sentence_transformers.SentenceTransformer(save(tmp_path, "Model"), device="cpu") for _ in range(2))
    both = sentence_transformers.SentenceTransformer(modules=[one[0], other[0]], device="cpu")
    with pytest.raises(ValueError, match="several models of transformers: pass one"):
        Encoder.from_transformers(both)
    assert Encoder.from_transformers(both[1].auto_model).spec == Encoder.from_transformers(one).spec
