"""Embeddings in the dialects of Cohere and Voyage, through a socket."""

from __future__ import annotations

import base64
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import WIDTH, LiveServer, make_manifest, running

from deploy.bundle import Prompts
from deploy.server.api import cohere
from deploy.server.api.embedded import MAKERS
from deploy.server.http.bodies import INLINE_VALUES
from deploy.server.limits.bounds import Settings

TEXTS = ["w1", "w2 w3"]
PROMPTS = Prompts({"Query": "w4 ", "passage": "w5 ", "clustering": "w6 ", "other": "w7 "}, default="other")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    manifest = make_manifest(tmp_path_factory.mktemp("fake"))
    with running(dataclasses.replace(manifest, prompts=PROMPTS), Settings(port=0, any_dimensions=True)) as live:
        yield live


def rows(server: LiveServer, *texts: str, **fields: Any) -> Any:
    """What the model has made of these texts, by OpenAI's route, which adds the default prompt."""
    reply = server("POST", "/v1/embeddings", {"input": list(texts), **fields})
    return np.array([item["embedding"] for item in reply.json["data"]], np.float32)


def test_types(server: LiveServer) -> None:
    kinds = ["float", "base64", "ubinary", "binary", "float"]
    reply = server("POST", "/v2/embed", {"texts": TEXTS, "embedding_types": kinds, "model": "any", "images": None})
    answer = msgspec.json.decode(reply.body, type=cohere.CohereResponse, strict=True)
    expected = rows(server, *TEXTS)
    found = answer.embeddings
    assert isinstance(found.base64, list)
    np.testing.assert_array_equal(np.array(found.floats, np.float32), expected)
    coded = [np.frombuffer(base64.b64decode(row), "<f4") for row in found.base64]
    np.testing.assert_array_equal(coded, expected)
    bits = np.packbits(expected > 0, axis=1)
    np.testing.assert_array_equal(found.ubinary, bits)
    np.testing.assert_array_equal(found.binary, (bits.astype(int) - 128))
    assert answer.texts == TEXTS
    assert answer.meta.billed_units == {"input_tokens": 9}
    assert answer.id


@pytest.mark.parametrize("numbers", [[1.0, -1.0, 0.0, 2.0, -0.0], [1.0] * 8, [-1.0] * 3 + [1.0] * 14])
def test_bits(numbers: list[float]) -> None:
    expected = np.packbits(np.array(numbers) > 0)
    assert MAKERS["ubinary"](numbers) == expected.tolist()
    assert MAKERS["binary"](numbers) == (expected.astype(int) - 128).tolist()


def test_v1_and_v2_differ_without_types(server: LiveServer) -> None:
    plain = server("POST", "/v1/embed", {"texts": TEXTS})
    floats = msgspec.json.decode(plain.body, type=cohere.CohereV1Response, strict=True)
    assert (floats.response_type, floats.meta.api_version) == ("embeddings_floats", {"version": "1"})
    np.testing.assert_array_equal(np.float32(plain.json["embeddings"]), rows(server, *TEXTS))
    for path, fields in (("/v2/embed", {}), ("/v1/embed", {"embedding_types": ["float"]})):
        by_type = server("POST", path, {"texts": TEXTS, **fields}).json
        assert by_type["response_type"] == "embeddings_by_type"
        assert by_type["embeddings"] == {"float": plain.json["embeddings"]}


def test_the_type_of_inputs_chooses_the_prompt(server: LiveServer) -> None:
    for kind, prompt in (
        ("search_query", "w4 "),
        ("search_document", "w5 "),
        ("clustering", "w6 "),
        ("classification", "w7 "),  # None of its own: the default.
        (None, "w7 "),
    ):
        server.engine.batches.clear()
        assert server("POST", "/v2/embed", {"texts": ["w1"], "input_type": kind}).status == 200
        named = list(server.engine.batches)
        server.engine.batches.clear()
        expected = server("POST", "/tokenize", {"inputs": f"{prompt}w1", "prompt_name": None}).json[0]
        # The default prompt was added to the tokenized text, too.
        words = [token["text"] for token in expected if not token["special"]][1:]
        ids = {token["text"]: token["id"] for token in expected}
        assert [list(text)[1:-1] for batch in named for text in batch] == [[ids[word] for word in words]]


def test_dimensions_and_long_texts(server: LiveServer) -> None:
    cut = server("POST", "/v2/embed", {"texts": TEXTS, "output_dimension": 4}).json["embeddings"]["float"]
    np.testing.assert_array_equal(np.float32(cut), rows(server, *TEXTS, dimensions=4))
    long = {"texts": [" ".join(f"w{index}" for index in range(1, 30))]}
    end, start = (
        server("POST", "/v2/embed", {**long, "truncate": side}).json["embeddings"]["float"] for side in ("END", "START")
    )
    assert end == server("POST", "/v2/embed", long).json["embeddings"]["float"] != start
    for wrong, words in (
        ({**long, "truncate": "NONE"}, "16"),
        ({"texts": TEXTS, "output_dimension": WIDTH + 1}, "output_dimension: expected 1 to"),
        ({"texts": TEXTS, "max_tokens": 15}, "max_tokens: expected none, or at least 16"),
        ({"texts": TEXTS, "embedding_types": ["float", "int8"]}, "float, base64, ubinary, binary, got 'int8'"),
        ({"texts": TEXTS, "input_type": "image"}, "image"),
        ({"texts": []}, "at least one input"),
        ({"images": ["data:"]}, "texts"),
    ):
        refused = server("POST", "/v2/embed", wrong)
        assert (refused.status, set(refused.json)) == (400, {"message", "detail"}), wrong
        assert words in refused.json["message"], wrong
    assert server("POST", "/v2/embed", {"texts": TEXTS, "max_tokens": 16}).status == 200


