"""The tokenizer as it goes into the bundle, and the token ids of texts."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.bundle import CONFIG_FILE, TASKS, SpecialToken
from deploy.engines.batch import Ids, Item, PairIds, encoded
from deploy.export.errors import ExportError, first_line
from deploy.folder.chat import with_suffix
from deploy.folder.prefixes import shattered
from deploy.folder.source import Source
from deploy.folder.tokenizer import (
    SPECIAL_TOKENS,
    cleans_up,
    drop_rowless,
    gives_token_types,
    no_padding,
    slow_tokenizer,
)
from deploy.folder.tokenizer_checks import check_vocabulary, checked_side, longest_input
from deploy.folder.tokenizer_kinds import KINDS
from deploy.tasks import prompted

__all__ = ["Tokens"]


class Tokens:
    """The tokenizer of a model.

    Attributes:
        max_tokens: Longest input.
        truncation_side: From which side longer texts are cut.
        token_types: Whether the model is given the token types of pairs; else all are 0.
        cleans_up: Whether texts of token ids lose the spaces before marks.
        special: `pad`, `mask`, `cls`, `sep`, `unk`; None for one that it does not have.
    """

    def __init__(self, source: Source, folder: Path, target: Path) -> None:
        """Loads the tokenizer and writes it.

        Args:
            source: What the model's folder says.
            folder: Where the installed transformers reads its files; see `reference.readable_folder`.
            target: Path to write.

        Raises:
            FolderError: It cannot be loaded, is a slow one that nothing fast is known for, or does not belong to the
                model.
        """
        from tokenizers import AddedToken, Tokenizer, normalizers
        from transformers import AutoTokenizer

        try:
            self._reference: Any = AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call]
                folder, use_fast=True, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            raise _unreadable(source, folder, error) from error
        content = _fast(source, self._reference)
        if prefixes := [AddedToken(text, normalized=False, special=True) for text in shattered(content, source)]:
            self._reference.add_tokens(prefixes, special_tokens=True)
            content = _fast(source, self._reference)
        backend = Tokenizer.from_str(content)
        backend.no_truncation()
        backend.no_padding()
        if source.lowercase:
            lower = normalizers.Lowercase()
            backend.normalizer = normalizers.Sequence([lower, backend.normalizer]) if backend.normalizer else lower
        self._suffix: list[int] | None = None
        if source.suffix is not None:
            backend = Tokenizer.from_str(with_suffix(backend.to_str(), source.suffix, source.folder))
            self._suffix = backend.encode("").ids
        backend = _with_rows(source, backend, [getattr(self._reference, f"{name}_token") for name in SPECIAL_TOKENS])
        backend.save(str(target), pretty=False)
        self._lowercase, self._prompt, self._backend = source.lowercase, source.prompt, backend
        self._task, self._source = TASKS[source.task], source
        # Of folders that transformers 4 saved, transformers 5 leaves out token types that models were trained with.
        self.token_types = gives_token_types(source, "token_type_ids" in self._reference.model_input_names)
        self.cleans_up = cleans_up(source, json.loads(content))
        self.truncation_side = checked_side(source, self._reference.truncation_side)
        check_vocabulary(source, max(backend.get_vocab(with_added_tokens=True).values(), default=-1))
        self.max_tokens = longest_input(source, self._reference.model_max_length)
        self.special = {name: self._special(name) for name in SPECIAL_TOKENS}
        self.special["pad"] = self.special["pad"] or _padding_of_config(source, backend)
        if self._task.needs.mask_token and self.special["mask"] is None:
            raise ExportError(f"{source.folder}: the tokenizer has no mask token, and the task is {source.task}")

    def _special(self, name: str) -> SpecialToken | None:
        token, index = getattr(self._reference, f"{name}_token"), getattr(self._reference, f"{name}_token_id")
        return None if token is None or index is None else SpecialToken(int(index), str(token))

    def token_id(self, token: str) -> int | None:
        """The id of a token, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def encode(self, texts: Sequence[str]) -> list[Item]:
        """Token ids of what the task makes of texts, with the model's default prompt before them, truncated.

        Raises:
            ExportError: The tokenizer fails, or the bundle's gives other ids than that of transformers.
        """
        inputs = prompted(self._task.inputs(texts, self._source), self._prompt)
        pairs = self._task.takes_pairs(self._source)
        self._backend.enable_truncation(self.max_tokens, direction=self.truncation_side)
        try:
            encodings = self._backend.encode_batch(inputs)
        except Exception as error:  # The library raises no other kind.
            raise ExportError(f"{self._source.folder}: the tokenizer fails: {first_line(error)}") from error
        self._backend.no_truncation()
        # Python lower-cases some letters by their place in the word, a tokenizer never does: such texts prove nothing.
        same = [index for index, given in enumerate(inputs) if "".join(given).isascii() or not self._lowercase]
        checked = [[given] if isinstance(given, str) else list(given) for given in (inputs[index] for index in same)]
        if self._lowercase:
            checked = [[text.lower() for text in given] for given in checked]
        # One list of texts, or two for pairs.
        columns = [list(column) for column in zip(*checked, strict=True)]
        expected = self._expected(columns) if checked else []
        for index, row in zip(same, expected, strict=True):
            if encodings[index].ids != row:
                raise ExportError(
                    "the tokenizer in the bundle and the one in transformers give different ids for "
                    f"{texts[index][:60]!r}; the files of the tokenizer do not belong together"
                )
        rows = encoded(encodings, self.token_types, pairs)
        if not rows:
            raise ExportError("the tokenizer gives no token for any of the texts; pass other ones with --texts")
        return rows

    def _expected(self, columns: Sequence[list[str]]) -> Any:
        """Token ids that transformers gives."""
        if self._suffix is None:
            return self._reference(*columns, truncation=True, max_length=self.max_tokens)["input_ids"]
        most = self.max_tokens - len(self._suffix)
        cut: Any = {"truncation": True, "max_length": most, "add_special_tokens": False}
        return [[*row, *self._suffix] for row in self._reference(*columns, **cut)["input_ids"]]

    def encode_inputs(self, inputs: Sequence[Any], words: bool) -> list[tuple[Item, Sequence[int | None]]]:
        """Token ids of any inputs, truncated, and the index of each token's word; see `evaluation.Encode`."""
        self._backend.enable_truncation(self.max_tokens, direction=self.truncation_side)
        encodings = self._backend.encode_batch(inputs, is_pretokenized=words)
        self._backend.no_truncation()
        found: list[tuple[Item, Sequence[int | None]]] = []
        for given, encoding in zip(inputs, encodings, strict=True):
            ids = array("q", encoding.ids)
            if not len(ids):
                raise ExportError(f"the tokenizer gives no token for {str(given)[:60]!r}")
            types = encoding.type_ids if self.token_types else [0] * len(ids)
            found.append((PairIds(ids, array("q", types)) if isinstance(given, tuple) else ids, encoding.word_ids))
        return found

    def encode_alone(self, texts: Sequence[str], most: int) -> list[Ids]:
        """At most so many token ids of each text, whatever the task makes of them; without texts that have none."""
        self._backend.enable_truncation(min(most, self.max_tokens), direction=self.truncation_side)
        encodings = self._backend.encode_batch(texts)
        self._backend.no_truncation()
        return [array("q", encoding.ids) for encoding in encodings if len(encoding.ids)]


