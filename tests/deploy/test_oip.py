"""The Open Inference Protocol, JSON and binary, as raw requests."""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import WIDTH, LiveServer, Reply, make_manifest, running
from test_tei import serving

from deploy.bundle import ModelInfo
from deploy.server.limits.bounds import Settings
from deploy.tasks.sparse_embedding import SparseVector

NAME = "some/model"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    manifest = make_manifest(tmp_path_factory.mktemp("fake"))
    with running(dataclasses.replace(manifest, model=ModelInfo(NAME, None, "FakeModel"))) as live:
        yield live


def text(data: Any, name: str = "text", shape: Any = None, **fields: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(data)] if shape is None else shape, "datatype": "BYTES", "data": data, **fields}


def packed(*texts: str | bytes) -> bytes:
    coded = [item if isinstance(item, bytes) else item.encode() for item in texts]
    return b"".join(struct.pack("<I", len(item)) + item for item in coded)


def binary(server: LiveServer, tensor: bytes, count: int, size: int | None = None, **fields: Any) -> Reply:
    parameters = {"binary_data_size": len(tensor) if size is None else size}
    given = {"name": "text", "shape": [count], "datatype": "BYTES", "parameters": parameters}
    head = json.dumps({"inputs": [given], **fields}).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    return server("POST", f"/v2/models/{NAME}/infer", head + tensor, **length)


def floats(reply: Reply) -> list[float]:
    """Numbers of the only output of an answer, in whichever form."""
    told = reply.headers.get("inference-header-content-length")
    if told is None:
        (output,) = reply.json["outputs"]
        return list(map(float, output["data"]))
    (output,) = json.loads(reply.body[: int(told)])["outputs"]
    tensor = reply.body[int(told) :]
    assert output["parameters"] == {"binary_data_size": len(tensor)}
    return list(struct.unpack(f"<{len(tensor) // 4}f", tensor))


def test_metadata_and_health(server: LiveServer) -> None:
    assert server("GET", "/v2").json["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{NAME}/ready"):
        assert server("GET", path).status == 200
    for path in (f"/v2/models/{NAME}", f"/v2/models/{NAME}/versions/1"):
        metadata = server("GET", path).json
        assert (metadata["name"], metadata["versions"]) == (NAME, ["1"])
        assert metadata["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
        assert metadata["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": [-1, WIDTH]}]
    for path in ("/v2/models/nope", "/v2/models/nope/ready", f"/v2/models/{NAME}/versions/2"):
        reply = server("GET", path)
        assert (reply.status, list(reply.json)) == (404, ["error"])


def test_json_and_binary_agree(server: LiveServer) -> None:
    path = f"/v2/models/{NAME}/infer"
    plain = server("POST", path, {"id": "7", "inputs": [text(["w1", "w2 w3"])]})
    assert (plain.json["id"], plain.json["model_name"]) == ("7", NAME)
    assert plain.json["outputs"][0]["shape"] == [2, WIDTH]
    expected = floats(plain)
    tensor = packed("w1", "w2 w3")
    for reply in (
        server("POST", path, {"inputs": [text([["w1"], ["w2 w3"]], shape=[2, 1])]}),
        server("POST", f"/v2/models/{NAME}/versions/1/infer", {"inputs": [text(["w1", "w2 w3"])]}),
        server("POST", path, {"inputs": [text(["w1", "w2 w3"])], "parameters": {"binary_data_output": True}}),
        binary(server, tensor, 2),
        binary(server, tensor, 2, parameters={"binary_data_output": True}),
        binary(server, tensor, 2, outputs=[{"name": "embedding", "parameters": {"binary_data": True}}]),
        binary(server, tensor, 2, outputs=[{"name": "embedding"}], parameters={"timeout": 5_000_000}),
        binary(server, tensor, 2, parameters={"timeout": 10**2000}),
    ):
        assert reply.status == 200, reply.body
        assert floats(reply) == expected
    many = binary(server, packed(*["w1"] * 3000), 3000, parameters={"binary_data_output": True})
    assert floats(many) == expected[:WIDTH] * 3000
    assert len(floats(server("POST", path, {"inputs": [text(["w1"] * 3000)]}))) == 3000 * WIDTH