def test_large_answers_leave_in_parts(server: LiveServer) -> None:
    many = INLINE_VALUES // WIDTH + 1
    reply = server("POST", "/v2/embed", {"texts": ["w1"] * many, "embedding_types": ["ubinary", "float"]})
    found = reply.json["embeddings"]
    assert list(found) == ["ubinary", "float"]
    assert {len(rows) for rows in found.values()} == {many}
    assert reply.json["meta"]["billed_units"]["input_tokens"] == 4 * many


def voyage(server: LiveServer, **fields: Any) -> Any:
    """Embeddings of `TEXTS`, asked for as Voyage's client asks."""
    reply = server("POST", "/v1/embeddings", {"input": TEXTS, "model": "voyage-3", **fields})
    assert reply.status == 200, reply.body
    return [item["embedding"] for item in reply.json["data"]]


def test_voyages_types_and_widths(server: LiveServer) -> None:
    expected = rows(server, *TEXTS)
    assert voyage(server, output_dtype="float", output_dimension=None) == expected.tolist()
    bits = np.packbits(expected > 0, axis=1)
    for kind, as_numbers, dtype in (
        ("ubinary", bits, np.uint8),
        ("binary", bits.astype(int) - 128, np.int8),
        ("float", expected, np.float32),
    ):
        np.testing.assert_array_equal(voyage(server, output_dtype=kind), as_numbers)
        coded = voyage(server, output_dtype=kind, encoding_format="base64")
        np.testing.assert_array_equal([np.frombuffer(base64.b64decode(row), dtype) for row in coded], as_numbers)
    cut = rows(server, *TEXTS, dimensions=4)
    np.testing.assert_array_equal(np.float32(voyage(server, output_dimension=4)), cut)
    np.testing.assert_array_equal(np.float32(voyage(server, output_dimension=4, dimensions=4)), cut)
    many = INLINE_VALUES // WIDTH + 1
    large = server("POST", "/v1/embeddings", {"input": ["w1"] * many, "output_dtype": "ubinary"}).json["data"]
    assert [(item["index"], item["embedding"]) for item in large] == [(n, bits[0].tolist()) for n in range(many)]


def test_voyages_prompts_and_long_texts(server: LiveServer) -> None:
    by_cohere = [
        server("POST", "/v2/embed", {"texts": TEXTS, "input_type": kind}).json["embeddings"]["float"]
        for kind in ("search_query", "search_document", None)
    ]
    assert [voyage(server, input_type=kind) for kind in ("query", "document", None)] == by_cohere
    assert by_cohere[0] != by_cohere[1] != by_cohere[2]
    long = " ".join(f"w{index}" for index in range(1, 30))
    assert server("POST", "/v1/embeddings", {"input": long, "truncation": True}).status == 200
    refused = server("POST", "/v1/embeddings", {"input": long, "truncation": False})
    assert (refused.status, refused.json["error"]["param"]) == (400, "input")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"output_dtype": "int8"}, "output_dtype", "float, binary, ubinary, got 'int8'; int8 and uint8 need"),
        ({"output_dtype": 8}, "output_dtype", "int"),
        ({"output_dimension": WIDTH + 1}, "output_dimension", "expected 1 to 8"),
        ({"output_dimension": 0}, "output_dimension", "expected 1 to 8"),
        ({"output_dimension": 4, "dimensions": 2}, "output_dimension", "expected 2"),
        ({"input_type": "image"}, "input_type", "image"),
        ({"truncation": "no"}, "truncation", "bool"),
    ],
)
def test_what_voyages_fields_refuse(server: LiveServer, fields: dict[str, Any], param: str, words: str) -> None:
    refused = server("POST", "/v1/embeddings", {"input": TEXTS, **fields})
    error = refused.json["error"]
    assert (refused.status, error["param"]) == (400, param), error
    assert words in error["message"]


def test_a_field_of_few_values_is_told_with_them(server: LiveServer) -> None:
    body = {"input": "w1", "encoding_format": "int8"}
    refused = server("POST", "/v1/embeddings", body).json["error"]
    assert refused["message"] == "Expected float, base64, got 'int8' - at `$.encoding_format`"
    assert refused["param"] == "encoding_format"
    cohere = server("POST", "/v2/embed", {"texts": ["w1"], "truncate": "MIDDLE"}).json["message"]
    assert cohere == "Expected NONE, START, END, got 'MIDDLE' - at `$.truncate`"


def test_an_empty_body_is_told(server: LiveServer) -> None:
    for path in ("/v1/embeddings", "/embed", "/api/embed"):
        assert b"expected one JSON object, got an empty body" in server("POST", path, b"").body
