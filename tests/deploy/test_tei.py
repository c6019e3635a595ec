"""The dialect of text-embeddings-inference: shapes of its bodies, by what its interface says, through a socket."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import WIDTH, FakeEngine, LiveServer, Reply, make_manifest, running

from deploy.bundle import Prompts
from deploy.server.api import ROUTES
from deploy.server.api.schemas import StatusResponse
from deploy.server.api.tei import TEI
from deploy.server.limits.bounds import Settings
from deploy.server.service import Service, TextTokenizer

Check = Callable[[Any], bool]


def number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def text(value: Any) -> bool:
    return isinstance(value, str)


def count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def either(*checks: Check) -> Check:
    return lambda value: sum(check(value) for check in checks) == 1


def null(value: Any) -> bool:
    return value is None


def every(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def fields(needed: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """An object with these fields; it may have others."""

    def check(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and needed.keys() <= value.keys()
            and all(test(value[name]) for name, test in {**needed, **(optional or {})}.items() if name in value)
        )

    return check


def mapping(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


PREDICTION = fields({"score": number, "label": text})
LABELS = fields({"id2label": mapping(text), "label2id": mapping(count)})
ERROR_TYPES = {"Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"}
ANSWERS: dict[str, Check] = {
    "error": fields({"error": text, "error_type": lambda value: value in ERROR_TYPES}),
    "/embed": every(every(number)),
    "/predict": either(every(PREDICTION), every(every(PREDICTION))),
    "/rerank": every(fields({"index": count, "score": number}, {"text": either(text, null)})),
    "/similarity": every(number),
    "/tokenize": every(
        every(
            fields(
                {"id": count, "text": text, "special": flag},
                {"start": either(count, null), "stop": either(count, null)},
            )
        )
    ),
    "/decode": every(text),
    "/embed_all": every(every(every(number))),
    "/embed_sparse": every(every(fields({"index": count, "value": number}))),
    "/info": fields(
        {
            "model_id": text,
            "model_dtype": text,
            "served_model_name": text,
            "model_type": either(
                fields({"classifier": LABELS}),
                fields({"embedding": fields({"pooling": text})}),
                fields({"reranker": LABELS}),
            ),
            "max_concurrent_requests": count,
            "max_input_length": count,
            "max_batch_tokens": count,
            "max_client_batch_size": count,
            "auto_truncate": flag,
            "tokenization_workers": count,
            "version": text,
        },
        {"model_sha": either(text, null), "max_batch_requests": either(count, null)},
    ),
}
"""What TEI's OpenAPI document says of answers."""

HEADERS = {
    "x-compute-type",
    "x-compute-time",
    "x-compute-characters",
    "x-compute-tokens",
    "x-total-time",
    "x-tokenization-time",
    "x-queue-time",
    "x-inference-time",
}


class ScoringEngine(FakeEngine):
    """Scores texts by their ids: the sum of them as one label's, or two labels'."""

    labels: Sequence[str] = ("no", "yes")

    def run(self, ids: Sequence[Any], options: Sequence[Any]) -> Sequence[Any]:
        super().run([np.asarray(getattr(row, "ids", row)) for row in ids], options)
        answers = []
        for row, option in zip(ids, options, strict=True):
            score = float(sum(getattr(row, "ids", row).tolist())) / 100
            raw = option is not None and option.raw_scores
            found = [{"label": self.labels[-1], "score": 10 * score if raw else score}]
            answers.append([*found, *({"label": label, "score": 0.0} for label in self.labels[:-1])])
        return answers


def serving(folder: Path, task: str, labels: tuple[str, ...] = ("no", "yes"), **settings: Any) -> LiveServer:
    manifest = make_manifest(folder, task)
    if task == "text-classification":
        manifest = dataclasses.replace(manifest, labels=labels)
    engine = ScoringEngine() if task == "text-classification" else FakeEngine()
    if isinstance(engine, ScoringEngine):
        engine.labels = labels
    engine.gate.set()
    server = LiveServer(manifest, Settings(port=0, **settings), engine)
    assert server.ready.wait(10)
    return server


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    manifest = dataclasses.replace(
        make_manifest(tmp_path_factory.mktemp("fake")), prompts=Prompts({"query": "w9 w9 ", "none": ""})
    )
    with running(manifest) as server:
        yield server


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = serving(tmp_path_factory.mktemp("fake"), "text-classification")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = serving(tmp_path_factory.mktemp("fake"), "text-classification", ("fits",))
    yield server
    assert server.stop() == 0


