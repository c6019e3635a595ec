"""Large JSON bodies: read and written in parts, with the same result as in one call, and never all at once."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import WIDTH, make_manifest, running

from deploy.engines.batch import PairIds
from deploy.server import app
from deploy.server.api import oip
from deploy.server.api.openai import OpenAIEmbeddingsRequest
from deploy.server.api.schemas import EmbedRequest
from deploy.server.errors import ApiError
from deploy.server.http import bodies
from deploy.server.http.bodies import (
    INLINE_BYTES,
    INLINE_VALUES,
    Large,
    decode,
    decode_in_parts,
    encode,
    encode_in_parts,
    parts,
)
from deploy.server.limits.bounds import Limits, Settings
from deploy.tasks import Rows
from deploy.tasks.fill_mask import Filled
from deploy.tasks.rows import Mapped
from deploy.tasks.sparse_embedding import SparseVector

LIMITS = Limits(4 << 20, 1024, 32_768)
ID_LIMITS = Limits(4 << 20, 1024, 32_768, ids=262_144)
DECODERS: dict[str, Any] = {
    "inputs": msgspec.json.Decoder(EmbedRequest),
    "input": msgspec.json.Decoder(OpenAIEmbeddingsRequest),
}

PIECES = [
    '"',
    "\\",
    ",",
    '",',
    '","',
    "[",
    "]",
    "{",
    ":",
    "\n",
    "\t",
    "é",
    "\u20ac",
    "\U0001f600",
    "a",
    " ",
    "word ",
    "\\u0041",
]


def outcome(function: Any, *arguments: Any) -> Any:
    """What comes back, or the kind of error."""
    try:
        return function(*arguments)
    except ApiError as error:
        return error.kind


def random_texts(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices(PIECES, k=rng.choice((0, 1, 3, 40, 300)))) for _ in range(count)]


@pytest.mark.parametrize("field", ["inputs", "input"])
@pytest.mark.parametrize("seed", range(20))
def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch, field: str, seed: int) -> None:
    monkeypatch.setattr(bodies, "_PART_BYTES", 200)  # Cuts everywhere.
    rng = random.Random(seed)
    decoder = DECODERS[field]
    for _ in range(30):
        texts = random_texts(rng, rng.choice((0, 1, 2, 40)))
        more: dict[str, Any] = (
            {"truncate": False} if field == "inputs" else {"model": "m,[", "user": "x", "n": [1, "a"]}
        )
        items = [(field, rng.choice((texts, texts[0] if texts else "", [*texts, 5], [[5]], None))), *more.items()]
        rng.shuffle(items)
        text = json.dumps(
            dict(items),
            ensure_ascii=rng.random() < 0.5,
            separators=rng.choice(((",", ":"), (", ", ": "), (" , ", " : "))),
        )
        body = text.encode()
        assert outcome(decode_in_parts, decoder, body, ID_LIMITS) == outcome(decode, decoder, body)
        # Broken somewhere: refused in the same way.
        for _ in range(5):
            position = rng.randrange(len(body))
            broken = (
                body[:position] + rng.choice((b"", b'"', b",", b"\\", b"\xff", b"]", b"\x00")) + body[position + 1 :]
            )
            assert outcome(decode_in_parts, decoder, broken, ID_LIMITS) == outcome(decode, decoder, broken)


class Counted:
    """A decoder that knows how many bytes it got in one call."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.longest = 0

    def decode(self, body: bytes) -> Any:
        self.longest = max(self.longest, len(body))
        return self.inner.decode(body)


