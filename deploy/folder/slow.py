"""The `tokenizer.json` of a folder that has only the files of a slow tokenizer, as transformers converts them.

| files | tokenizers |
|---|---|
| `vocab.txt` | WordPiece: BERT, ELECTRA, DistilBERT, MPNet and relatives |
| `vocab.txt` | words of proteins, all of which split a text: ESM, of which transformers has no other |
| `vocab.json`, `merges.txt` | BPE of bytes: RoBERTa and relatives, DeBERTa v1 |
| `sentencepiece.bpe.model`, `spiece.model`, `spm.model` | unigrams: XLM-R, CamemBERT, ALBERT, DeBERTa v2 and v3, T5 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.folder.errors import FolderError
from deploy.folder.json_files import read_json
from deploy.folder.sentencepiece import FILES, KINDS, read_unigrams

__all__ = ["made_of_slow_files"]


def made_of_slow_files(
    folder: Path, kind: str, special: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What `tokenizer.json` would say; None where the files or the kind are others.

    Args:
        folder: The model's.
        kind: Class of the tokenizer in transformers, without what it ends in.
        special: Special tokens: `pad`, `mask`, `cls`, `sep`, `unk`.
        settings: Content of `tokenizer_config.json`.

    Raises:
        FolderError: A file is damaged, or lacks a special token.
    """
    unigrams = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if kind in KINDS and unigrams is not None:
        parts = read_unigrams(unigrams, kind, settings)
        numbers = {token: number for number, (token, _) in reversed([*enumerate(parts["model"]["vocab"])])}
        return _tokenizer(unigrams, numbers, special, mask_takes_space=kind != "DebertaV2", **parts)
    for kinds, names, make in _MAKERS:
        paths = [folder / name for name in names]
        if kind in kinds and all(path.is_file() for path in paths):
            return make(paths, kind, special, settings)
    return None


def _word_piece(
    paths: list[Path], kind: str, special: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    (path,) = paths
    tokens = _lines(path)
    if tokens and tokens[-1] == "":
        tokens.pop()
    vocabulary = {token.rstrip("\r"): number for number, token in enumerate(tokens)}
    mpnet = kind == "MPNet"
    return _tokenizer(
        path,
        vocabulary,
        special,
        mask_takes_space=mpnet,
        # Its own settings are put into it later, by the name of each field.
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        post_processor=_template(path, vocabulary, special, separators=2 if mpnet else 1),
        model={
            "type": "WordPiece",
            "unk_token": special["unk"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    )


def _byte_pairs(
    paths: list[Path], kind: str, special: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    path, merges_path = paths
    vocabulary = read_json(path, dict)
    merges = [line.rstrip("\r").split(" ") for line in _lines(merges_path) if line and not line.startswith("#version")]
    if not all(len(pair) == 2 for pair in merges):
        raise FolderError(f"{merges_path}: expected lines of two tokens; copy the model again")
    space = settings.get("add_prefix_space") is True
    bytes_of = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": True}
    return _tokenizer(
        path,
        vocabulary,
        special,
        mask_takes_space=True,
        normalizer=None,
        pre_tokenizer=bytes_of,
        decoder={**bytes_of, "add_prefix_space": True},
        post_processor=_template(path, vocabulary, special, separators=1)
        if kind == "Deberta"
        else {
            "type": "RobertaProcessing",
            "sep": [special["sep"], _id(path, vocabulary, special["sep"])],
            "cls": [special["cls"], _id(path, vocabulary, special["cls"])],
            "trim_offsets": True,
            "add_prefix_space": space,
        },
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    )


def _residues(paths: list[Path], kind: str, special: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, Any]:
    (path,) = paths
    tokens = [line.strip() for line in _lines(path)]
    if tokens and tokens[-1] == "":
        tokens.pop()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = _tokenizer(
        path,
        vocabulary,
        special,
        mask_takes_space=False,
        normalizer=None,
        pre_tokenizer={"type": "WhitespaceSplit"},
        decoder=None,
        post_processor=_template(path, vocabulary, special, separators=1),
        model={"type": "WordLevel", "vocab": vocabulary, "unk_token": special["unk"]},
    )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    known = {token["content"] for token in made["added_tokens"]}
    others = [{"id": number, "content": token, **flags} for token, number in vocabulary.items() if token not in known]
    made["added_tokens"] = sorted([*made["added_tokens"], *others], key=lambda token: int(token["id"]))
    return made


_Make = Callable[[list[Path], str, Mapping[str, str], Mapping[str, Any]], dict[str, Any]]
_MAKERS: tuple[tuple[tuple[str, ...], tuple[str, ...], _Make], ...] = (
    (("Bert", "Electra", "DistilBert", "MPNet"), ("vocab.txt",), _word_piece),
    (("Roberta", "Deberta"), ("vocab.json", "merges.txt"), _byte_pairs),
    (("Esm",), ("vocab.txt",), _residues),
)


def _tokenizer(
    path: Path, vocabulary: Mapping[str, Any], special: Mapping[str, str], *, mask_takes_space: bool, **parts: Any
) -> dict[str, Any]:
    """The parts of a tokenizer, and its special tokens."""
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    added = {
        _id(path, vocabulary, token): {"content": token, "lstrip": mask_takes_space and name == "mask", **flags}
        for name, token in special.items()
        if token in vocabulary
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **added[number]} for number in sorted(added)],
        **parts,
    }


def _template(path: Path, vocabulary: Mapping[str, Any], special: Mapping[str, str], separators: int) -> dict[str, Any]:
    """Where special tokens go; pairs have one or two separators between them."""

    def token(name: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": special[name], "type_id": kind}}

    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    single = [token("cls", 0), first, token("sep", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *[token("sep", 0)] * (separators - 1), second, token("sep", 1)],
        "special_tokens": {
            special[name]: {
                "id": special[name],
                "ids": [_id(path, vocabulary, special[name])],
                "tokens": [special[name]],
            }
            for name in ("cls", "sep")
        },
    }


def _lines(path: Path) -> list[str]:
    try:
        # Other line ends are characters of some vocabularies.
        return path.read_bytes().decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise FolderError(f"{path}: expected text in UTF-8: {error}; copy the model again") from error


def _id(path: Path, vocabulary: Mapping[str, Any], token: str) -> int:
    number = vocabulary.get(token)
    if not isinstance(number, int):
        raise FolderError(f"{path}: expected the special token {token!r} in the vocabulary; copy the model again")
    return number
