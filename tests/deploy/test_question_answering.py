"""Answers to questions: those of transformers' pipeline, from short texts and from long ones in windows."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import ask, make_manifest, running

from deploy.bundle import Manifest, load_manifest
from deploy.export.cli import main
from deploy.server.errors import ApiError
from deploy.server.limits.bounds import Limits, Settings
from deploy.server.limits.callers import Caller
from deploy.server.service import located, structured
from deploy.tasks.answers import AnswerOptions, Window, best_answers, best_spans
from deploy.tasks.comparison import AnswerSpans

QUICK = ["--max-texts", "12", "--speed-seconds", "0", "--quiet"]
QUESTIONS = [
    ("where is it?", "Ada Lovelace lived in London, and wrote of un-believable numbers."),
    ("who?", "日本 and Καλημέρα 🙂🙂 don't  mix (the name) "),
    ("what is returned", "it returns the list of values of the first object, or none " * 9),
    ("x", "the"),
]
LIMITS = Limits(inputs=100, chars=5000, values=1 << 20)

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert"])
def answerer(request: pytest.FixtureRequest, tiny_model: ModelMaker, tmp_path_factory: Any) -> tuple[Path, Manifest]:
    """A random model, and its bundle."""
    folder = tiny_model(request.param, "question-answering")
    target = tmp_path_factory.mktemp("answerer") / "out"
    variants = [
        "--variants",
        "torch_ext-fp32,torch_ext-bf16" if request.param != "bert" else "torch_ext-fp32,onnx-fp32",
    ]
    assert main([str(folder), "-o", str(target), "--max-tokens", "60", *variants, *QUICK]) == 0
    return folder, load_manifest(target)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 5, "handle_impossible_answer": True},
        {"top_k": 3, "align_to_words": False, "max_answer_len": 4},
        {"top_k": 7, "max_seq_len": 30, "doc_stride": 9, "handle_impossible_answer": True},
    ],
)
def test_answers_are_those_of_the_pipeline(settings: dict[str, Any], answerer: tuple[Path, Manifest]) -> None:
    folder, manifest = answerer
    assert manifest.task == "question-answering"
    assert {variant.accuracy.metric for variant in manifest.variants.values()} == {"exact_match"}
    windows = {"max_seq_len": settings.get("max_seq_len"), "doc_stride": settings.get("doc_stride")}
    options = AnswerOptions(**{name: value for name, value in settings.items() if name not in windows})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        pipe = transformers.pipeline("question-answering", str(folder), device="cpu")
        pipe.tokenizer.model_max_length = 60
        expected = [pipe(question=question, context=context, **settings) for question, context in QUESTIONS]
    for variant in manifest.variants:
        result = ask(
            manifest,
            variant,
            lambda service: structured.answer(service, QUESTIONS, Caller(), LIMITS, options, **windows),
        )
        if variant == "torch_ext-bf16":
            continue
        for answers, right in zip(result.values, expected, strict=True):
            # The pipeline fills up with answers that are impossible.
            wanted = [item for item in (right if isinstance(right, list) else [right]) if item["score"] > 0]
            assert [item["score"] for item in answers] == pytest.approx([item["score"] for item in wanted], abs=1e-4)
            for item, same in zip(answers, wanted, strict=True):
                assert {**item, "score": 0} == {**same, "score": 0}


def test_spans_are_the_likeliest() -> None:
    chance = random.Random(3)
    for size in (1, 2, 9, 40):
        starts, ends = ([chance.random() ** 4 for _ in range(size)] for _ in range(2))
        starts[chance.randrange(size)] = 0.0
        for count, longest in ((1, 3), (5, 1), (12, 15), (2000, 50)):
            pairs = [
                (-starts[first] * ends[last], first, last)
                for first in range(size)
                for last in range(first, min(size, first + longest))
                if starts[first] * ends[last] > 0
            ]
            expected = [(-score, first, last) for score, first, last in sorted(pairs)[:count]]
            assert best_spans(starts, ends, count, longest) == expected


def test_spans_of_tokens_that_are_all_alike_are_not_all_looked_at() -> None:
    looked_at = 0

    class Counted(float):
        """A probability that counts how often it is multiplied."""

        def __neg__(self) -> Any:
            return Counted(-float(self))

        def __mul__(self, other: Any) -> Any:
            nonlocal looked_at
            looked_at += 1
            return float(self) * float(other)

    size, count = 500, 210
    found = best_spans([Counted(0.5)] * size, [0.25] * size, count, size)
    assert found == [(0.125, 0, last) for last in range(count)]
    assert looked_at <= size + 3 * count


def test_a_text_of_one_word_is_not_walked_for_every_answer() -> None:
    reads = 0

    class Counted(array):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            nonlocal reads
            reads += 1
            return super().__getitem__(index)

    size = 300
    places = array("i", range(size))
    window = Window(0, places, array("i", range(1, size + 1)), Counted("i", [0] * size), null=False)
    found = best_answers("w" * size, [window], [[[0.0, 0.0]] * size], AnswerOptions(100, size))
    assert [(item["start"], item["end"]) for item in found] == [(0, size)]
    assert reads <= 10 * size


def test_windows_are_bounded_before_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(located, "Window", lambda *arguments: made.append(arguments))
    settings = Settings(port=0, max_queue_tokens=1000)
    with running(make_manifest(tmp_path, "question-answering"), settings) as server:
        # Windows of 16 tokens: 15 of the context, 14 of which are in the one before.
        one = {"question": "w1", "context": "w2 " * 200}
        for count, path in ((1, "/api/answer"), (3, "/api/answer"), (1, "/")):
            body: Any = {"inputs": [one] * count, "max_seq_len": 16, "doc_stride": 14}
            if path == "/":
                body = {"inputs": one, "parameters": {"max_seq_len": 16, "doc_stride": 14}}
            reply = server("POST", path, body)
            assert reply.status == 413
            message = (
                "input 0: expected at most 1000 tokens in one request, got 2976; --max-queue-tokens sets this limit"
            )
            assert message in reply.body.decode()
            assert "read in 186 windows, which have doc_stride=14 tokens in common" in reply.body.decode()
        assert not made


def test_many_answers_are_put_together_on_a_helper_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def watched(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name.partition("_")[0])
        return best_answers(*arguments)

    monkeypatch.setattr(structured, "best_answers", watched)
    with running(make_manifest(tmp_path, "question-answering")) as server:
        server.engine.run = lambda ids, options: [  # type: ignore[method-assign]
            [memoryview(np.float32([token, token])) for token in pair.ids] for pair in ids
        ]
        one = {"question": "w1", "context": "w2 " * 40}
        for top_k, expected in ((1, "server"), (100, "helper")):
            body = {"inputs": one, "max_seq_len": 16, "doc_stride": 14, "top_k": top_k}
            assert server("POST", "/api/answer", body).status == 200
            assert threads.pop() == expected


def test_questions_that_leave_no_room(answerer: tuple[Path, Manifest]) -> None:
    _, manifest = answerer

    async def refused(service: Any) -> None:
        long = "the name of " * 30
        with pytest.raises(ApiError, match=r"input 1: expected a question of at most .* send a shorter question"):
            await structured.answer(service, [("x", "the"), (long, "the name")], Caller(), LIMITS)
        with pytest.raises(ApiError, match="input 0: expected a question and a context"):
            await structured.answer(service, [("", "the")], Caller(), LIMITS)
        with pytest.raises(ApiError, match="max_seq_len: expected at most 60, got 61"):
            await structured.answer(service, [("x", "the")], Caller(), LIMITS, max_seq_len=61)
        with pytest.raises(ApiError, match="doc_stride: expected less than max_seq_len=20, got 20"):
            await structured.answer(service, [("x", "the")], Caller(), LIMITS, max_seq_len=20, doc_stride=20)

    ask(manifest, "torch_ext-fp32", refused)


def test_the_route(tmp_path: Path) -> None:
    """Through a socket, with an engine that finds an answer where the ids are highest."""
    with running(make_manifest(tmp_path, "question-answering")) as server:

        def run(ids: Any, options: Any) -> list[Any]:
            return [[memoryview(np.float32([token, token])) for token in pair.ids] for pair in ids]

        server.engine.run = run  # type: ignore[method-assign]
        one = {"question": "w1", "context": "w2 w9 w3"}
        reply = server("POST", "/api/answer", {"inputs": one})
        assert reply.status == 200, reply.body
        ((answer,),) = reply.json["predictions"]
        assert (answer["answer"], answer["start"], answer["end"]) == ("w9", 3, 5)
        assert 0.9 < answer["score"] < 1
        assert reply.json["usage"] == {"tokens": 4}
        reply = server("POST", "/api/answer", {"inputs": [one, one], "top_k": 2})
        assert [len(answers) for answers in reply.json["predictions"]] == [2, 2]
        for body, status in (
            ({"inputs": []}, 422),
            ({"inputs": "w1"}, 422),
            ({"inputs": {"question": "w1"}}, 422),
            ({"inputs": one, "top_k": 0}, 422),
            ({"inputs": {"question": "w1", "context": ""}}, 422),
            ({"inputs": one, "max_seq_len": 17}, 422),
            ({"inputs": {"question": "w1", "context": "w" * 40_000}}, 200),
        ):
            assert server("POST", "/api/answer", body).status == status, body
        windows = server("POST", "/api/answer", {"inputs": {"question": "w1", "context": "w2 " * 40}})
        assert windows.json["usage"]["tokens"] > 60


def test_answers_that_differ_lower_the_figure() -> None:
    def rows(start: int, end: int) -> list[np.ndarray]:
        return list(np.float32([[9.0 * (place == start), 9.0 * (place == end)] for place in range(6)]))

    comparison = AnswerSpans(3)
    for text in range(3):
        comparison.remember(text, rows(1, 3))
    per_text, details = comparison.measure([(0, rows(1, 3)), (1, rows(1, 2)), (2, FloatingPointError())])
    assert per_text[:2].tolist() == [1, 0]
    assert np.isnan(per_text[2])
    assert details["max_prob_diff"] == 1
