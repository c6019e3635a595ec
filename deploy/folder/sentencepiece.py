"""Models of sentencepiece (unigrams) as `tokenizer.json` has them, without that library.

A model is a message of Protocol Buffers: pieces (1), what it was trained with (2), how it normalizes (3).
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deploy.folder.errors import FolderError, refuse_pointer

__all__ = ["FILES", "KINDS", "read_unigrams"]

FILES = ("sentencepiece.bpe.model", "spiece.model", "spm.model")

_UNIGRAM = 1
_SENTINELS, _MOST_SENTINELS = 100, 10_000
_BARRIER = "\u2581"


class _Kind(NamedTuple):
    """What a class of tokenizers makes of the pieces.

    Attributes:
        before: Tokens in front of them.
        first: The first piece that counts.
        behind: Tokens behind them.
        unk: The unknown token.
        single, pair: Special tokens around texts `$A` and `$B`, each with its token type behind a colon.
        squeezed: What several spaces become.
        plain: Whether quotes, accents and letters are made plain, as the settings say.
    """

    before: tuple[str, ...]
    first: int
    behind: tuple[str, ...]
    unk: str
    single: str
    pair: str
    squeezed: str = _BARRIER
    plain: bool = False


_BRACKETS = ("[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
_ANGLES = ("<s>:0 $A:0 </s>:0", "<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0")
KINDS: Mapping[str, _Kind] = {
    "XLMRoberta": _Kind(("<s>", "<pad>", "</s>", "<unk>"), 3, ("<mask>",), "<unk>", *_ANGLES),
    "Camembert": _Kind(
        ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"), 1, ("<mask>",), "<unk>", *_ANGLES
    ),
    "Albert": _Kind((), 0, (), "<unk>", *_BRACKETS, squeezed=" ", plain=True),
    "DebertaV2": _Kind((), 0, ("[MASK]",), "[UNK]", *_BRACKETS, squeezed=" "),
    "T5": _Kind((), 0, (), "<unk>", "$A:0 </s>:0", "$A:0 </s>:0 $B:0 </s>:0"),
}
"""By the name of the class, without what it ends in."""


def read_unigrams(path: Path, kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of `tokenizer.json`, but for special tokens.

    Args:
        path: The model.
        kind: A key of `KINDS`.
        settings: Content of `tokenizer_config.json`.

    Raises:
        FolderError: It is damaged, or not one of unigrams, or the settings are wrong.
    """
    row = KINDS[kind]
    try:
        data = path.read_bytes()
        refuse_pointer(data, str(path))
        pieces, model_type, table = _read(memoryview(data))
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise FolderError(f"{path}: expected a model of sentencepiece: {error}; copy the model again") from error
    if model_type != _UNIGRAM or not pieces:
        raise FolderError(
            f"{path}: expected a model of unigrams, got one of another type; save a fast tokenizer there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    if row.plain:
        # Pieces that end in a number and a comma are split further by this class.
        pieces = [(text, score - 100 if _ends_in_number(text) else score) for text, score in pieces]
    vocabulary = [
        *((token, -100.0 if token == "<unk>NOTUSED" else 0.0) for token in row.before),
        *pieces[row.first :],
    ]
    known = {token for token, _ in vocabulary}
    vocabulary += [(token, 0.0) for token in (*row.behind, *_sentinels(path, kind, settings)) if token not in known]
    numbers = {token: number for number, (token, _) in reversed([*enumerate(vocabulary)])}
    if row.unk not in numbers:
        raise FolderError(f"{path}: expected the token {row.unk!r} among the pieces; copy the model again")
    metaspace = {"type": "Metaspace", "replacement": _BARRIER, "prepend_scheme": "always", "split": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*_normalizers(row, kind, table, settings)]},
        "pre_tokenizer": metaspace,
        "decoder": metaspace,
        "post_processor": _template(path, row, numbers),
        "model": {
            "type": "Unigram",
            "unk_id": numbers[row.unk],
            "vocab": [list(item) for item in vocabulary],
            "byte_fallback": False,
        },
    }