def good(server: LiveServer, path: str, body: Any, shape: str | None = None) -> Any:
    reply = server("POST", path, body)
    assert reply.status == 200, reply.body
    assert ANSWERS[shape or path](reply.json), reply.body
    if path not in ("/tokenize", "/decode"):
        assert reply.headers.keys() >= HEADERS
    return reply.json


def bad(reply: Reply, status: int, kind: str) -> str:
    assert (reply.status, reply.json["error_type"]) == (status, kind), reply.body
    assert ANSWERS["error"](reply.json)
    return str(reply.json["error"])


def tokens(server: LiveServer, body: Any) -> list[list[int]]:
    """Token ids that ran for a request."""
    server.engine.batches.clear()
    good(server, "/embed", body)
    return [row for batch in server.engine.batches for row in batch]


def test_answers_of_all_routes_are_known() -> None:
    """What tei_document.py checks against TEI's own document has its form here, too."""
    paths = {row.path for row in ROUTES if row.dialect is TEI and row.answer is not StatusResponse}
    assert paths - {"/", "/invocations"} == ANSWERS.keys() - {"error"}


def test_embed(embedder: LiveServer) -> None:
    assert len(good(embedder, "/embed", {"inputs": "w1"})) == 1
    rows = good(embedder, "/embed", {"inputs": ["w1", "w2 w3"], "unknown": [1], "truncate": None})
    assert [len(row) for row in rows] == [WIDTH] * 2
    embedder.engine.options.clear()
    for body, normalize, dimensions in (
        ({"inputs": "w1"}, True, None),
        ({"inputs": "w1", "normalize": False}, False, None),
        ({"inputs": "w1", "dimensions": 3}, True, 3),
        ({"inputs": "w1", "dimensions": WIDTH}, True, None),
    ):
        embedder.engine.options.clear()
        good(embedder, "/embed", body)
        (((option,),),) = (embedder.engine.options,)
        assert (option.normalize, option.dimensions) == (normalize, dimensions)
    reply = embedder("POST", "/embed", {"inputs": ["w1", "w2 w3"]})
    assert reply.headers["x-compute-characters"] == "7"
    assert reply.headers["x-compute-tokens"] == "7"
    large = good(embedder, "/embed", {"inputs": ["w1"] * 3000})
    assert large == [rows[0]] * 3000


def test_embed_cuts_and_prompts_as_asked(embedder: LiveServer) -> None:
    long = {"inputs": " ".join(f"w{number}" for number in range(40))}
    (right,), (left,) = (tokens(embedder, {**long, "truncation_direction": side}) for side in ("Right", "Left"))
    assert (len(right), len(left)) == (16, 16)
    assert right[1:-1] == list(range(5, 19))
    assert left[1:-1] == list(range(31, 45))
    (plain,), (asked,) = tokens(embedder, {"inputs": "w1"}), tokens(embedder, {"inputs": "w1", "prompt_name": "query"})
    assert asked == [plain[0], 14, 14, *plain[1:]]
    assert "prompt_name: expected one of query, none, got 'nope'" in bad(
        embedder("POST", "/embed", {"inputs": "w1", "prompt_name": "nope"}), 422, "Validation"
    )
    assert "at most 16 tokens, got 42" in bad(
        embedder("POST", "/embed", {**long, "truncate": False}), 422, "Validation"
    )


def test_texts_of_any_length_are_cut_like_those_that_are_read_whole(tmp_path: Path) -> None:
    words = " ".join(f"w{number % 90}" for number in range(500))
    bodies = [
        {"inputs": text, "truncation_direction": side}
        for text in (words, " " * 900 + words + " " * 900, "w" * 900, "w" * 900 + " " + words)
        for side in ("Left", "Right")
    ]
    with (
        running(make_manifest(tmp_path)) as whole,
        running(make_manifest(tmp_path), Settings(port=0, max_chars=64)) as cut,
    ):
        for body in bodies:
            assert tokens(whole, body) == tokens(cut, body)
        assert good(whole, "/embed", {"inputs": "w1 " * 1_000_000})