def test_what_is_no_tensor_is_refused(server: LiveServer) -> None:
    path = f"/v2/models/{NAME}/infer"
    replies = [
        server("POST", path, body)
        for body in (
            {},
            {"inputs": []},
            {"inputs": [text([])]},
            {"inputs": [text(["w1"], name="words")]},
            {"inputs": [text(["w1"]), text(["w2"], name="text_pair")]},
            {"inputs": [{**text(["w1"]), "datatype": "FP32"}]},
            {"inputs": [text(["w1"], shape=[2])]},
            {"inputs": [text([1])]},
            {"inputs": [text(["w1"])], "outputs": [{"name": "nope"}]},
            {"inputs": [text(["w1"])], "parameters": {"normalize": "yes"}},
            {"inputs": [text(["w1"], parameters={"binary_data_size": 1 << 60})]},
            {"inputs": [text(["w1"], shape=[10**2000] * 8)]},
        )
    ]
    replies += [
        binary(server, packed("w1"), 2),
        binary(server, packed("w1"), 1, size=-1),
        binary(server, packed("w1") + b"\xff", 1),
        binary(server, packed("w1") + b"\xff", 1, size=6),
        binary(server, packed(b"\xff\xfe"), 1),
        binary(server, struct.pack("<I", 1 << 31) + b"w1", 1),
        binary(server, packed("w1")[:3], 1),
    ]
    for length in ("-1", "1000000", "x", ""):
        headers = {"Inference-Header-Content-Length": length}
        replies.append(server("POST", path, {"inputs": [text(["w1"])]}, **headers))
    for reply in replies:
        assert (reply.status, list(reply.json)) == (400, ["error"]), reply.body
    huge = server("POST", path, {"inputs": [text(["w1"], shape=[1 << 40, 1 << 40])]})
    assert huge.status == 413


def test_classes_of_pairs(tmp_path: Path) -> None:
    server = serving(tmp_path, "text-classification")
    try:
        pair = {"inputs": [text(["w1"]), text(["w2"], name="text_pair")]}
        scores, labels = server("POST", "/v2/models/fake/infer", pair).json["outputs"]
        assert (scores["shape"], labels["shape"], labels["data"]) == ([1, 2], [1, 2], ["no", "yes"])
        assert scores["data"][1] > scores["data"][0]
        only = {**pair, "outputs": [{"name": "labels", "parameters": {"binary_data": True}}]}
        reply = server("POST", "/v2/models/fake/infer", only)
        assert reply.body.endswith(packed("no", "yes"))
    finally:
        assert server.stop() == 0


def test_gzip_both_ways(server: LiveServer) -> None:
    for count in (3, 200, 30_000):
        body = json.dumps({"inputs": ["w1"] * count}).encode()
        plain = server("POST", "/embed", body)
        for coded in (gzip.compress(body), gzip.compress(body[:10]) + gzip.compress(body[10:])):
            assert server("POST", "/embed", coded, Content_Encoding="gzip").body == plain.body
        asked = server("POST", "/embed", body, Accept_Encoding="gzip")
        if count == 3:
            assert "content-encoding" not in asked.headers
            continue
        assert (asked.headers["content-encoding"], asked.headers["vary"]) == ("gzip", "accept-encoding")
        assert gzip.decompress(asked.body) == plain.body
        assert server("POST", "/embed", body, Accept_Encoding="gzip, deflate, br").body == plain.body


def test_bodies_as_other_clients_compress_them(server: LiveServer) -> None:
    """Deflate is zlib's format, which tritonclient and aiohttp offer; x-gzip is an old name of gzip."""
    body = json.dumps({"inputs": ["w1"] * 30_000}).encode()
    plain = server("POST", "/embed", body).body
    for coding, coded in (("deflate", zlib.compress(body)), ("x-gzip", gzip.compress(body))):
        assert server("POST", "/embed", coded, Content_Encoding=coding).body == plain
    good = zlib.compress(b'{"inputs": "w1"}')
    for wrong in (b"", good[:-1], good + b"rest", gzip.compress(b"{}")):
        reply = server("POST", "/embed", wrong, Content_Encoding="deflate")
        assert reply.status == 422, wrong
        assert "content-encoding: expected deflate" in reply.json["error"]
    bomb = zlib.compress(b" " * (200 << 20))
    assert server("POST", "/embed", bomb, Content_Encoding="deflate").status == 413


def test_what_is_no_gzip_is_refused(server: LiveServer) -> None:
    good = gzip.compress(b'{"inputs": "w1"}')
    for body in (b'{"inputs": "w1"}', b"", good[:-9], good[:3], good + b"\x00rest"):
        reply = server("POST", "/embed", body, Content_Encoding="gzip")
        assert (reply.status, reply.json["error_type"]) == (422, "Validation"), body
    bomb = gzip.compress(b" " * (200 << 20))
    reply = server("POST", "/embed", bomb, Content_Encoding="gzip")
    assert (reply.status, reply.json["error_type"]) == (413, "Validation")
    assert server("POST", "/embed", good, Content_Encoding="br").status == 415
    assert server.app.service.budget.request_bytes == 0