def _sentinels(path: Path, kind: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Tokens of T5 that stand for parts of a text: 100 where nothing is said, none in mT5."""
    if kind != "T5":
        return
    count = settings.get("extra_ids", _SENTINELS)
    if not isinstance(count, int) or not 0 <= count <= _MOST_SENTINELS:
        raise FolderError(
            f"{path.parent / 'tokenizer_config.json'}: extra_ids: expected a number up to {_MOST_SENTINELS}, got "
            f"{count!r:.40}"
        )
    yield from (f"<extra_id_{number}>" for number in range(count - 1, -1, -1))


def _ends_in_number(text: str) -> bool:
    return len(text) >= 2 and text[-1] == "," and text[-2].isdigit()


def _normalizers(row: _Kind, kind: str, table: bytes, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if row.plain:
        for quote in ("``", "''"):
            yield {"type": "Replace", "pattern": {"String": quote}, "content": '"'}
        if settings.get("keep_accents") is not True:
            yield {"type": "NFKD"}
            yield {"type": "StripAccents"}
    if settings.get("do_lower_case", row.plain) is True and (row.plain or kind == "DebertaV2"):
        yield {"type": "Lowercase"}
    if kind == "DebertaV2":
        yield {"type": "Strip", "strip_left": True, "strip_right": True}
    if table:
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode("ascii")}
    if row.squeezed == _BARRIER:
        yield {"type": "Strip", "strip_left": False, "strip_right": True}
    yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": row.squeezed}


def _template(path: Path, row: _Kind, numbers: Mapping[str, int]) -> dict[str, Any]:
    def parts(text: str) -> list[dict[str, Any]]:
        found = []
        for part in text.split():
            name, _, kind = part.rpartition(":")
            what = "Sequence" if name.startswith("$") else "SpecialToken"
            found.append({what: {"id": name.removeprefix("$"), "type_id": int(kind)}})
        return found

    tokens = {part["SpecialToken"]["id"] for part in parts(row.single) if "SpecialToken" in part}
    for token in tokens:
        if token not in numbers:
            raise FolderError(f"{path}: expected the token {token!r} among the pieces; copy the model again")
    return {
        "type": "TemplateProcessing",
        "single": parts(row.single),
        "pair": parts(row.pair),
        "special_tokens": {
            token: {"id": token, "ids": [numbers[token]], "tokens": [token]} for token in sorted(tokens)
        },
    }


def _read(data: memoryview) -> tuple[list[tuple[str, float]], int, bytes]:
    """Pieces with their scores, the type of the model, and the table of the normalizer."""
    pieces: list[tuple[str, float]] = []
    model_type, table = _UNIGRAM, b""
    for number, value in _fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            piece = dict(_fields(value))
            text, score = piece.get(1, memoryview(b"")), piece.get(2, 0.0)
            if not isinstance(text, memoryview) or not isinstance(score, float):
                raise ValueError("a piece has no text")
            pieces.append((bytes(text).decode("utf-8"), score))
        elif number == 2:
            given = dict(_fields(value)).get(3, _UNIGRAM)
            model_type = given if isinstance(given, int) else 0
        elif number == 3:
            given = dict(_fields(value)).get(2, 0)
            table = bytes(given) if isinstance(given, memoryview) else b""
    return pieces, model_type, table


def _fields(data: memoryview) -> Iterator[tuple[int, int | float | memoryview]]:
    """The fields of a message: their numbers and values."""
    place = 0

    def whole() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number is too long")

    while place < len(data):
        number, wire = divmod(whole(), 8)
        if wire == 0:
            yield number, whole()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size = whole()
        if size is None or place + size > len(data):
            raise ValueError("a field ends behind the file")
        part = data[place : place + size]
        place += size
        yield number, float(struct.unpack("<f", part)[0]) if wire == 5 else part
