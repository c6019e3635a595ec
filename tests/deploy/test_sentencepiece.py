"""Models of sentencepiece, read without that library."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from deploy.export.cli import main
from deploy.folder.describe import describe_folder
from deploy.folder.errors import FolderError
from deploy.folder.sentencepiece import read_unigrams
from deploy.server.service.tokens import TextTokenizer
from tests.deploy.test_folders import change

ModelMaker = Callable[..., Path]

WORDS = ["\u2581a", "\u2581list", "\u2581of", "\u2581val", "ues", "\u2581", "7,"]


def whole(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def part(number: int, data: bytes) -> bytes:
    return whole(8 * number + 2) + whole(len(data)) + data


def model(pieces: list[str], model_type: int = 1) -> bytes:
    """A message of sentencepiece: pieces with falling scores, and the type of the model."""
    made = b""
    for place, piece in enumerate(pieces):
        score = whole(8 * 2 + 5) + struct.pack("<f", -float(place))
        made += part(1, part(1, piece.encode()) + score + whole(8 * 3) + whole(1))
    return made + part(2, whole(8 * 3) + whole(model_type)) + part(3, part(1, b"identity"))


KINDS = {
    "XLMRoberta": ("sentencepiece.bpe.model", ["<unk>", "<s>", "</s>", *WORDS]),
    "Camembert": ("sentencepiece.bpe.model", ["<unk>", "<s>", "</s>", *WORDS]),
    "Albert": ("spiece.model", ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", *WORDS]),
    "DebertaV2": ("spm.model", ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS]),
    "T5": ("spiece.model", ["<pad>", "</s>", "<unk>", *WORDS]),
}
# Ids of the special tokens around a text, of the first word, and of an unknown character.
EXPECTED = {
    "XLMRoberta": ([0], [2], 4, 3),
    "Camembert": ([5], [6], 7, 3),
    "Albert": ([2], [3], 5, 1),
    "DebertaV2": ([1], [2], 4, 3),
    "T5": ([], [1], 3, 2),
}


@pytest.fixture
def folder(tiny_model: ModelMaker, tmp_path: Path) -> Path:
    made = shutil.copytree(tiny_model(), tmp_path / "model")
    for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
        (made / name).unlink(missing_ok=True)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_nothing_but_unigrams(kind: str, folder: Path) -> None:
    name, pieces = KINDS[kind]
    (folder / name).write_bytes(model(pieces))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{kind}Tokenizer"}))
    manifest = describe_folder(str(folder), None)
    tokenizer = TextTokenizer.from_manifest(manifest)
    before, behind, first, unknown = EXPECTED[kind]
    a, of, val, ues = first, first + 2, first + 3, first + 4
    texts = ["a of  values", "a\u4f60"]
    encoded = [list(map(int, row)) for row in tokenizer.encode(texts, truncate=True)]
    assert encoded[0] == [*before, a, of, val, ues, *behind]
    assert encoded[1] == [*before, a, unknown, *behind]
    pad = manifest.special_tokens["pad"]
    assert pad is not None
    assert pad.id == (1 if kind in ("XLMRoberta", "Camembert") else 0)


@pytest.mark.parametrize("kind", ["T5", "MT5"])
@pytest.mark.parametrize("count", [0, 7, None])
def test_sentinels_of_t5_are_as_many_as_its_settings_say(kind: str, count: int | None, folder: Path) -> None:
    _, pieces = KINDS["T5"]
    (folder / "spiece.model").write_bytes(model(pieces))
    settings = {"tokenizer_class": f"{kind}Tokenizer"} | ({} if count is None else {"extra_ids": count})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = Tokenizer.from_str(describe_folder(str(folder), None).tokenizer_json or "").get_vocab()
    sentinels = 100 if count is None else count
    assert len(vocabulary) == len(pieces) + sentinels
    if sentinels:
        assert vocabulary["<extra_id_0>"] == len(vocabulary) - 1


@pytest.mark.parametrize("count", [-1, 1 << 40, "100"])
def test_sentinels_that_are_no_number(count: Any, folder: Path) -> None:
    (folder / "spiece.model").write_bytes(model(KINDS["T5"][1]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": count}))
    with pytest.raises(FolderError, match=r"tokenizer_config.json: extra_ids: expected a number up to 10000, got"):
        describe_folder(str(folder), None)


def test_scores_of_numbers_before_a_comma(tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(model(KINDS["Albert"][1]))
    scores = dict(map(tuple, read_unigrams(path, "Albert", {})["model"]["vocab"]))
    assert (scores["7,"], scores["\u2581"]) == (-111.0, -10.0)
    names = [
        each["type"] for each in read_unigrams(path, "Albert", {"keep_accents": True})["normalizer"]["normalizers"]
    ]
    assert names == ["Replace", "Replace", "Lowercase", "Replace"]


def test_export_reads_it_without_sentencepiece(folder: Path, tmp_path: Path) -> None:
    (folder / "spiece.model").write_bytes(model([*KINDS["Albert"][1], *"abcdefghijklmnopqrstuvwxyz"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "AlbertTokenizer"}))
    before = sorted(path.name for path in folder.iterdir())
    options = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", "torch_ext-fp32"]
    assert main([str(folder), "-o", str(tmp_path / "out"), *options]) == 0
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\xff", "expected a model of sentencepiece"),
        (b"\x0a" + b"\xff" * 12, "expected a model of sentencepiece: a number is too long"),
        (model(["<unk>"])[:-3], "expected a model of sentencepiece: a field ends behind the file"),
        (model(KINDS["T5"][1], model_type=2), "expected a model of unigrams"),
        (model(["\u2581a"]), "expected the token '<unk>' among the pieces"),
    ],
)
def test_damaged_models(data: bytes, message: str, folder: Path) -> None:
    (folder / "spiece.model").write_bytes(data)
    change(folder / "tokenizer_config.json", tokenizer_class="T5Tokenizer")
    with pytest.raises(FolderError, match=message):
        describe_folder(str(folder), None)
