"""Every limit is where people and programs look for it; what the description allows is answered, or above a limit."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import VOCABULARY, WIDTH, LiveServer, make_manifest, running

from deploy.server.cli import _parser
from deploy.server.limits.bounds import BOUNDS, Settings
from deploy.server.service import TextTokenizer

ROOT = Path(__file__).resolve().parents[2]
SMALL = Settings(
    port=0,
    max_inputs=7,
    max_chars=40,
    max_body_bytes=900,
    max_queue_tokens=60,
    max_values=6 * WIDTH,
    max_memory_mb=9,
    accept_token_ids=True,
)
TASKS = {"feature-extraction": "/api/embed", "text-classification": "/api/classify", "fill-mask": "/api/fill-mask"}
MAX_TOKENS = 12


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").partition("\n## Limits\n")[2]
    lines = re.findall(r"^\| ([a-z_]+) \| (.*) \| (.*) \| (.*?) ?\| (.*) \|$", text, re.MULTILINE)
    rows = [line for line in lines if line[0] != "limit"]
    expected = []
    for name, row in BOUNDS.items():
        limit = row.fixed if row.setting is None else getattr(Settings(), row.setting)
        amount = f"{limit} {row.unit}" if limit is not None else f"half of what is available, {row.unit}"
        option = "" if row.option is None else f"`{row.option}`"
        expected.append((name, row.what, amount, option, str(row.status or "closed")))
    assert rows == expected


def test_every_limit_that_can_be_set_has_an_option_that_tells_its_default() -> None:
    defaults = Settings()
    actions = {option: action for action in _parser()._actions for option in action.option_strings}
    for row in BOUNDS.values():
        if row.option is None:
            assert row.fixed is not None
            continue
        assert row.setting is not None
        action = actions[row.option]
        assert action.default == getattr(defaults, row.setting)
        assert action.help is not None
        assert "(default: %(default)s)" in action.help or "(default: half" in action.help


def make(schema: Any, parts: Any, rng: random.Random) -> Any:
    """A value that a schema allows, often at its bounds."""
    if "$ref" in schema:
        return make(parts[schema["$ref"].rpartition("/")[2]], parts, rng)
    if "anyOf" in schema:
        return make(rng.choice(schema["anyOf"]), parts, rng)
    if "const" in schema or "enum" in schema:
        return rng.choice(schema.get("enum") or [schema["const"]])
    kind = schema["type"]
    if kind == "object":
        names = [name for name in schema["properties"] if name in schema["required"] or rng.random() < 0.5]
        return {name: make(schema["properties"][name], parts, rng) for name in names}
    if kind == "array":
        low, high = schema["minItems"], schema["maxItems"]
        return [make(schema["items"], parts, rng) for _ in range(rng.choice((low, high, rng.randint(low, high))))]
    if kind == "string":
        mask = "[MASK]" if "MASK" in schema.get("pattern", "") else ""
        room = schema.get("maxLength", 20) - len(mask)
        pieces = rng.choices(["w1 ", " ", "é", "\U0001f600", '"', "\\", "\n", "\x01", "w99 ", "[PAD]"], k=room)
        text = "".join(pieces)[: rng.choice((0, room, rng.randint(0, room)))]
        at = rng.randint(0, len(text))
        made = f"{text[:at]}{mask}{text[at:]}"
        assert re.search(schema.get("pattern", ""), made)
        return made
    if kind == "integer":
        low, high = schema.get("minimum", -5), schema.get("maximum", 5)
        return rng.choice((low, high, rng.randint(low, high)))
    return {"boolean": rng.random() < 0.5, "null": None}[kind]


def named(message: str) -> bool:
    """Whether a message tells of a limit."""
    return "this limit" in message or "tokens" in message


@pytest.mark.parametrize("task", TASKS)
def test_what_the_description_allows_is_answered_or_above_a_limit_with_a_name(task: str, tmp_path: Path) -> None:
    rng = random.Random(7)
    with running(make_manifest(tmp_path, task, MAX_TOKENS), SMALL) as server:
        document = server("GET", "/openapi.json").json
        parts = document["components"]["schemas"]
        paths = [TASKS[task], *(["/v1/embeddings"] if task == "feature-extraction" else [])]
        for path in paths:
            schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            found: dict[int, int] = {}
            for _ in range(400):
                body = make(schema, parts, rng)
                if body.get("dimensions") is not None:  # One field by two names.
                    body.pop("output_dimension", None)
                reply = server("POST", path, json.dumps(body, ensure_ascii=rng.random() < 0.5).encode())
                found[reply.status] = found.get(reply.status, 0) + 1
                if reply.status != 200:
                    assert reply.status in (413, 400 if path == "/v1/embeddings" else 422), (body, reply.body)
                    assert named(reply.json["error"]["message"]), (body, reply.body)
            assert found[200] > 20, found


def test_the_description_has_every_limit(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path, max_tokens=MAX_TOKENS), SMALL) as server:
        document = server("GET", "/openapi.json").json
        limits = document["x-limits"]
        assert set(limits) == set(BOUNDS)
        for name, row in BOUNDS.items():
            assert limits[name]["limit"] == (row.fixed if row.setting is None else getattr(SMALL, row.setting))
            assert limits[name]["option"] == row.option
        parts = document["components"]["schemas"]
        text = {"type": "string", "pattern": r"^[^\u0000]*$"}
        texts = {"type": "array", "items": text, "minItems": 1, "maxItems": 60}
        whole = parts["TeiTokenizeRequest"]["properties"]["inputs"]["anyOf"]
        assert whole[0] == {**text, "maxLength": 40}
        assert parts["EmbedRequest"]["properties"]["inputs"]["anyOf"] == [text, texts]
        ids = {"minimum": 0, "maximum": len(VOCABULARY) - 1, "type": "integer"}
        some = {"type": "array", "items": ids, "minItems": 1, "maxItems": MAX_TOKENS - 2}
        several = {"type": "array", "items": some, "minItems": 1, "maxItems": 60}
        assert parts["OpenAIEmbeddingsRequest"]["properties"]["input"]["anyOf"] == [text, texts, some, several]
        assert parts["FillMaskRequest"]["properties"]["top_k"]["maximum"] == BOUNDS["top_k"].fixed
        assert r"\[MASK\]" in parts["FillMaskRequest"]["properties"]["inputs"]["anyOf"][0]["pattern"]
        assert "x-bound" not in json.dumps(document)


def test_whole_numbers_are_integers_however_they_are_written(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path, max_tokens=MAX_TOKENS), Settings(port=0, accept_token_ids=True)) as server:
        same = [
            b'{"input": [[2, 9, 3], [2, 3]], "dimensions": 8}',
            b'{"input": [[2.0, 9e0, 3], [2, 3.0]], "dimensions": 8.0}',
        ]
        first, second = (server("POST", "/v1/embeddings", body) for body in same)
        assert first.status == 200
        assert second.body == first.body
        for body in (b'{"input": [2.5]}', b'{"input": [1e400]}', b'{"input": 2.0}', b'{"input": ["w1", 2.0]}'):
            assert server("POST", "/v1/embeddings", body).status == 400


def refused(server: LiveServer, body: Any, path: str = "/api/embed") -> str:
    reply = server("POST", path, body)
    assert (reply.status, reply.kind) == (413, "too_large")
    return str(reply.json["error"]["message"])


def test_one_more_than_each_limit_is_told_with_its_option(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path, max_tokens=MAX_TOKENS), SMALL) as server:
        assert server("POST", "/api/embed", {"inputs": ["w1"] * 6}).status == 200
        reply = server("POST", "/tokenize", {"inputs": "w" * 41})
        assert (reply.status, reply.json["error_type"]) == (413, "Validation")
        assert "at most 40 characters, got 41; --max-chars sets this limit" in reply.json["error"]
        for body, limit, asked, option in (
            ({"inputs": [""] * 61}, 60, 61, "--max-queue-tokens"),
            ({"inputs": ["w1"] * 7}, 6 * WIDTH, 7 * WIDTH, "--max-values"),
            ({"inputs": ["w1 " * 12] * 6}, 60, 72, "--max-queue-tokens"),
            (b'{"inputs": "w1"' + b" " * 885 + b"}", 900, 901, "--max-body-bytes"),
        ):
            assert re.search(rf"at most {limit} .* got {asked}; {option} sets this limit", refused(server, body))


def test_a_long_query_is_not_tokenised_for_more_texts_than_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode_pairs = TextTokenizer.encode_pairs

    def watched(self: TextTokenizer, pairs: Any, *arguments: Any, **options: Any) -> Any:
        encoded.extend(pairs)
        return encode_pairs(self, pairs, *arguments, **options)

    monkeypatch.setattr(TextTokenizer, "encode_pairs", watched)
    manifest = make_manifest(tmp_path, "text-classification", max_tokens=MAX_TOKENS)
    manifest = dataclasses.replace(manifest, labels=("fits",))
    settings = dataclasses.replace(SMALL, max_body_bytes=1 << 20, max_queue_tokens=1000, max_values=1 << 20)
    query = "w1 " * 10_000
    with running(manifest, settings) as server:
        for path in ("/rerank", "/v1/rerank"):
            key = "texts" if path == "/rerank" else "documents"
            reply = server("POST", path, {"query": query, key: ["w2"] * 600})
            assert reply.status == 413
            expected = r"at most 16777216 characters in one request, got 18001200; this limit is fixed"
            assert re.search(expected, reply.body.decode())
            assert not encoded
        reply = server("POST", "/rerank", {"query": query, "texts": ["w2"] * 500})
        assert reply.status == 413
        assert "at most 1000 tokens in one request, got more; --max-queue-tokens" in reply.json["error"]
        assert len(encoded) * MAX_TOKENS <= 1000 + 3 * MAX_TOKENS