def test_similarity(embedder: LiveServer) -> None:
    inputs = {"source_sentence": "w1", "sentences": ["w1", "w2 w3"]}
    assert len(good(embedder, "/similarity", {"inputs": inputs})) == 2
    good(embedder, "/similarity", {"inputs": inputs, "parameters": {"truncate": True, "prompt_name": "query"}})
    assert good(embedder, "/", {"inputs": inputs, "parameters": {}}, "/similarity")
    empty = {"inputs": {**inputs, "sentences": []}}
    bad(embedder("POST", "/similarity", empty), 400, "Empty")
    bad(embedder("POST", "/similarity", {"inputs": "w1"}), 422, "Validation")


def test_tokenize_and_decode(embedder: LiveServer) -> None:
    ((first, word, other, last),) = good(embedder, "/tokenize", {"inputs": "w1  nope"})
    assert first == {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None}
    assert word == {"id": 6, "text": "w1", "special": False, "start": 0, "stop": 2}
    assert (other["text"], other["start"], other["stop"], last["text"]) == ("nope", 4, 8, "[SEP]")
    assert len(good(embedder, "/tokenize", {"inputs": ["w1", "w2"], "add_special_tokens": False})[1]) == 1
    prompted = good(embedder, "/tokenize", {"inputs": "w1", "prompt_name": "query"})
    assert [token["text"] for token in prompted[0]] == ["[CLS]", "w9", "w9", "w1", "[SEP]"]
    assert len(good(embedder, "/tokenize", {"inputs": ["w1 " * 2000] * 3})[2]) == 2002
    bad(embedder("POST", "/tokenize", {"inputs": []}), 400, "Empty")
    bad(embedder("POST", "/tokenize", {"inputs": ["w1 " * 10_000] * 40}), 413, "Validation")
    assert good(embedder, "/decode", {"ids": [6, 7]}) == ["w1 w2"]
    whole = {"ids": [[2, 6], [7, 3]], "skip_special_tokens": False}
    assert good(embedder, "/decode", whole) == ["[CLS] w1", "w2 [SEP]"]
    for wrong in ([], [[6], 7]):
        bad(embedder("POST", "/decode", {"ids": wrong}), *((400, "Empty") if not wrong else (422, "Validation")))
    for wrong in ([-1], [1 << 40], [[6, 100_000]]):
        bad(embedder("POST", "/decode", {"ids": wrong}), 422, "Validation")


def test_predict(classifier: LiveServer) -> None:
    one = good(classifier, "/predict", {"inputs": "w1"})
    assert [item["label"] for item in one] == ["yes", "no"]
    assert good(classifier, "/predict", {"inputs": ["w1"]}) == one
    pair = good(classifier, "/predict", {"inputs": ["w1", "w2"]})
    assert isinstance(pair[0], dict)
    batch = good(classifier, "/predict", {"inputs": [["w1"], ["w1", "w2"]]})
    assert batch == [one, pair]
    raw = good(classifier, "/predict", {"inputs": "w1", "raw_scores": True})
    assert raw[0]["score"] == pytest.approx(10 * one[0]["score"])
    bad(classifier("POST", "/predict", {"inputs": []}), 400, "Empty")
    for wrong in (["a", "b", "c"], [["a"], "b"], [["a", "b", "c"]], [[]], ["a", ["b"]], 1):
        bad(classifier("POST", "/predict", {"inputs": wrong}), 422, "Validation")
    assert good(classifier, "/", {"inputs": "w1"}, "/predict") == one
    # As a pipeline, for clients of the hub.
    assert classifier("POST", "/", {"inputs": "w1", "parameters": {}}).json == [one]
    assert classifier("POST", "/", {"inputs": "w1", "parameters": {"top_k": 1}}).json == [one[:1]]
    scores = classifier("POST", "/", {"inputs": "w1", "parameters": {"function_to_apply": "softmax"}}).json[0]
    assert sum(item["score"] for item in scores) == pytest.approx(1.0)
    # Labels that a client names are another task (zero-shot), and scores of the model's own would be taken for theirs.
    named = {"inputs": "w1", "parameters": {"candidate_labels": ["a", "b"]}}
    assert "zero-shot" in bad(classifier("POST", "/", named), 422, "Validation")
    # The tokenizer of this test puts no special tokens around pairs.
    assert "at least one token" in bad(classifier("POST", "/predict", {"inputs": ["", ""]}), 422, "Validation")
    # A single label ranks; these are two.
    bad(classifier("POST", "/rerank", {"query": "w1", "texts": ["w2"]}), 424, "Backend")
    bad(classifier("POST", "/embed", {"inputs": "w1"}), 424, "Backend")