@pytest.mark.parametrize(
    "texts",
    [
        ["word " * 800] * 1000,
        ["é" * 700] * 1000,
        ['say "no"\n' * 200] * 1000,
        ["x" * 32_768] * 120,
        ["a,b" * 300] * 1000,
    ],
)
def test_no_call_gets_all_of_a_large_body(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    parts, rest = Counted(bodies._TEXTS), Counted(DECODERS["inputs"])
    monkeypatch.setattr(bodies, "_TEXTS", parts)
    for body in (json.dumps({"inputs": texts}), json.dumps({"truncate": True, "inputs": texts}, ensure_ascii=False)):
        assert decode_in_parts(rest, body.encode(), LIMITS).inputs == texts  # type: ignore[arg-type]
    assert max(parts.longest, rest.longest) < 4 * bodies._PART_BYTES


MB = 1 << 20


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("inputs", b'{"inputs":[' + b'"a",' * MB + b'"a"]}'),
        ("inputs", b'{"truncate":true,"inputs": [' + b'"a", ' * MB + b'"a"]}'),
        ("input", b'{"input":[' + b"1," * MB + b"1]}"),
        ("input", b'{"input":[' + b"[1]," * MB + b"[1]]}"),
        ("input", b'{"user":"\\"","input":[' + b"[1]," * MB + b"[1]]}"),
        ("input", b'{"input":[' + b"[]," * MB + b"[]]}"),
    ],
)
def test_what_takes_long_to_decode_is_refused_before(field: str, body: bytes) -> None:
    decoder = Counted(DECODERS[field])
    with pytest.raises(ApiError, match="expected at most") as caught:
        decode_in_parts(decoder, body, ID_LIMITS if field == "input" else LIMITS)  # type: ignore[arg-type]
    assert caught.value.kind == "too_large"
    assert decoder.longest == 0


def test_values_in_texts_do_not_count() -> None:
    texts = ["[1, 2], " * 100] * 1000  # Many more brackets and commas than lists and ids are allowed.
    for head in ("", '"user": "\\"", '):
        body = f'{{{head}"input": {json.dumps(texts)}}}'.encode()
        assert decode_in_parts(DECODERS["input"], body, Limits(4 << 20, 1024, 32_768, ids=10)).input == texts


@pytest.mark.parametrize("rows", [0, 1, 3, 1000])
def test_answers_in_parts_are_the_same_bytes(rows: int) -> None:
    values = list(Rows(np.random.default_rng(0).standard_normal((rows, 384)).astype(np.float32)))
    for items, each in ((values, 384), ([{"embedding": row, "index": 1} for row in values], 384), ([[]] * rows, 0)):
        body = {"object": "list", "data": items, "model": "ü", "usage": {"tokens": 3}}
        assert encode_in_parts(Large(body, "data", each)) == encode(body)
        both = {**body, "data": {"float": items, "other": items[:1]}}
        large = Large(both, "data", each)
        assert encode_in_parts(large) == encode(both)
        assert large.values == each * (rows + len(items[:1]))


def test_rows_that_are_large_lists_are_cut_too() -> None:
    row = Mapped(lambda index: {"sequence": "w" * 5000, "index": index}, range(100))
    for items in ([row, [], [row[:3]]], [[row, row], row], [["w" * 40_000], "w", {}, []]):
        large = Large({"": items}, "", 100 * 5000 // 16)
        found = list(parts(large))
        assert b"".join(found) == encode(items)
        assert max(map(len, found)) <= 300_000


def test_large_bodies_are_read_and_written_on_a_helper_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, list[str]] = {"read": [], "written": []}

    def decoded(*arguments: Any) -> Any:
        threads["read"].append(threading.current_thread().name)
        return decode_in_parts(*arguments)

    def part_of(items: Sequence[Any]) -> bytes:
        threads["written"].append(threading.current_thread().name)
        return encode_part(items)

    monkeypatch.setattr(app, "decode_in_parts", decoded)
    encode_part = bodies.encode_part
    monkeypatch.setattr(bodies, "encode_part", part_of)
    settings = Settings(port=0, max_inputs=1 << 20, max_queue_tokens=1 << 30)
    with running(make_manifest(tmp_path), settings) as server:
        many = INLINE_VALUES // WIDTH + 1
        for path, field, key in (("/api/embed", "inputs", "embeddings"), ("/v1/embeddings", "input", "data")):
            threads["read"].clear()
            threads["written"].clear()
            assert server("POST", path, {field: ["w1"]}).status == 200
            assert threads == {"read": [], "written": []}
            assert len(server("POST", path, {field: ["w1"] * many}).json[key]) == many
            assert server("POST", path, {field: ["w1 " * INLINE_BYTES] * 2}).status == 200
            for names in threads.values():
                assert names
                assert all(name.startswith("helper") for name in names)
        for body, status in ((b'{"inputs": ["' + b"w1 " * INLINE_BYTES, 422), (b"[" * 200_000, 422)):
            assert server("POST", "/api/embed", body).status == status


def _filled(ids: Any) -> list[Any]:
    return [Filled([5, 6], [0.5, 0.25], lambda token: f" w{token - 5}") for token in ids if token == 4]


