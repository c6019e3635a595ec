"""HTTP, limits, batching and shutdown of `deploy serve`, through a socket, with an engine that the test controls."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import logging
import re
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import (
    VOCABULARY,
    WIDTH,
    Client,
    FakeEngine,
    LiveServer,
    Reply,
    expected_row,
    make_manifest,
    raw,
    running,
    wait_until,
)

from deploy.bundle import Manifest
from deploy.server import lifecycle
from deploy.server.api import openai, schemas
from deploy.server.errors import ERRORS
from deploy.server.limits.bounds import INLINE_CHARS, Settings

MAX_TOKENS = 16
GOOD = {"inputs": "w1 w2"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("fake"), max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def server(manifest: Manifest) -> Iterator[LiveServer]:
    """One server for all tests that do not change it."""
    with running(manifest) as live:
        yield live


def ids_of(text: str) -> list[int]:
    words = [VOCABULARY.get(word, 1) for word in text.split()]
    return [2, *words[: MAX_TOKENS - 2], 3]


def rows_of(*texts: str, normalize: bool = False) -> np.ndarray[Any, Any]:
    rows = np.array([expected_row(ids_of(text)) for text in texts], dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows


def documented(server: LiveServer, method: str, path: str) -> set[int]:
    """Statuses that the OpenAPI document lists for an operation."""
    operation = server("GET", "/openapi.json").json["paths"][path][method.lower()]
    return {int(status) for status in operation["responses"]}


# The normal case.


@pytest.mark.parametrize("inputs", ["w1 w2 w3", "", ["w1"], ["w1", "w2 w3", ""], ["w5"] * 40])
def test_embed(server: LiveServer, inputs: Any) -> None:
    reply = server("POST", "/api/embed", {"inputs": inputs})
    assert reply.status == 200
    answer = msgspec.json.decode(reply.body, type=schemas.EmbedResponse)
    texts = [inputs] if isinstance(inputs, str) else inputs
    np.testing.assert_array_equal(np.array(answer.embeddings, dtype=np.float32), rows_of(*texts))
    assert answer.model == "fake"
    assert answer.usage.tokens == sum(len(ids_of(text)) for text in texts)


def test_normalize_reaches_the_engine_per_request(server: LiveServer) -> None:
    wanted = []
    for given, expected in ((None, True), (True, True), (False, False)):
        server.engine.options.clear()
        body = {"inputs": "w1"} if given is None else {"inputs": "w1", "normalize": given}
        assert server("POST", "/api/embed", body).status == 200
        wanted.append((server.engine.options[-1][0].normalize, expected))
    assert all(found == expected for found, expected in wanted)


def test_server_timing(server: LiveServer) -> None:
    header = server("POST", "/api/embed", GOOD).headers["server-timing"]
    assert re.fullmatch(r"tokenize;dur=\d+\.\d{3},queue;dur=\d+\.\d{3},infer;dur=\d+\.\d{3}", header)


def test_keep_alive(server: LiveServer) -> None:
    with Client(server.port) as client:
        for number in range(20):
            reply = client("POST", "/api/embed", {"inputs": f"w{number}"})
            assert reply.status == 200
            np.testing.assert_array_equal(np.float32(reply.json["embeddings"]), rows_of(f"w{number}"))


def test_concurrent_clients_get_their_own_answers(server: LiveServer) -> None:
    wrong: list[object] = []

    def work(offset: int) -> None:
        with Client(server.port) as client:
            for number in range(25):
                texts = [f"w{(offset + number) % 100}"] * (1 + number % 3)
                reply = client("POST", "/api/embed", {"inputs": texts})
                if reply.status != 200 or not np.array_equal(np.float32(reply.json["embeddings"]), rows_of(*texts)):
                    wrong.append((reply.status, reply.body))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(0, 96, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pipelined_requests_are_answered_in_order(server: LiveServer) -> None:
    parts = []
    for number in range(5):
        body = json.dumps({"inputs": f"w{number}"}).encode()
        close = b"Connection: close\r\n" if number == 4 else b""
        parts.append(
            b"POST /api/embed HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s" % (close, len(body), body)
        )
    answers = re.findall(rb'\{"embeddings".*?\}\}', raw(server.port, b"".join(parts)))
    found = [json.loads(answer)["embeddings"][0] for answer in answers]
    np.testing.assert_array_equal(np.float32(found), rows_of(*(f"w{number}" for number in range(5))))


def test_long_texts_are_tokenised_off_the_loop_with_the_same_result(server: LiveServer) -> None:
    text = "w7 " * (INLINE_CHARS // 3 + 10)
    assert len(text) > INLINE_CHARS
    reply = server("POST", "/api/embed", {"inputs": text})
    np.testing.assert_array_equal(np.float32(reply.json["embeddings"]), rows_of(text))
    assert reply.json["usage"]["tokens"] == MAX_TOKENS


def test_chunked_body(server: LiveServer) -> None:
    body = json.dumps(GOOD).encode()
    with Client(server.port) as client:
        client.connection.request("POST", "/api/embed", iter([body[:5], body[5:]]), encode_chunked=True, headers={})
        assert client.read().status == 200


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_offers_of_other_protocols_are_ignored(server: LiveServer, protocol: str) -> None:
    with Client(server.port) as client:
        for number in range(2):
            texts = [f"w{number}\r\nUpgrade: {protocol}"]
            reply = client(
                "POST", "/api/embed", {"inputs": texts}, Connection="Upgrade, HTTP2-Settings", Upgrade=protocol
            )
            assert reply.status == 200
            np.testing.assert_array_equal(np.float32(reply.json["embeddings"]), rows_of(*texts))


# What clients get wrong, by accident or on purpose. Each is followed by a good request.

LIMITS = Settings(port=0, request_timeout_s=5.0)
INVALID = "invalid_request"
HOSTILE: dict[str, tuple[bytes, int, str]] = {
    "empty body": (b"", 422, INVALID),
    "not JSON": (b"inputs=w1", 422, INVALID),
    "cut JSON": (b'{"inputs": "w1', 422, INVALID),
    "two values": (b'{"inputs": "w1"}{"inputs": "w1"}', 422, INVALID),
    "array": (b'["w1"]', 422, INVALID),
    "null": (b"null", 422, INVALID),
    "missing field": (b"{}", 422, INVALID),
    "unknown field": (b'{"inputs": "w1", "normalise": true}', 422, INVALID),
    "number": (b'{"inputs": 1}', 422, INVALID),
    "inputs null": (b'{"inputs": null}', 422, INVALID),
    "number among texts": (b'{"inputs": ["w1", 2]}', 422, INVALID),
    "nested list": (b'{"inputs": [["w1"]]}', 422, INVALID),
    "wrong flag": (b'{"inputs": "w1", "truncate": "no"}', 422, INVALID),
    "deep nesting": (b'{"inputs": ' + b"[" * 200_000, 422, INVALID),
    "deep nesting in an unknown field": (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", 422, INVALID),
    "empty list": (b'{"inputs": []}', 422, "no_inputs"),
    "escaped NUL": (b'{"inputs": "w1\\u0000w2"}', 422, INVALID),
    "NUL byte": (b'{"inputs": "w1\x00w2"}', 422, INVALID),
    "NUL bytes only": (b"\x00" * 1000, 422, INVALID),
    "lone high surrogate": (b'{"inputs": "\\ud800"}', 422, INVALID),
    "lone low surrogate": (b'{"inputs": "a \\udfff b"}', 422, INVALID),
    "surrogates the wrong way round": (b'{"inputs": ["w1", "\\ude00\\ud83d"]}', 422, INVALID),
    "surrogate in UTF-8": ('{"inputs": "\ud800"}'.encode("utf-8", "surrogatepass"), 422, INVALID),
    "Latin-1": ('{"inputs": "é"}'.encode("latin-1"), 422, INVALID),
    "UTF-16": ('{"inputs": "w1"}'.encode("utf-16"), 422, INVALID),
    "byte order mark": (b'\xef\xbb\xbf{"inputs": "w1"}', 422, INVALID),
    "too many tokens without truncation": (
        json.dumps({"inputs": "w1 " * 50, "truncate": False}).encode(),
        422,
        INVALID,
    ),
    "too many tokens without truncation, long": (
        json.dumps({"inputs": "w1 " * 5000, "truncate": False}).encode(),
        422,
        INVALID,
    ),
    "300,000 inputs": (json.dumps({"inputs": ["w1"] * 300_000}).encode(), 413, "too_large"),
    "300,000 empty inputs": (json.dumps({"inputs": [""] * 300_000}).encode(), 413, "too_large"),
    "body too large": (json.dumps({"inputs": "x" * (LIMITS.max_body_bytes + 1)}).encode(), 413, "too_large"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_request(server: LiveServer, name: str) -> None:
    body, status, kind = HOSTILE[name]
    with Client(server.port) as client:
        reply = client("POST", "/api/embed", body)
        assert (reply.status, reply.kind) == (status, kind), reply.body[:300]
        assert reply.headers["content-type"] == "application/json"
        assert reply.status in documented(server, "POST", "/api/embed")
        # The same connection, and another one, go on.
        assert client("POST", "/api/embed", GOOD).status == 200
    assert server("POST", "/api/embed", GOOD).status == 200


# OpenAI's request has no such fields, and ignores those it does not know.
OPENAI_HOSTILE = [name for name, (body, *_) in HOSTILE.items() if b"truncate" not in body and b"normalise" not in body]


@pytest.mark.parametrize("name", OPENAI_HOSTILE)
def test_hostile_request_to_openais_endpoint(server: LiveServer, name: str) -> None:
    body, status, kind = HOSTILE[name]
    reply = server("POST", "/v1/embeddings", body.replace(b'"inputs"', b'"input"'))
    assert (reply.status, reply.kind) == (400 if status == 422 else status, kind), reply.body[:300]
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert server("POST", "/api/embed", GOOD).status == 200


def test_errors_say_what_was_expected_and_what_came(server: LiveServer) -> None:
    long = {"inputs": ["w1", "w1 " * 20], "truncate": False}
    message = server("POST", "/api/embed", long).json["error"]["message"]
    assert "input 1" in message
    assert "at most 16 tokens, got 22" in message
    message = server("POST", "/api/embed", {"inputs": ["w1"] * 270_000}).json["error"]["message"]
    assert str(LIMITS.max_queue_tokens) in message


def test_body_is_refused_by_its_length_before_it_is_read(server: LiveServer) -> None:
    head = b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000000\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(head)
        answer = sock.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 413 ")  # Not "100 Continue".
    assert server("POST", "/api/embed", GOOD).status == 200


def test_chunked_body_is_refused_while_it_is_read(server: LiveServer) -> None:
    chunk = b"x" * 65_536
    with Client(server.port) as client:
        client.connection.request(
            "POST", "/api/embed", (chunk for _ in range(LIMITS.max_body_bytes // len(chunk) + 2)), encode_chunked=True
        )
        assert (reply := client.read()).status == 413
        assert reply.kind == "too_large"
        assert client("POST", "/api/embed", GOOD).status == 200


def test_a_body_in_another_coding_is_refused(server: LiveServer) -> None:
    for coding in ("br", "zstd", "gzip, gzip"):
        reply = server("POST", "/api/embed", gzip.compress(json.dumps(GOOD).encode()), Content_Encoding=coding)
        assert (reply.status, reply.kind) == (415, "unsupported_media_type")
    assert server("POST", "/api/embed", GOOD, Content_Encoding="identity").status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS.
        b"hello\r\n\r\n",
        b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /api/embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=[
        "TLS",
        "text",
        "negative length",
        "two lengths",
        "length and chunks",
        "wrong chunk",
        "long header",
        "long path",
        "bytes in path",
    ],
)
def test_what_is_not_http(server: LiveServer, data: bytes) -> None:
    answer = raw(server.port, data)
    assert answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"]
    assert server("POST", "/api/embed", GOOD).status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST /api/embed HT",
        b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n\r\n",
        b'POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n\r\n{"inputs": "w1',
        b"POST /api/embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
        b'POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n{"inputs": "w1"}',
    ],
)
@pytest.mark.parametrize("reset", [False, True])
def test_early_close(server: LiveServer, data: bytes, reset: bool) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(data)
        if reset:  # Closing sends RST.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert server("POST", "/api/embed", GOOD).status == 200


def test_slow_requests_are_given_up(manifest: Manifest) -> None:
    slow = (
        b"POST /api/embed HTTP/1.1\r\nHo",
        b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
        b"",
    )
    with running(manifest, Settings(port=0, request_timeout_s=0.3)) as server, Client(server.port) as client:
        assert client("POST", "/api/embed", GOOD).status == 200
        with ThreadPoolExecutor(len(slow)) as pool:  # All at once; that they end at all is a time-out.
            head, body, nothing = pool.map(lambda data: raw(server.port, data), slow)
        assert b" 408 " in head.partition(b"\r\n")[0] + b" "
        assert (body, nothing) == (b"", b"")
        # One that waits between requests is not slow.
        assert client("POST", "/api/embed", GOOD).status == 200


# Routes.


def test_unknown_path(server: LiveServer) -> None:
    for path in ("/api/embed/", "/nope", "/v1/completions", "/%00", "/%ff%ed%a0%80", "/../etc/passwd"):
        reply = server("GET", path)
        assert (reply.status, reply.kind) == (404, "not_found"), path
    assert set(server("POST", "/v1/nope").json["error"]) == {"message", "type", "param", "code"}


def test_wrong_method(server: LiveServer) -> None:
    for method, path, allowed in (
        ("GET", "/api/embed", "POST"),
        ("POST", "/ready", "GET"),
        ("DELETE", "/api/embed", "POST"),
    ):
        reply = server(method, path)
        assert (reply.status, reply.kind) == (405, "method_not_allowed")
        assert reply.headers["allow"] == allowed


def test_head(server: LiveServer) -> None:
    reply = server("HEAD", "/health")
    assert (reply.status, reply.body) == (200, b"")


def test_health_and_ready(server: LiveServer) -> None:
    for path in ("/health", "/ready"):
        reply = server("GET", path)
        assert reply.status == 200
        msgspec.json.decode(reply.body, type=schemas.StatusResponse)


@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        ("feature-extraction", {"embedding": {"pooling": "mean"}}),
        (
            "text-classification",
            {"classifier": {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}},
        ),
        ("fill-mask", {"fill-mask": {}}),
    ],
)
def test_info(tmp_path: Path, task: str, model_type: object) -> None:
    with running(make_manifest(tmp_path, task, MAX_TOKENS), Settings(port=0, threads=3, max_inputs=7)) as server:
        reply = server("GET", "/info")
        assert reply.status == 200
        info = msgspec.json.decode(reply.body, type=schemas.InfoResponse)
        assert 503 in documented(server, "GET", "/info")
    # Fields that clients of text-embeddings-inference read.
    assert (info.model_id, info.model_sha, info.model_dtype) == ("fake", None, "float32")
    assert reply.json["model_type"] == model_type
    assert (info.max_input_length, info.max_client_batch_size, info.auto_truncate) == (MAX_TOKENS, 7, True)
    # Ours.
    assert (info.task, info.variant, info.isa, info.threads) == (task, "fake", "fake-isa", 3)
    assert (info.limits.max_inputs, info.limits.max_tokens) == (7, MAX_TOKENS)
    assert (info.chosen_by, info.left_out) == ("only", {"other": "it is not there"})
    assert [(item.variant, item.texts_per_s) for item in info.candidates] == [("fake", None)]
    assert set(info.versions) == {"torch_ext", "torch", "onnxruntime"}


@pytest.mark.parametrize("path", ["/api/classify", "/api/fill-mask"])
def test_endpoint_of_another_task(server: LiveServer, path: str) -> None:
    reply = server("POST", path, GOOD)
    assert (reply.status, reply.kind) == (400, "wrong_task")
    assert "/api/embed" in reply.json["error"]["message"]


def test_every_route_is_described(server: LiveServer) -> None:
    document = server("GET", "/openapi.json").json
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    served = {(path, method) for path, methods in server.app._routes.items() for method in methods}
    assert {(path, method) for path, method in served if not path.startswith("/models/fake")} == described
    text = json.dumps(document)
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert references <= set(document["components"]["schemas"])
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for path, kind in (("/api/embed", schemas.EmbedRequest), ("/v1/embeddings", openai.OpenAIEmbeddingsRequest)):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        msgspec.convert(content["example"], kind)
        assert server("POST", path, content["example"]).status == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/models/fake/"])
def test_pages_need_no_network_and_let_nothing_in(path: str, server: LiveServer) -> None:
    reply = server("GET", path)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert b"openapi.json" in reply.body
    assert not re.search(rb"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", reply.body)
    assert not re.search(rb"(src|href)=\"(?!docs|openapi.json|metrics|data:,)", reply.body)
    assert not re.search(rb"innerHTML|outerHTML|document\.write|eval\(| style=| on[a-z]+=\"", reply.body)
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    for tag in ("script", "style"):
        texts = re.findall(rb"<%s>(.*?)</%s>" % (tag.encode(), tag.encode()), reply.body, re.DOTALL)
        assert texts
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts]
        assert policy[f"{tag}-src"].split() == hashes
    for name, value in (
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-opener-policy", "same-origin"),
    ):
        assert reply.headers[name] == value


@pytest.mark.parametrize("keys", [{"api_key": "sesame"}, {"api_keys_file": "keys.json"}, {}])
def test_what_the_page_asks_first(manifest: Manifest, keys: dict[str, Any]) -> None:
    with running(manifest, Settings(port=0, **keys)) as server:
        assert server("GET", "/api/model").json == {
            "model": "fake",
            "task": "feature-extraction",
            "variant": "fake",
            "labels": 0,
            "mask": "[MASK]",
            "secured": bool(keys),
        }


def test_api_key(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, api_key="sesame")) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
            closed = (("POST", "/api/embed"), ("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("GET", "/info"))
            for method, path in closed:
                reply = server(method, path, GOOD if method == "POST" else None, **headers)
                assert reply.status == 401
                assert reply.headers["www-authenticate"] == "Bearer"
                assert 401 in documented(server, method, path)
        assert server("POST", "/api/embed", GOOD, Authorization="Bearer sesame").status == 200
        assert server("POST", "/api/embed", GOOD, authorization="bearer sesame").status == 200
        for path in ("/", "/live", "/health", "/ping", "/ready", "/metrics", "/docs", "/openapi.json", "/api/model"):
            assert server("GET", path).status == 200


def test_error_table_is_complete(server: LiveServer) -> None:
    source = Path(sys.modules["deploy.server.app"].__file__ or "").parent
    used = {
        kind
        for file in source.rglob("*.py")
        for kind in re.findall(r'ApiError\(\s*"([a-z_]+)"', file.read_text(encoding="utf-8"))
    }
    assert used == set(ERRORS)


# OpenAI's endpoints.


def test_openai_floats_and_base64_agree(server: LiveServer) -> None:
    body = {"input": ["w1", "w2 w3"], "model": "any", "user": "ignored"}
    plain = msgspec.json.decode(server("POST", "/v1/embeddings", body).body, type=openai.OpenAIEmbeddingsResponse)
    coded = msgspec.json.decode(
        server("POST", "/v1/embeddings", {**body, "encoding_format": "base64"}).body,
        type=openai.OpenAIEmbeddingsResponse,
    )
    expected = rows_of("w1", "w2 w3")
    assert [item.index for item in plain.data] == [0, 1]
    for index in range(2):
        text = coded.data[index].embedding
        assert isinstance(text, str)
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), expected[index])
        np.testing.assert_array_equal(np.float32(plain.data[index].embedding), expected[index])
    assert plain.usage.prompt_tokens == plain.usage.total_tokens == 7


def test_openai_token_ids(manifest: Manifest, server: LiveServer) -> None:
    one, two = VOCABULARY["w1"], VOCABULARY["w2"]
    reply = server("POST", "/v1/embeddings", {"input": [one, two]})
    assert (reply.status, reply.kind) == (400, INVALID)
    for words in ("check_embedding_ctx_length=False", "--accept-token-ids"):
        assert words in reply.json["error"]["message"]
    with running(manifest, Settings(port=0, accept_token_ids=True)) as taking:
        text = taking("POST", "/v1/embeddings", {"input": "w1 w2"}).json["data"]
        for given in ([one, two], [[one, two]], [2, one, two, 3]):
            assert taking("POST", "/v1/embeddings", {"input": given}).json["data"] == text
        assert len(taking("POST", "/v1/embeddings", {"input": [[one], [two]]}).json["data"]) == 2
        assert taking("POST", "/embed", {"inputs": [one, two]}).json == [text[0]["embedding"]]
        for wrong in ([100_277], [[5], [-1]]):
            reply = taking("POST", "/v1/embeddings", {"input": wrong})
            assert (reply.status, reply.kind) == (400, INVALID)


@pytest.mark.parametrize(
    "field",
    [
        {"input": []},
        {"input": [[]]},
        {"input": [-1]},
        {"input": [len(VOCABULARY)]},
        {"input": [1 << 70]},
        {"input": ["w1", 5]},
        {"input": [5, [5]]},
        {"input": [5] * 15},
        {"input": [1.5]},
        {"input": "w1", "dimensions": WIDTH + 1},
        {"input": "w1", "encoding_format": "int8"},
    ],
)
def test_openai_invalid(server: LiveServer, field: dict[str, Any]) -> None:
    reply = server("POST", "/v1/embeddings", field)
    assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error")


def test_openai_more(server: LiveServer) -> None:
    assert server("POST", "/v1/embeddings", {"input": "w1", "dimensions": WIDTH}).status == 200
    models = msgspec.json.decode(server("GET", "/v1/models").body, type=openai.OpenAIModels)
    assert [model.id for model in models.data] == ["fake"]


# Batches.


def blocked(manifest: Manifest, **settings: Any) -> Any:
    """A server whose engine waits in its first batch until the test opens the gate."""
    return running(manifest, Settings(port=0, request_timeout_s=5.0, **settings), gate=threading.Event())


def in_background(server: LiveServer, body: Any, replies: list[Reply]) -> threading.Thread:
    """Sends an embed request from a thread and returns when the server has queued it."""
    before = server.batcher.queued_tokens
    thread = threading.Thread(target=lambda: replies.append(server("POST", "/api/embed", body)))
    thread.start()
    wait_until(lambda: server.batcher.queued_tokens > before)
    # The first one has its batch to itself: others that are queued before the engine looks would share it.
    assert server.engine.entered.wait(10)
    return thread


def test_batches_take_what_waits_within_the_token_budget(manifest: Manifest) -> None:
    replies: list[Reply] = []
    with blocked(manifest, max_batch_tokens=12) as server:
        threads = [in_background(server, {"inputs": f"w{number} w1"}, replies) for number in range(8)]
        assert server.engine.batches == [[ids_of("w0 w1")]]  # An idle engine does not wait for more.
        server.engine.gate.set()
        for thread in threads:
            thread.join()
        assert [len(batch) for batch in server.engine.batches] == [1, 3, 3, 1]
        assert all(sum(map(len, batch)) <= 12 for batch in server.engine.batches)
    assert [reply.status for reply in replies] == [200] * 8


def test_one_text_always_fits_a_batch(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, max_batch_tokens=4)) as server:
        assert server("POST", "/api/embed", {"inputs": ["w1 " * 14, "w1 " * 14]}).status == 200
        assert [len(batch) for batch in server.engine.batches] == [1, 1]


def test_a_large_request_does_not_starve_others(manifest: Manifest) -> None:
    replies: list[Reply] = []
    with blocked(manifest, max_batch_tokens=9) as server:
        threads = [in_background(server, {"inputs": ["w1"] * 300}, replies)]
        threads += [in_background(server, {"inputs": f"w{number}"}, replies) for number in (50, 51)]
        server.engine.gate.set()
        for thread in threads:
            thread.join()
        batches = server.engine.batches
        # The budget is three texts: the large request had the first batch, the small ones share the second.
        assert [ids_of("w50") in batch for batch in batches[:3]].index(True) <= 1
        assert [ids_of("w51") in batch for batch in batches[:3]].index(True) <= 1
        assert sum(map(len, batches)) == 302


def test_results_of_a_split_request_keep_their_order(manifest: Manifest) -> None:
    texts = [f"w{number % 100} " * (1 + number % 7) for number in range(200)]
    with running(manifest, Settings(port=0, max_batch_tokens=20)) as server:
        reply = server("POST", "/api/embed", {"inputs": texts})
        np.testing.assert_array_equal(np.float32(reply.json["embeddings"]), rows_of(*texts))
        assert len(server.engine.batches) > 20


def test_full_queue(manifest: Manifest) -> None:
    replies: list[Reply] = []
    with blocked(manifest, max_queue_tokens=10) as server:
        threads = [in_background(server, GOOD, replies) for _ in range(2)]
        reply = server("POST", "/api/embed", GOOD)
        assert (reply.status, reply.kind) == (429, "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert server("POST", "/v1/embeddings", {"input": "w1 w2"}).status == 429
        never = server("POST", "/api/embed", {"inputs": ["w1"] * 4})
        assert (never.status, never.kind) == (413, "too_large")
        assert server("GET", "/health").status == 200
        server.engine.gate.set()
        for thread in threads:
            thread.join()
        assert server("POST", "/api/embed", GOOD).status == 200
        assert server.batcher.queued_tokens == 0
    assert [reply.status for reply in replies] == [200, 200]


@pytest.mark.parametrize("reset", [False, True])
def test_work_of_a_client_that_left_is_dropped(manifest: Manifest, reset: bool) -> None:
    with blocked(manifest, max_batch_tokens=9, max_queue_tokens=1000) as server:
        client = Client(server.port)
        client.send("POST", "/api/embed", {"inputs": ["w9"] * 300})
        assert server.engine.entered.wait(10)
        wait_until(lambda: server.batcher.queued_tokens == 900)
        if reset:
            client.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.connection.close()
        wait_until(lambda: server.batcher.queued_tokens == 0)  # Makes room at once.
        server.engine.gate.set()
        assert server("POST", "/api/embed", GOOD).status == 200
        assert sum(ids_of("w9") in batch for batch in server.engine.batches) == 1  # Only what had begun.
        assert b"serve_abandoned_requests_total 1.0" in server("GET", "/metrics").body


def test_engine_failure(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    with running(manifest, poison=VOCABULARY["w66"]) as server, caplog.at_level(logging.CRITICAL, "deploy.server"):
        reply = server("POST", "/api/embed", {"inputs": ["w1"] * 5 + ["w66"]})
        assert (reply.status, reply.kind) == (500, "internal")
        assert "poisoned" not in reply.json["error"]["message"]
        assert server("POST", "/api/embed", GOOD).status == 200
        assert server.batcher.queued_tokens == 0
        server.engine.drop = True
        assert server("POST", "/api/embed", GOOD).status == 500
        server.engine.drop = False
        assert server("POST", "/api/embed", GOOD).status == 200


def test_metrics(manifest: Manifest) -> None:
    with running(manifest) as server:
        server("POST", "/api/embed", GOOD)
        server("POST", "/api/embed", {"inputs": ["w1", "w2"]})
        server("POST", "/api/embed", b"{")
        server("GET", "/nope")
        reply = server("GET", "/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        lines = set(reply.body.decode().splitlines())
    assert 'serve_requests_total{endpoint="/api/embed",status="200"} 2.0' in lines
    assert 'serve_requests_total{endpoint="/api/embed",status="422"} 1.0' in lines
    assert 'serve_requests_total{endpoint="other",status="404"} 1.0' in lines
    assert 'serve_model_info{model="fake",task="feature-extraction",variant="fake"} 1.0' in lines
    assert "serve_queue_tokens 0.0" in lines
    assert "serve_queue_wait_seconds 0.0" in lines
    assert "serve_ready 1.0" in lines
    assert "serve_batch_texts_sum 3.0" in lines
    assert "serve_batch_tokens_sum 10.0" in lines
    for stage in ("tokenize", "queue", "infer"):
        assert f'serve_stage_seconds_count{{stage="{stage}"}} 2.0' in lines
    assert 'serve_request_seconds_count{endpoint="/api/embed"} 3.0' in lines


# Loading and shutdown.


def test_loading(manifest: Manifest) -> None:
    gate, engine = threading.Event(), FakeEngine()
    engine.gate.set()

    def load() -> FakeEngine:
        assert gate.wait(10)
        return engine

    server = LiveServer(manifest, Settings(port=0), engine, load)
    try:
        assert server("GET", "/live").status == 200
        tei = ("/info", "/health", "/ping", "/embed", "/")
        for method, path in (
            ("GET", "/ready"),
            *(("POST" if path in ("/embed", "/") else "GET", path) for path in tei),
            ("POST", "/api/embed"),
            ("POST", "/v1/embeddings"),
        ):
            reply = server(method, path, GOOD if method == "POST" else None)
            assert reply.status == 503
            if path in tei:
                assert reply.json["error_type"] == "Unhealthy"
            else:
                assert reply.kind == "loading"
            assert "retry-after" in reply.headers
        assert server("GET", "/docs").status == 200
        assert not server.ready.is_set()
        gate.set()
        assert server.ready.wait(10)
        assert server("GET", "/ready").status == 200
        assert server("GET", "/info").status == 200
        assert server("POST", "/api/embed", GOOD).status == 200
    finally:
        gate.set()
        assert server.stop() == 0


def test_model_that_cannot_be_loaded_stops_the_server(manifest: Manifest) -> None:
    def load() -> FakeEngine:
        raise OSError("no such weights")

    server = LiveServer(manifest, Settings(port=0), FakeEngine(), load)
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert server.server.exit_code == 2
    assert "no such weights" in str(server.server.load_error)
    assert not server.ready.is_set()


def test_drain_answers_everything_that_was_accepted(manifest: Manifest) -> None:
    replies: list[Reply] = []
    with blocked(manifest, max_batch_tokens=12) as server:
        idle = Client(server.port)
        assert idle("GET", "/ready").status == 200
        threads = [in_background(server, {"inputs": [f"w{number}"] * 10}, replies) for number in range(20)]
        server.terminate()
        reply = idle("GET", "/ready")
        assert (reply.status, reply.kind) == (503, "draining")
        assert reply.headers["connection"] == "close"
        wait_until(lambda: refused(server.port))
        server.engine.gate.set()
        for thread in threads:
            thread.join()
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert [reply.status for reply in replies] == [200] * 20
    assert all(reply.headers["connection"] == "close" for reply in replies)
    assert all(len(reply.json["embeddings"]) == 10 for reply in replies)


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_drain_takes_a_request_that_comes_on_an_open_connection(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "IDLE_GRACE_S", 10.0)  # However long this test is held up meanwhile.
    with running(manifest) as server:
        with Client(server.port) as client:
            assert client("POST", "/api/embed", GOOD).status == 200
            server.terminate()
            wait_until(lambda: refused(server.port))
            reply = client("POST", "/api/embed", GOOD)
            assert reply.status == 200
            assert reply.headers["connection"] == "close"
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_drain_under_load_loses_nothing(manifest: Manifest) -> None:
    """Clients that send without a pause see 200, or a refused connection after the stop; never a reset or a cut."""
    bad: list[str] = []
    done = 0
    stop = threading.Event()

    def work(port: int) -> None:
        nonlocal done
        client = Client(port)
        try:
            while not stop.is_set():
                try:
                    client.connection.connect() if client.connection.sock is None else None
                except ConnectionRefusedError:
                    return
                try:
                    reply = client("POST", "/api/embed", {"inputs": ["w1", "w2"]})
                except Exception as error:
                    bad.append(repr(error))
                    return
                if reply.status != 200:
                    bad.append(f"{reply.status} {reply.body[:100]!r}")
                done += 1
        finally:
            client.connection.close()

    with running(manifest) as server:
        threads = [threading.Thread(target=work, args=(server.port,)) for _ in range(16)]
        for thread in threads:
            thread.start()
        wait_until(lambda: done > 300)
        server.terminate()
        server.thread.join(15)
        assert not server.thread.is_alive()
        stop.set()
        for thread in threads:
            thread.join()
    assert not bad


def test_drain_delay_goes_on_accepting(manifest: Manifest) -> None:
    with running(manifest, Settings(port=0, drain_delay_s=1.0)) as server:
        server.terminate()
        assert server("GET", "/ready").status == 503
        assert server("POST", "/api/embed", GOOD).status == 200
        wait_until(lambda: refused(server.port))


# Other tasks: what the server does around the engine.


def test_fill_mask_checks_its_masks(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path, "fill-mask", max_tokens=50)) as server:
        # None, one that is cut off with the end of its text, and too many.
        for text in ("w1 w2", "w1 " * 48 + "[MASK]", "[MASK] " * 33):
            reply = server("POST", "/api/fill-mask", {"inputs": ["w1 [MASK]", text]})
            assert (reply.status, reply.kind) == (422, INVALID)
            assert "input 1" in reply.json["error"]["message"]
            assert "[MASK]" in reply.json["error"]["message"]
        for top_k in (0, -1, 101, 1.5, "5"):
            assert server("POST", "/api/fill-mask", {"inputs": "[MASK]", "top_k": top_k}).status == 422
        for path in ("/api/embed", "/v1/embeddings"):
            reply = server("POST", path, {"inputs": "w1"})
            assert (reply.status, reply.kind) == (400, "wrong_task")
            assert "/api/fill-mask" in reply.json["error"]["message"]
