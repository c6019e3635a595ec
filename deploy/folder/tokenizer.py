"""The tokenizer of a model's folder as transformers would load it, from its files alone.

| file | what it says |
|---|---|
| `tokenizer.json` | the tokenizer |
| `tokenizer_config.json` | what transformers changes in it: lower case, accents, a space in front, more tokens |
| `special_tokens_map.json` | special tokens, in older folders |
| `vocab.txt`, `spiece.model` and others | the tokenizer, where there is no `tokenizer.json`; see `slow.py` |
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle import TOKENIZER_FILE, SpecialToken
from deploy.folder.chat import with_suffix
from deploy.folder.errors import FolderError
from deploy.folder.json_files import read_json, read_settings
from deploy.folder.library import read_by_library
from deploy.folder.prefixes import make_special, shattered
from deploy.folder.slow import made_of_slow_files
from deploy.folder.source import Source
from deploy.folder.tokenizer_checks import (
    check_unknown,
    check_vocabulary,
    checked_side,
    ids_around,
    longest_input,
    side_of_file,
)
from deploy.folder.tokenizer_kinds import ANY, KIND_OF_MODEL, KINDS, Kind

__all__ = [
    "SPECIAL_TOKENS",
    "FolderTokenizer",
    "cleans_up",
    "drop_rowless",
    "gives_token_types",
    "no_padding",
    "read_tokenizer",
    "slow_tokenizer",
    "told_token_types",
]

_SETTINGS_FILE = "tokenizer_config.json"
_SPECIAL_FILE = "special_tokens_map.json"

SPECIAL_TOKENS = ("pad", "mask", "cls", "sep", "unk")

_TOKEN_TYPES_OF_5 = ("Bert", "Electra", "Deberta", "DebertaV2")
"""The classes that give models token types in transformers 5; in transformers 4, all do but those of `KINDS`."""

_CAUSAL = ("qwen3",)
"""Models whose classifiers read the last token that is not padding."""


@dataclass(frozen=True)
class _Declared:
    """What a folder says of its tokenizer outside of `tokenizer.json`.

    Attributes:
        settings: Content of `tokenizer_config.json`; empty without it.
        older: Content of `special_tokens_map.json`; empty without it.
        name: Class of the tokenizer, without what it ends in; empty if neither a file nor the model says.
        kind: What that class takes for granted.
    """

    settings: Mapping[str, Any]
    older: Mapping[str, Any]
    name: str
    kind: Kind

    @classmethod
    def read(cls, source: Source) -> _Declared:
        """Reads the settings of a model's folder.

        Raises:
            FolderError: A file is damaged.
        """
        settings = _settings(source)
        named = settings.get("tokenizer_class") or source.config.get("tokenizer_class")
        name = _class_name(named) if isinstance(named, str) else KIND_OF_MODEL.get(source.model_type, "")
        return cls(settings, read_settings(source.folder / _SPECIAL_FILE), name, KINDS.get(name, ANY))

    def special_token(self, name: str) -> str | None:
        """A special token by its name, such as `pad`; None if there is none."""
        key = f"{name}_token"
        given = self.settings[key] if key in self.settings else self.older.get(key, self.kind.special.get(name))
        token = given.get("content") if isinstance(given, dict) else given
        return token if isinstance(token, str) else None

    def made_of_slow_files(self, folder: Path) -> dict[str, Any] | None:
        """Content of `tokenizer.json` as the files of a slow tokenizer give it; see `slow.made_of_slow_files`."""
        tokens = {name: self.special_token(name) or usual for name, usual in self.kind.special.items()}
        return made_of_slow_files(folder, self.name, tokens, self.settings)


@dataclass(frozen=True)
class FolderTokenizer:
    """What the files say.

    Attributes:
        text: Content of `tokenizer.json`, changed as transformers changes it.
        max_tokens: Longest input.
        truncation_side: From which side longer texts are cut.
        token_types: Whether the model is given the token types of pairs.
        cleans_up: Whether texts of token ids lose the spaces before marks.
        special: `pad`, `mask`, `cls`, `sep`, `unk`; None for one that there is not.
        ids: Token ids by their tokens.
    """

    text: str
    max_tokens: int
    truncation_side: str
    token_types: bool
    cleans_up: bool
    special: Mapping[str, SpecialToken | None]
    ids: Mapping[str, int]


def _settings(source: Source) -> dict[str, Any]:
    return {**read_settings(source.folder / _SETTINGS_FILE), **source.tokenizer_settings}


def read_tokenizer(source: Source) -> FolderTokenizer:
    """Reads the tokenizer of a folder.

    Args:
        source: What the folder says.

    Raises:
        FolderError: There are neither `tokenizer.json` nor files that it can be made of, a file is damaged, or the
            tokenizer does not belong to the model.
    """
    declared = _Declared.read(source)
    settings, kind = declared.settings, declared.kind
    tokenizer = _tokenizer(source, declared)
    _add_tokens(tokenizer, settings)
    _normalize(tokenizer, declared, source.lowercase)
    if prefixes := shattered(json.dumps(tokenizer, ensure_ascii=False), source):
        make_special(tokenizer, prefixes)
    size = source.config.get("vocab_size")
    special = {name: declared.special_token(name) for name in SPECIAL_TOKENS}
    drop_rowless(tokenizer, size, special.values())
    ids = dict(_vocabulary(tokenizer))
    check_unknown(source, tokenizer.get("model"))
    check_vocabulary(source, max((*ids.values(), *ids_around(tokenizer)), default=-1))
    told = told_token_types(settings)
    text = json.dumps(tokenizer, ensure_ascii=False)
    padding = _padding_behind(source, text)
    suffix = "" if padding else source.suffix
    return FolderTokenizer(
        text=text if suffix is None else with_suffix(text, suffix, source.folder),
        max_tokens=longest_input(source, settings.get("model_max_length")) - padding,
        truncation_side=checked_side(source, settings.get("truncation_side", side_of_file(tokenizer))),
        token_types=kind.token_types if told is None else told,
        cleans_up=cleans_up(source, tokenizer),
        special=_special_tokens(source, special, ids),
        ids=ids,
    )


def no_padding(source: Source) -> FolderError:
    """The error of a tokenizer without a padding token."""
    return FolderError(f"{source.folder}: the tokenizer has no padding token; set tokenizer.pad_token and save it")


def drop_rowless(tokenizer: dict[str, Any], size: Any, special: Collection[str | None]) -> bool:
    """Drops tokens that somebody added to a tokenizer without giving the model embeddings for them.

    transformers fails at texts that hold one, and at no other.

    Args:
        tokenizer: Content of `tokenizer.json`, which changes.
        size: What the model's `config.json` has as `vocab_size`.
        special: Tokens that it cannot do without; those around texts stay, too.

    Returns:
        Whether there were any.
    """
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    if not isinstance(size, int) or not isinstance(model, dict) or not isinstance(added, list):
        return False
    own = dict(_vocabulary({"model": model}))
    around = json.dumps(tokenizer.get("post_processor"), ensure_ascii=False)
    dropped = {
        token["content"]
        for token in added
        if isinstance(token, dict)
        and isinstance(token.get("id"), int)
        and isinstance(token.get("content"), str)
        and token["id"] >= size
        and token["content"] not in own
        and token["content"] not in special
        and json.dumps(token["content"], ensure_ascii=False) not in around
    }
    if dropped:
        tokenizer["added_tokens"] = [token for token in added if token["content"] not in dropped]
    return bool(dropped)


def cleans_up(source: Source, tokenizer: Mapping[str, Any]) -> bool:
    """Whether texts of token ids lose the spaces before marks; as in transformers 5, never those of BPE."""
    settings, model = _settings(source), tokenizer.get("model")
    pairs = isinstance(model, dict) and model.get("type") == "BPE"
    return not pairs and settings.get("clean_up_tokenization_spaces") is True


def told_token_types(settings: Mapping[str, Any]) -> bool | None:
    """Whether models are given the token types of pairs, as far as settings of a tokenizer say so.

    A model that transformers 5 saved was trained with what its tokenizers give; those of transformers 4 give more.

    Args:
        settings: Content of `tokenizer_config.json`.

    Returns:
        None: the class decides, as transformers 4 has it.
    """
    inputs, named = settings.get("model_input_names"), settings.get("tokenizer_class")
    if isinstance(inputs, list):
        return "token_type_ids" in inputs
    if isinstance(named, str) and ("backend" in settings or named == "TokenizersBackend"):
        return _class_name(named) in _TOKEN_TYPES_OF_5
    return None


def gives_token_types(source: Source, installed: bool) -> bool:
    """Whether models are given the token types of pairs, whichever version of transformers reads the folder.

    Args:
        source: What the folder says.
        installed: What the installed transformers makes of it, for classes that are not known here.
    """
    declared = _Declared.read(source)
    told = told_token_types(declared.settings)
    if told is not None:
        return told
    return declared.kind.token_types if declared.name in {*KINDS, "PreTrained"} else installed


def _padding_behind(source: Source, text: str) -> int:
    """How much padding the tokenizer puts behind texts that the model classifies by the token before it.

    Earlier tokens of such a model do not see later ones, so that it may be left out.
    """
    if source.model_type not in _CAUSAL or source.task != "text-classification":
        return 0
    ids = read_by_library(text, source.folder).encode("").ids
    return len(ids) if set(ids) == {source.config.get("pad_token_id")} else 0


def _class_name(named: str) -> str:
    """What a class of tokenizers is called without what all are called."""
    name = named.removesuffix("Fast").removesuffix("Tokenizer")
    return "T5" if name == "MT5" else name  # The same class by another name.


def _tokenizer(source: Source, declared: _Declared) -> dict[str, Any]:
    """What `tokenizer.json` says, or would say."""
    path = source.folder / TOKENIZER_FILE
    if path.is_file():
        return dict(read_json(path, dict))
    made = declared.made_of_slow_files(source.folder)
    if made is None:
        raise FolderError(
            f"{source.folder}: no {TOKENIZER_FILE}, only files of a slow tokenizer, which takes transformers: save a "
            "fast one there with AutoTokenizer.from_pretrained(...).save_pretrained, or export the model"
        )
    return made


def slow_tokenizer(source: Source, kinds: Collection[str]) -> dict[str, Any] | None:
    """What `tokenizer.json` would say of the files of a slow tokenizer.

    Args:
        source: What the folder says.
        kinds: Keys of `KINDS`, of which it is one.

    Returns:
        None: it is another one, or there are other files.

    Raises:
        FolderError: A file is damaged.
    """
    declared = _Declared.read(source)
    made = declared.made_of_slow_files(source.folder) if declared.name in kinds else None
    if made is not None:
        _add_tokens(made, declared.settings)
        _normalize(made, declared, lowercase=False)
    return made


def _add_tokens(tokenizer: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Adds the tokens that only the settings know, as transformers does."""
    listed = settings.get("added_tokens_decoder")
    added = tokenizer.get("added_tokens")
    if not isinstance(listed, dict) or not isinstance(added, list):
        return
    if not all(isinstance(token, dict) and isinstance(token.get("id"), int) for token in added):
        return  # The library says what is wrong with them.
    known = {token.get("content") for token in added}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for number, token in listed.items():
        if isinstance(token, dict) and re.fullmatch(r"\d{1,18}", number) and token.get("content") not in known:
            values = {name: bool(token.get(name, name == "normalized")) for name in flags}
            added.append({"id": int(number), "content": str(token.get("content")), **values})
    added.sort(key=lambda token: int(token["id"]))


