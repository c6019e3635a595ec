"""What counts as a right answer of each endpoint, and what does not."""

from __future__ import annotations

import base64
import json
import random
import struct
from typing import Any

import msgspec
import pytest
from right_answers import MASK_TOKEN, right_answer

from deploy.server.api import ROUTES
from loadtest.tasks import TASKS, InvalidResponseError, Traits, insert_mask


def traits(**changes: Any) -> Traits:
    return Traits(**{"model": "stub", "mask_token": MASK_TOKEN, **changes})


def answer_of(task: str, texts: list[str], known: Traits) -> Any:
    body = json.loads(TASKS[task].body(texts, known))
    return right_answer(TASKS[task].path_at(known), body)


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


OTHER_PATHS = {"/", "/invocations", "/embeddings", "/v1/embed", "/v2/models/{model}/versions/1/infer"}


def test_tasks_are_those_of_the_server() -> None:
    """Every inference route is tested by a row, and a request of that row is one that the route takes."""
    served = {route.path: route.request for route in ROUTES if route.task is not None}
    for task in TASKS.values():
        body = task.body([f"one {MASK_TOKEN}", f"two {MASK_TOKEN}"], traits())
        msgspec.json.decode(body, type=served[task.path])
    # The others are the same under another path, and those that answer tasks by their own name.
    assert served.keys() - {task.path for task in TASKS.values()} == OTHER_PATHS


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
        ("similarity", lambda a: a.update(similarities=[None]), "a finite score in similarities"),
        ("tei-embed", lambda a: a.__setitem__(0, [0.5]), "expected an embedding of 8 numbers, got 1"),
        ("tei-embed-all", lambda a: a.__setitem__(0, []), "expected 1 embeddings, one per text, got 0"),
        ("tei-embed-sparse", lambda a: a[0][0].update(value="x"), "a finite value"),
        ("tei-embed-sparse", lambda a: a[0][0].pop("index"), "to have an index"),
        ("tei-predict-pairs", lambda a: a.__setitem__(0, []), "at least one of labels"),
        ("tei-rerank", lambda a: a[0].update(index=1), "each index from 0 to 0 once"),
        ("tei-similarity", lambda a: a.append(0.1), "expected 1 similarities"),
        ("cohere-embed", lambda a: a.pop("embeddings"), "embeddings by type"),
        ("cohere-embed", lambda a: a["embeddings"].update(float=[[0.5]]), "got 1"),
        ("cohere-rerank", lambda a: a["results"][0].pop("relevance_score"), "a finite relevance_score"),
        ("oip", lambda a: a["outputs"][0]["data"].pop(), r"expected 2 values in an output of shape \[1, 2\], got 1"),
        ("oip", lambda a: a["outputs"][0].update(shape=[2, 1]), "expected 1 rows in each output"),
        ("oip", lambda a: a["outputs"][0].update(data=[0.1, "x"]), "expected numbers in an output"),
        ("oip-pairs", lambda a: a.update(outputs=[]), "at least one output tensor"),
        ("fill-mask", lambda a: a.update(predictions=[[]]), "one mask in each text"),
        ("fill-mask", lambda a: a["predictions"][0][0].pop(), "top_k=5 candidates for a mask, got 4"),
    ],
)
def test_wrong_answers_are_told_apart(task: str, change: Any, message: str) -> None:
    with pytest.raises(InvalidResponseError, match=message):
        TASKS[task].validate(wrong(task, change), 1, traits(dimension=8))


def test_ranks_come_best_first() -> None:
    content = json.dumps([{"index": 0, "score": 0.1}, {"index": 1, "score": 0.2}]).encode()
    with pytest.raises(InvalidResponseError, match="best rank first"):
        TASKS["tei-rerank"].validate(content, 2, traits())


def test_an_array_is_not_an_object() -> None:
    with pytest.raises(InvalidResponseError, match="/embed: expected a JSON array, got dict"):
        TASKS["tei-embed"].validate(b"{}", 1, traits())


def test_the_name_of_the_model_is_part_of_a_path() -> None:
    assert TASKS["oip"].path_at(traits(model="a/b c")) == "/v2/models/a%2Fb%20c/infer"


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