def test_cors_only_by_option(tmp_path: Path, server: LiveServer) -> None:
    page = {"Origin": "https://a.example"}
    asked = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert "access-control-allow-origin" not in server("POST", "/embed", {"inputs": "w1"}, **page).headers
    assert server("OPTIONS", "/embed", **asked).status == 405
    settings = Settings(port=0, cors_allow_origin=("https://a.example", "https://b.example"), api_key="sesame")
    with running(make_manifest(tmp_path), settings) as named:
        reply = named("OPTIONS", "/embed", **asked)
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in reply.headers["access-control-allow-headers"]
        for headers in ({**page, "Authorization": "Bearer sesame"}, page):  # A page may read errors, too.
            reply = named("POST", "/embed", {"inputs": "w1"}, **headers)
            assert reply.headers["access-control-allow-origin"] == "https://a.example"
        reply = named("OPTIONS", "/embed", **{**asked, "Origin": "https://c.example"})
        assert "access-control-allow-origin" not in reply.headers
    with running(make_manifest(tmp_path), Settings(port=0, cors_allow_origin=("*",))) as every:
        assert every("GET", "/health", **page).headers["access-control-allow-origin"] == "*"


def test_a_prefix_of_all_paths_and_the_name_of_the_model(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path), Settings(port=0, root_path="/nlp")) as server:
        for path in ("/embed", "/api/embed", "/models/fake/embed", "/models/fake/api/embed"):
            assert server("POST", f"/nlp{path}", {"inputs": "w1"}).status == 200
            assert server("POST", path, {"inputs": "w1"}).status == 404
        assert server("GET", "/nlp/v2/models/fake").status == 200
        assert list(server("GET", "/nlp/v2/models/nope").json) == ["error"]
        reply = server("POST", "/nlp/v1/nope", {})
        assert (reply.status, reply.kind, reply.json["error"]["param"]) == (404, "not_found", None)
        assert "GET /nlp/docs" in reply.json["error"]["message"]
        assert server("GET", "/nlp/openapi.json").json["servers"] == [{"url": "/nlp"}]


@pytest.mark.parametrize("task", ["token-classification", "question-answering", "sparse-embedding"])
def test_answers_that_are_no_tensors_are_json(task: str, tmp_path: Path) -> None:
    answers: dict[str, Any] = {
        "token-classification": lambda ids: [[(token % 2, 0.5)] for token in ids],
        "question-answering": lambda pair: [memoryview(np.float32([token, token])) for token in pair.ids],
        "sparse-embedding": lambda ids: SparseVector([2, 7], [0.5, 1.5]),
    }
    with running(make_manifest(tmp_path, task)) as server:
        server.engine.run = lambda ids, options: list(map(answers[task], ids))  # type: ignore[method-assign]
        metadata = server("GET", "/v2/models/fake").json
        assert metadata["outputs"] == [{"name": "answers", "datatype": "BYTES", "shape": [-1, 1]}]
        inputs = [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["w1 w2", "w3"]}]
        if task == "question-answering":
            assert server("POST", "/v2/models/fake/infer", {"inputs": inputs}).status == 400
            inputs.append({"name": "text_pair", "shape": [2], "datatype": "BYTES", "data": ["w4 w9", "w5"]})
        reply = server("POST", "/v2/models/fake/infer", {"inputs": inputs})
        assert reply.status == 200, reply.body
        (output,) = reply.json["outputs"]
        assert (output["name"], output["shape"]) == ("answers", [2, 1])
        document = server("GET", "/openapi.json").json["paths"]["/v2/models/fake/infer"]["post"]
        example = document["requestBody"]["content"]["application/json"]["example"]
        assert server("POST", "/v2/models/fake/infer", example).status == 200
        long = [{**tensor, "data": ["w1 " * 40] * 2} for tensor in inputs[:1]] + inputs[1:]
        whole = server("POST", "/v2/models/fake/infer", {"inputs": long, "parameters": {"truncate": False}})
        assert whole.status == 400, whole.body
        first, second = map(json.loads, output["data"])
        if task == "token-classification":
            assert [item["word"] for item in (*first, *second)] == ["w1", "w2", "w3"]
        elif task == "question-answering":
            assert [first[0]["answer"], second[0]["answer"]] == ["w9", "w5"]
        else:
            assert first == second == [{"index": 2, "value": 0.5}, {"index": 7, "value": 1.5}]