_FEW = ("w1 w2", "w3")
_LARGE = 6000
_ANSWERS: dict[str, Any] = {
    "fill-mask": _filled,
    "sparse-embedding": lambda ids: SparseVector([2, 7], [0.5, 1.5]),
    "token-classification": lambda ids: [[(token % 2, 0.5)] for token in ids],
    "text-classification": lambda ids: [
        {"label": label, "score": 0.25} for label in (("fits",) if isinstance(ids, PairIds) else ("no", "yes"))
    ],
}


def _tensor(texts: Sequence[str]) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}]}


@pytest.mark.parametrize(
    ("task", "path", "body", "answer"),
    [
        ("fill-mask", "/", lambda texts: {"inputs": [f"{text} [MASK]" for text in texts]}, None),
        ("fill-mask", "/v2/models/fake/infer", lambda texts: _tensor([f"{text} [MASK]" for text in texts]), "oip"),
        ("sparse-embedding", "/v2/models/fake/infer", _tensor, "oip"),
        ("token-classification", "/", lambda texts: {"inputs": list(texts)}, None),
        ("token-classification", "/v2/models/fake/infer", _tensor, "oip"),
        ("text-classification", "/", lambda texts: {"inputs": list(texts), "parameters": {"top_k": 1}}, None),
        ("text-classification", "/tokenize", lambda texts: {"inputs": list(texts)}, None),
        ("text-classification", "/decode", lambda texts: {"ids": [[5] * 40 for _ in texts]}, None),
    ],
)
def test_large_answers_of_every_dialect_are_written_on_a_helper_thread(
    task: str, path: str, body: Any, answer: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def watched(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            threads.append(threading.current_thread().name.partition("_")[0])
            return function(*arguments)

        return run

    monkeypatch.setattr(bodies, "encode_part", watched(bodies.encode_part))
    monkeypatch.setattr(oip, "write_outputs", watched(oip.write_outputs))
    settings = Settings(port=0, max_queue_tokens=1 << 30, max_queue_ms=1 << 30, max_values=1 << 30)
    with running(make_manifest(tmp_path, task), settings) as server:
        server.engine.run = lambda ids, options: list(map(_ANSWERS[task], ids))  # type: ignore[method-assign]

        def rows(texts: Sequence[str]) -> Any:
            threads.clear()
            reply = server("POST", path, body(texts))
            assert reply.status == 200, reply.body
            if answer is None:
                return reply.json
            return [output["data"] for output in reply.json["outputs"]]

        few = rows(_FEW)
        assert set(threads) <= {"server"}
        many = rows(_FEW * _LARGE)
        assert set(threads) == {"helper"}
        # The same as those of few.
        assert many == (few * _LARGE if answer is None else [column * _LARGE for column in few])


_FIRST, _SECOND = ("w0 w9 [MASK]", "w1 w9 [MASK]"), ("[MASK] w9 w0", "[MASK] w9 w1")


def test_masks_filled_as_a_pipeline_does(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path, "fill-mask")) as server:
        server.engine.run = lambda ids, options: list(map(_filled, ids))  # type: ignore[method-assign]

        def sequences(inputs: Any) -> Any:
            reply = server("POST", "/", {"inputs": inputs, "parameters": {"top_k": 2}})
            assert reply.status == 200, reply.body
            return strip(reply.json)

        def strip(found: Any) -> Any:
            return [item["sequence"] if isinstance(item, dict) else strip(item) for item in found]

        # For this tokenizer [CLS] and [SEP] are words like others; test_fill_mask.py has real ones.
        assert sequences("w9 [MASK] w2") == ["[CLS] w9 w0 w2 [SEP]", "[CLS] w9 w1 w2 [SEP]"]
        two = [[f"[CLS] {text} [SEP]" for text in texts] for texts in (_FIRST, _SECOND)]
        assert sequences("[MASK] w9 [MASK]") == two
        assert sequences(["[MASK]", "[MASK] w9 [MASK]"]) == [["[CLS] w0 [SEP]", "[CLS] w1 [SEP]"], two]
        reply = server("POST", "/", {"inputs": "[MASK] " + " " * 3_900_000, "parameters": {"top_k": 100}})
        assert reply.status == 413
        assert "expected at most 16777216 numbers in one answer, got 24" in reply.json["error"]