def _unreadable(source: Source, folder: Path, error: Exception) -> ExportError:
    """What is wrong with a folder whose tokenizer cannot be loaded; transformers 5 looks at `config.json` first."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as cause:
        return ExportError(f"{source.folder / CONFIG_FILE}: transformers cannot read it: {first_line(cause)}")
    reason = first_line(error)
    if "NoneType" in reason:  # transformers looks for a file, and takes what it has not found as one.
        reason = "a file of it is missing; copy the model again, or save one there with tokenizer.save_pretrained"
    return ExportError(f"{source.folder}: the tokenizer cannot be loaded: {reason}")


def _fast(source: Source, reference: Any) -> str:
    """Content of `tokenizer.json`."""
    if reference.is_fast:
        return str(reference.backend_tokenizer.to_str())
    made = slow_tokenizer(source, KINDS)  # `Tokens.encode` compares it with the slow one.
    if made is None:
        raise ExportError(
            f"{source.folder}: only a slow tokenizer ({type(reference).__name__}), no tokenizer.json; "
            "save a fast one there with AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    return json.dumps(made, ensure_ascii=False)


def _with_rows(source: Source, backend: Any, special: Sequence[str | None]) -> Any:
    """The tokenizer without added tokens that the model has no embedding for."""
    from tokenizers import Tokenizer

    whole = json.loads(backend.to_str())
    if not drop_rowless(whole, source.config.get("vocab_size"), special):
        return backend
    return Tokenizer.from_str(json.dumps(whole, ensure_ascii=False))


def _padding_of_config(source: Source, backend: Any) -> SpecialToken:
    declared = source.config.get("pad_token_id")
    token = backend.id_to_token(declared) if isinstance(declared, int) else None
    if token is None:
        raise no_padding(source)
    return SpecialToken(int(declared or 0), token)
