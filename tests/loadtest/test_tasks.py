"""What counts as a right answer of each endpoint, and what does not."""

from __future__ import annotations

import base64
import json
import random
import struct
from typing import Any

import pytest
from stub_server import MASK_TOKEN, right_answer

from loadtest.tasks import TASKS, InvalidResponseError, Traits, insert_mask


def traits(**changes: Any) -> Traits:
    return Traits(**{"model": "stub", "mask_token": MASK_TOKEN, **changes})


def answer_of(task: str, texts: list[str], known: Traits) -> dict[str, Any]:
    body = json.loads(TASKS[task].body(texts, known))
    return right_answer(TASKS[task].path, body)


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_right_answers_pass(task: str, encoding_format: str) -> None:
    known = traits(encoding_format=encoding_format)
    texts = [f"one {MASK_TOKEN}", f"two {MASK_TOKEN} and more"]
    content = json.dumps(answer_of(task, texts, known)).encode()
    tokens = TASKS[task].validate(content, 2, known)
    assert tokens == (14 if task in ("embed", "openai") else None)
    with pytest.raises(InvalidResponseError, match="one per text, got 2"):
        TASKS[task].validate(content, 3, known)


def wrong(task: str, change: Any) -> bytes:
    answer = answer_of(task, [f"one {MASK_TOKEN}"], traits())
    change(answer)
    return json.dumps(answer).encode()


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("embed", lambda a: a.pop("embeddings"), "expected embeddings to be a list"),
        ("embed", lambda a: a.update(embeddings=[[0.5] * 7]), "expected an embedding of 8 numbers, got 7"),
        ("embed", lambda a: a.update(embeddings=[[]]), "got 0"),
        ("embed", lambda a: a.update(embeddings=[["0.5"] * 8]), "expected numbers"),
        ("embed", lambda a: a.update(embeddings=[None]), "got NoneType"),
        ("openai", lambda a: a["data"][0].update(index=1), "index 0"),
        ("openai", lambda a: a["data"][0].update(embedding=[0.5]), "got 1"),
        ("predict", lambda a: a.update(predictions=[[]]), "at least one of labels"),
        ("predict", lambda a: a.update(predictions=[[{"label": 3, "score": 0.5}]]), "string 'label'"),
        ("predict", lambda a: a.update(predictions=[[{"label": "A", "score": None}]]), "finite score"),
        ("token-classify", lambda a: a["predictions"][0][0].pop("end"), "a start and an end"),
        ("token-classify", lambda a: a["predictions"][0][0].update(end=-1), "a start and an end"),
        ("token-classify", lambda a: a["predictions"][0][0].update(score="x"), "finite score"),
        ("answer", lambda a: a["predictions"][0][0].update(start=2), "a start and an end in each of answers"),
        ("fill-mask", lambda a: a.update(predictions=[[]]), "one mask in each text"),
        ("fill-mask", lambda a: a["predictions"][0][0].pop(), "top_k=5 candidates for a mask, got 4"),
    ],
)
def test_wrong_answers_are_told_apart(task: str, change: Any, message: str) -> None:
    with pytest.raises(InvalidResponseError, match=message):
        TASKS[task].validate(wrong(task, change), 1, traits(dimension=8))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_must_be_finite(number: str) -> None:
    content = f'{{"embeddings": [[0.1, {number}]]}}'.encode()
    with pytest.raises(InvalidResponseError):
        TASKS["embed"].validate(content, 1, traits())
    packed = base64.b64encode(struct.pack("<2f", 0.1, float(number))).decode()
    content = json.dumps({"data": [{"index": 0, "embedding": packed}]}).encode()
    with pytest.raises(InvalidResponseError, match="finite"):
        TASKS["openai"].validate(content, 1, traits(encoding_format="base64"))


@pytest.mark.parametrize("content", [None, b"", b"<html>", b"[]", b'{"embeddings": [[0.1'])
def test_anything_else_is_no_answer(content: bytes | None) -> None:
    with pytest.raises(InvalidResponseError):
        TASKS["embed"].validate(content, 1, traits())


def test_mask_replaces_one_early_word() -> None:
    text = " ".join(f"word{number}" for number in range(500))
    for seed in range(50):
        words = insert_mask(text, "[MASK]", random.Random(seed)).split()
        assert len(words) == 500
        assert words.count("[MASK]") == 1
        assert words.index("[MASK]") < 16
    assert insert_mask("  ", "[MASK]", random.Random(0)) == "[MASK]"
