"""A route is one row: everything that the server says and does about a path follows from it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import FakeEngine, LiveServer, make_manifest

from deploy.bundle.fields import TASKS
from deploy.server import endpoints
from deploy.server.api import ROUTES
from deploy.server.api.route import Context, Dialect, Route
from deploy.server.errors import ERRORS
from deploy.server.http.bodies import encode
from deploy.server.http.exchange import Response
from deploy.server.limits.bounds import Limits, Settings
from deploy.server.limits.callers import Caller

SERVER = Path(endpoints.__file__).parent


class CountRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Texts to count."""

    texts: list[str]


class CountResponse(msgspec.Struct):
    """How many there are, in tokens."""

    tokens: int


async def count(context: Context, request: CountRequest, caller: Caller) -> Response:
    result = await context.service.embed(request.texts, caller, context.limits)
    return Response(encode({"tokens": result.tokens}))


SHOUTED = Dialect("shouted", "/x/", lambda error: error.message.upper().encode())
ROW = Route(
    method="POST",
    path="/x/count-tokens",
    summary="Count tokens",
    handler=count,
    dialect=SHOUTED,
    task="feature-extraction",
    request=CountRequest,
    example={"texts": ["of {model}"]},
    answer=CountResponse,
    limits=lambda settings: Limits(body_bytes=200, inputs=2, chars=10),
    secured=True,
    tag="counting",
)


@pytest.fixture
def server(tmp_path: Path) -> Any:
    engine = FakeEngine()
    engine.gate.set()
    live = LiveServer(make_manifest(tmp_path), Settings(port=0, api_key="sesame"), engine, None, (*ROUTES, ROW))
    assert live.ready.wait(10)
    yield live
    assert live.stop() == 0


def test_a_row_is_all_that_a_route_needs(server: LiveServer) -> None:
    key = {"Authorization": "Bearer sesame"}
    path = ROW.path
    reply = server("POST", path, {"texts": ["w1", "w2 w3"]}, **key)
    assert (reply.status, reply.json) == (200, {"tokens": 7})
    # Its limits, its type, its key and its dialect.
    for body, status, words in (
        ({"texts": ["w1"] * 3}, 413, b"AT MOST 2 INPUTS"),
        ({"texts": ["w" * 300]}, 413, b"AT MOST 200 BYTES"),
        ({"text": []}, 422, b"TEXT"),
    ):
        reply = server("POST", path, body, **key)
        assert reply.status == status
        assert words in reply.body
    assert server("POST", path, {"texts": ["w1"]}).status == 401
    reply = server("GET", path)
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert b"NO SUCH PATH" in server("GET", "/x/nope").body
    # Its description, and its label.
    document = server("GET", "/openapi.json").json
    operation = document["paths"][path]["post"]
    assert operation["operationId"] == "x_count_tokens"
    assert operation["tags"] == ["counting"]
    content = operation["requestBody"]["content"]["application/json"]
    assert content["example"] == {"texts": ["of fake"]}
    assert "CountRequest" in content["schema"]["$ref"]
    assert document["components"]["schemas"].keys() >= {"CountRequest", "CountResponse"}
    assert {"401", "413", "422", "429", "503"} <= operation["responses"].keys()
    assert b'serve_requests_total{endpoint="/x/count-tokens",status="200"} 1.0' in server("GET", "/metrics").body


def test_the_endpoint_of_a_task_is_found_in_the_rows(tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, path=f"/moved{row.path}") for row in ROUTES]
    for row in rows:
        expected = {"feature-extraction": "embed", "text-classification": "classify", "fill-mask": "fill-mask"}
        expected |= {"token-classification": "token-classify", "question-answering": "answer"}
        for task, name in expected.items():
            message = endpoints.wrong_task(row, rows, make_manifest(tmp_path, task))
            if row.task in (None, task):
                assert message is None
            else:
                assert message is not None
                assert message.endswith(f"POST to /moved/api/{name}")


def test_rows_are_one_for_each_method_and_path_and_name_errors_that_exist() -> None:
    keys = [(row.method, row.path, row.task) for row in ROUTES]
    assert len(set(keys)) == len(keys)
    for task in TASKS:
        rows = endpoints.rows_of(ROUTES, task, "a/model")
        assert len({row.name for row in rows}) == len(rows) == len({(row.method, row.path) for row in ROUTES})
    assert {kind for row in ROUTES for kind in row.error_kinds} <= set(ERRORS)
    for row in ROUTES:
        assert (row.request is None) == (row.limits(Settings()) == Limits())
        assert row.secured or row.task is None


def test_no_path_is_named_outside_of_the_rows() -> None:
    """Nor is a row's answer made anywhere else."""
    paths = [row.path for row in ROUTES if row.task is not None and row.path != "/"]
    for file in SERVER.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for path in paths:
            assert f'"{path}"' not in text, f"{file.name} names {path}"


def test_the_service_knows_nothing_of_http() -> None:
    files = list(SERVER.glob("service/*.py"))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        for word in ("from ..http", "from ..route", "from ..app", "uvicorn", "scope"):
            assert word not in text, f"{file.name}: {word}"


def test_files_are_short() -> None:
    for file in SERVER.rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file.name