def test_rerank(reranker: LiveServer) -> None:
    body = {"query": "w1", "texts": ["w2", "w5", "w3"]}
    ranks = good(reranker, "/rerank", body)
    assert [rank["index"] for rank in ranks] == [1, 2, 0]
    assert ranks[0].keys() == {"index", "score"}
    assert good(reranker, "/", body, "/rerank") == ranks
    told = good(reranker, "/rerank", {**body, "return_text": True, "raw_scores": True})
    assert [rank["text"] for rank in told] == ["w5", "w3", "w2"]
    assert told[0]["score"] == pytest.approx(10 * ranks[0]["score"])
    bad(reranker("POST", "/rerank", {**body, "texts": []}), 400, "Empty")
    bad(reranker("POST", "/rerank", {"query": "w1"}), 422, "Validation")


def test_documents_beside_texts_are_ignored(reranker: LiveServer) -> None:
    """As every field is that TEI does not know."""
    body = {"query": "w1", "texts": ["w2", "w3"]}
    assert good(reranker, "/rerank", {**body, "documents": []}) == good(reranker, "/rerank", body)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_rerank_as_cohere_jina_and_vllm_have_it(reranker: LiveServer, path: str) -> None:
    documents = ["w2", {"text": "w5"}, "w3"]
    body = {"model": "any", "query": "w1", "documents": documents, "max_tokens_per_doc": 9}
    answer = reranker("POST", path, body).json
    assert [item["index"] for item in answer["results"]] == [1, 2, 0]
    scores = [item["relevance_score"] for item in answer["results"]]
    assert sorted(scores, reverse=True) == scores
    assert all(0 < score < 1 for score in scores)
    assert "document" not in answer["results"][0]
    assert answer["usage"]["total_tokens"] == 6
    assert answer.keys() >= {"id", "model", "meta"}
    few = reranker("POST", path, {**body, "top_n": 1, "return_documents": True}).json["results"]
    assert [(item["index"], item["document"]) for item in few] == [(1, {"text": "w5"})]
    wrong = reranker("POST", path, {**body, "documents": []})
    assert wrong.status == 400
    assert wrong.json["message"] == wrong.json["detail"]


def test_every_task_has_its_first_route(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path, "fill-mask")) as server:
        bad(server("POST", "/embed", {"inputs": "w1"}), 424, "Backend")
        bad(server("POST", "/", {"inputs": "w1"}), 422, "Validation")
        document = server("GET", "/openapi.json").json
        content = document["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]
        assert "FillMask" in json.dumps(content)


def test_what_a_bundle_is_for_is_told_and_asked_at_the_first_path(tmp_path: Path) -> None:
    paths = {"sparse-embedding": "embed_sparse", "fill-mask": "fill-mask"}
    for task in paths:
        with running(make_manifest(tmp_path, task)) as server:
            kind = {"embedding": {"pooling": "splade"}} if task == "sparse-embedding" else {task: {}}
            assert server("GET", "/info").json["model_type"] == kind
            assert server("POST", "/", {"inputs": []}).status == 400


def test_info(embedder: LiveServer, classifier: LiveServer, reranker: LiveServer) -> None:
    for server, kind in ((embedder, "embedding"), (classifier, "classifier"), (reranker, "reranker")):
        info = server("GET", "/info").json
        assert ANSWERS["/info"](info), info
        assert list(info["model_type"]) == [kind]


def test_statuses_of_errors(tmp_path: Path) -> None:
    settings = Settings(
        port=0, api_key="sesame", max_queue_tokens=40, served_model_name="mine", max_concurrent_requests=1
    )
    gate, key = threading.Event(), {"Authorization": "Bearer sesame"}
    with running(make_manifest(tmp_path), settings, gate=gate) as server:
        reply = server("POST", "/embed", {"inputs": "w1"})
        assert reply.headers["www-authenticate"] == "Bearer"
        bad(reply, 401, "Validation")
        bad(server("GET", "/embed"), 405, "Validation")
        bad(server("POST", "/embed", {"inputs": ["w1 w2"] * 20}, **key), 413, "Validation")
        bad(server("POST", "/embed", b"{", **key), 422, "Validation")
        waiting = threading.Thread(target=server, args=("POST", "/embed", {"inputs": "w1"}), kwargs=key)
        waiting.start()
        assert server.engine.entered.wait(10)
        reply = server("POST", "/embed", {"inputs": "w1"}, **key)
        assert "--max-concurrent-requests" in bad(reply, 429, "Overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        gate.set()
        waiting.join()
        assert server("GET", "/info", **key).json["served_model_name"] == "mine"
    with running(make_manifest(tmp_path), infinite=6) as server:
        bad(server("POST", "/embed", {"inputs": "w1"}), 424, "Backend")


def test_auto_truncate_can_be_switched_off(tmp_path: Path) -> None:
    long = {"inputs": "w1 " * 40}
    with running(make_manifest(tmp_path), Settings(port=0, auto_truncate=False)) as server:
        bad(server("POST", "/embed", long), 422, "Validation")
        good(server, "/embed", {**long, "truncate": True})
        assert server("GET", "/info").json["auto_truncate"] is False
        assert server("POST", "/api/embed", {**long, "truncate": True}).status == 200


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("fill-mask", {"fill-mask": {}}),
        ("question-answering", {"question-answering": {}}),
        ("sparse-embedding", {"embedding": {"pooling": "splade"}}),
        (
            "token-classification",
            {"token-classification": {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}},
        ),
    ],
)
def test_info_names_the_kind_of_model(tmp_path: Path, task: str, expected: dict[str, Any]) -> None:
    with running(make_manifest(tmp_path, task)) as server:
        assert server("GET", "/info").json["model_type"] == expected