def _normalize(tokenizer: dict[str, Any], declared: _Declared, lowercase: bool) -> None:
    """Has the tokenizer change texts as its settings say, whatever its own file says."""
    settings, kind = declared.settings, declared.kind
    normalizer = tokenizer.get("normalizer")
    if isinstance(normalizer, dict):
        for name, (setting, usual) in kind.lowercase.items():
            if name in normalizer:
                normalizer[name] = settings.get(setting, usual)
    before = tokenizer.get("pre_tokenizer")
    if kind.space and isinstance(before, dict) and "add_prefix_space" in before:
        before["add_prefix_space"] = settings.get("add_prefix_space", False) is True
    if lowercase:
        lower = {"type": "Lowercase"}
        normalizers = [lower] if normalizer is None else [lower, normalizer]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": normalizers}


def _vocabulary(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Tokens and their ids; what is not as the library has it is left to the library."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from ((token, number) for token, number in vocabulary.items() if isinstance(number, int))
    elif isinstance(vocabulary, list):
        yield from ((str(item[0]), number) for number, item in enumerate(vocabulary) if isinstance(item, list) and item)
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield str(token.get("content")), token["id"]


def _special_tokens(
    source: Source, given: Mapping[str, str | None], ids: Mapping[str, int]
) -> dict[str, SpecialToken | None]:
    special = {
        name: SpecialToken(ids[token], token) if token is not None and token in ids else None
        for name, token in given.items()
    }
    if special["pad"] is None:
        declared = source.config.get("pad_token_id")
        token = next((token for token, number in ids.items() if number == declared), None)
        if token is None:
            raise no_padding(source)
        special["pad"] = SpecialToken(ids[token], token)
    return special