def test_many_empty_texts_do_not_hold_the_event_loop_up(embedder: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    hops = []
    aside = Service.aside

    async def counted(self: Service, function: Any, *arguments: Any) -> Any:
        hops.append(function)
        return await aside(self, function, *arguments)

    monkeypatch.setattr(Service, "aside", counted)
    for name in ("describe", "decode"):
        found = getattr(TextTokenizer, name)

        def watched(*arguments: Any, inner: Any = found, **options: Any) -> Any:
            threads.add(threading.current_thread().name.partition("_")[0])
            return inner(*arguments, **options)

        monkeypatch.setattr(TextTokenizer, name, watched)
    assert len(good(embedder, "/tokenize", {"inputs": [""] * 1000})) == 1000
    assert good(embedder, "/decode", {"ids": [[]] * 1000}) == [""] * 1000
    assert threads == {"helper"}
    # Many of them in one turn: to hand a text over to a thread takes longer than to read it.
    assert len(hops) <= 10


LONG = "w1 " * 40


@pytest.mark.parametrize(
    ("task", "path", "body"),
    [
        ("feature-extraction", "/", {"inputs": LONG}),
        ("feature-extraction", "/embed_all", {"inputs": LONG}),
        ("feature-extraction", "/similarity", {"inputs": {"source_sentence": "w1", "sentences": [LONG]}}),
        ("feature-extraction", "/api/embed", {"inputs": LONG}),
        ("feature-extraction", "/api/similarity", {"source": "w1", "texts": [LONG]}),
        ("feature-extraction", "/v1/embeddings", {"input": LONG}),
        ("text-classification", "/predict", {"inputs": LONG}),
        ("text-classification", "/", {"inputs": LONG, "parameters": {"top_k": 1}}),
        ("text-classification", "/api/classify", {"inputs": LONG}),
        ("text-classification", "/v1/rerank", {"query": "w1", "documents": [LONG]}),
        ("fill-mask", "/", {"inputs": f"[MASK] {LONG}"}),
        ("fill-mask", "/api/fill-mask", {"inputs": f"[MASK] {LONG}"}),
        ("token-classification", "/", {"inputs": LONG}),
        ("token-classification", "/api/token-classify", {"inputs": LONG}),
        ("sparse-embedding", "/embed_sparse", {"inputs": LONG}),
    ],
)
def test_every_route_follows_auto_truncate(tmp_path: Path, task: str, path: str, body: dict[str, Any]) -> None:
    manifest = make_manifest(tmp_path, task)
    if "documents" in body:
        manifest = dataclasses.replace(manifest, labels=("yes",))
    with running(manifest, Settings(port=0, auto_truncate=False)) as server:
        reply = server("POST", path, body)
        assert reply.status in (400, 422), reply.body
        assert b"truncate: true" in reply.body
