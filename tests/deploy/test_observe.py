"""What is told of requests: traces, the log, metrics, spans."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from deploy.server.http.trace import trace_of
from deploy.server.limits.bounds import Settings
from deploy.server.limits.callers import Caller
from deploy.server.logs import ACCESS, _JsonFormatter, _TextFormatter
from deploy.server.metrics import Metrics
from deploy.server.observed import Observed
from deploy.server.service.request import Result
from tests.deploy.server_harness import LiveServer, make_manifest, raw, running

ROOT = Path(__file__).resolve().parents[2]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
HEADER = f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (HEADER, True),
        (f"cc-{TRACE}-{PARENT}-01-more", True),
        (f"cc-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-01-more", False),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE}-{PARENT}-1", False),
        (f"cc-{TRACE}-{PARENT}-01more", False),
        (f"{HEADER}\n", False),
        ("", False),
    ],
)
def test_traceparent(value: str, taken: bool) -> None:
    trace = trace_of({b"traceparent": value.encode()})
    assert (trace.id == TRACE) == taken
    assert trace.parent_id == (int(PARENT, 16) if taken else 0)
    assert trace.flags == int(taken)
    assert trace.trace_id
    assert trace.span_id
    assert trace.span_id != trace_of({}).span_id
    assert re.fullmatch(rf"00-{trace.id}-[0-9a-f]{{16}}-0{int(taken)}", trace.header[1].decode())


def test_the_trace_is_returned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(make_manifest(tmp_path), poison=5) as server:
        for path, status in (("/embed", 200), ("/nope", 404), ("/api/classify", 400)):
            reply = server("POST", path, {"inputs": "w1"}, traceparent=HEADER)
            assert reply.status == status
            version, trace, span, flags = reply.headers["traceparent"].split("-")
            assert (version, trace, flags) == ("00", TRACE, "01")
            assert span not in (PARENT, "0" * 16)
        assert "traceparent" not in server("POST", "/embed", {"inputs": "w1"}).headers
        # A fault has an id that is in the log, too, even if the client has sent none.
        reply = server("POST", "/embed", {"inputs": "w0"})
        assert reply.status == 424
        trace = reply.headers["traceparent"].split("-")[1]
        (record,) = (record for record in caplog.records if "/embed failed" in record.getMessage())
        assert record.fields == {"trace_id": trace}  # type: ignore[attr-defined]
        assert _TextFormatter("%(message)s").format(record).endswith(f" trace_id={trace}")
        assert json.loads(_JsonFormatter().format(record))["trace_id"] == trace


def test_access_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, ACCESS),
        running(make_manifest(tmp_path), Settings(port=0, access_log=True)) as server,
    ):
        server("POST", "/embed", {"inputs": ["w1", "w2"]}, traceparent=HEADER)
        reply = server("GET", "/" + 300 * "x")
    records = [json.loads(_JsonFormatter().format(item)) for item in caplog.records if item.name == ACCESS]
    embed, lost = records
    assert (embed["method"], embed["path"], embed["status"], embed["tokens"]) == ("POST", "/embed", 200, 6)
    assert (embed["level"], embed["trace_id"]) == ("INFO", TRACE)
    assert embed["ms"] >= embed["infer_ms"] > 0
    assert {"tokenize_ms", "queue_ms"} <= embed.keys()
    assert re.fullmatch(r'"POST /embed" 200 [0-9.]+ ms', embed["message"])
    assert (lost["status"], len(lost["path"])) == (404, 200)
    assert lost["trace_id"] == reply.headers["traceparent"].split("-")[1]


def sample(server: LiveServer, name: str) -> float:
    text = server("GET", "/metrics").body.decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return 0.0 if found is None else float(found[1])


def test_metrics(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path)) as server:
        assert server("POST", "/embed", {"inputs": ["w1", "w1 w2 w3"]}).status == 200
        assert sample(server, "serve_batch_padding_saved_tokens_sum") == 2
        assert sample(server, "serve_batch_padding_saved_tokens_count") == 1
        assert sample(server, "serve_batch_tokens_sum") == 8
        for stage in ("tokenize", "queue", "infer"):
            assert sample(server, f'serve_stage_seconds_count{{stage="{stage}"}}') == 1
        server("POST", "/v1/embeddings", {"input": "w1"})
        server("POST", "/v1/embeddings", {"input": 5})
        server("GET", "/v2/nope")
        for dialect, count in (("tei", 1), ("openai", 2), ("oip", 1)):
            assert sample(server, f'serve_dialect_seconds_count{{dialect="{dialect}"}}') == count, dialect
        raw(server.port, b"nonsense\r\n\r\n")
        raw(server.port, b"GET /live HTTP/1.1\r\n\r\n")
        for reason, count in (("invalid_request", 1), ("not_found", 1), ("malformed_http", 2)):
            assert sample(server, f'serve_refused_requests_total{{reason="{reason}"}}') == count, reason


@pytest.mark.parametrize("path", ["/embed", "/similarity", "/v1/embeddings", "/api/embed", "/v2/models/fake/infer"])
def test_server_timing(path: str, tmp_path: Path) -> None:
    text = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w1"]}
    body: dict[str, Any] = {"/v1/embeddings": {"input": "w1"}, "/v2/models/fake/infer": {"inputs": [text]}}.get(
        path, {}
    )
    body = body or {"inputs": {"source_sentence": "w1", "sentences": ["w2"]} if path == "/similarity" else "w1"}
    with running(make_manifest(tmp_path)) as server:
        reply = server("POST", path, body)
        assert reply.status == 200
        assert re.fullmatch(r"tokenize;dur=[\d.]+,queue;dur=[\d.]+,infer;dur=[\d.]+", reply.headers["server-timing"])


def test_spans() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from deploy.server.otel import Spans

    exporter = InMemorySpanExporter()
    spans = Spans("", "mine", exporter)
    request = Observed({b"traceparent": HEADER.encode()}, Metrics())
    request.endpoint = "/embed"
    caller = Caller()
    caller.result = Result([], 6, 0.25, 0.5, 1.0, request.started_s)
    spans.add(request, "POST", 200, caller)
    other = Observed({}, Metrics())
    spans.add(other, "GET", 503, Caller())
    # The one who asked does not record: neither does the server.
    spans.add(Observed({b"traceparent": f"00-{TRACE}-{PARENT}-00".encode()}, Metrics()), "GET", 200, Caller())
    spans.close()
    found = exporter.get_finished_spans()
    assert [span.name for span in found] == ["tokenize", "queue", "infer", "POST /embed", "GET other"]
    *stages, whole, failed = found
    assert whole.context.trace_id == int(TRACE, 16)
    assert whole.parent.span_id == int(PARENT, 16)
    assert whole.context.span_id == request.trace.span_id  # As the answer has it.
    assert whole.resource.attributes["service.name"] == "mine"
    assert whole.attributes == {
        "http.request.method": "POST",
        "http.route": "/embed",
        "http.response.status_code": 200,
        "deploy.tokens": 6,
    }
    assert stages[0].start_time == whole.start_time
    for span, seconds in zip(stages, (0.25, 0.5, 1.0), strict=True):
        assert span.parent.span_id == whole.context.span_id
        assert span.end_time - span.start_time == pytest.approx(1e9 * seconds, abs=10)
    assert stages[0].end_time == stages[1].start_time
    assert len({span.context.span_id for span in found}) == 5
    assert failed.context.trace_id == other.trace.trace_id
    assert (failed.parent, failed.status.is_ok) == (None, False)


def test_a_server_tells_of_its_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Any] = []

    class Spans:
        def __init__(self, endpoint: str, service_name: str) -> None:
            told.append((endpoint, service_name))

        def add(self, request: Observed, method: str, status: int, caller: Caller) -> None:
            told.append((method, request.endpoint, status, caller.result.tokens, request.trace.id))

        def close(self) -> None:
            told.append("closed")

    module = types.ModuleType("deploy.server.otel")
    module.Spans = Spans  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deploy.server.otel", module)
    with running(make_manifest(tmp_path), Settings(port=0, otlp_endpoint="http://x:4317")) as server:
        reply = server("POST", "/embed", {"inputs": "w1"})
        trace = reply.headers["traceparent"].split("-")[1]
    assert told == [("http://x:4317", "torch-ext"), ("POST", "/embed", 200, 3, trace), "closed"]


def test_nothing_of_it_is_imported_unless_asked() -> None:
    code = (
        "import sys; from deploy.server.app import App; from deploy.server.lifecycle import Server;"
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'grpc', 'deploy.server.otel'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_extra_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.server import tei_options
    from deploy.server.cli import parse

    for there in (False, True):
        monkeypatch.setattr(tei_options, "_can_trace", lambda there=there: there)
        monkeypatch.setenv("OTLP_ENDPOINT", "http://x:4317")
        arguments = parse(["model"])
        assert arguments.otlp_endpoint == ("http://x:4317" if there else None)
        assert any("[otel]" in line for line in arguments.idle) != there


_WARNING = """
import sys, warnings
from deploy.server.logs import start_logging
start_logging(sys.argv[1] == "json")
warnings.warn("layers: 1 in config.json, 2 in the weights", stacklevel=1)
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_warnings_are_lines_of_the_log(form: str) -> None:
    done = subprocess.run([sys.executable, "-c", _WARNING, form], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    if form == "json":
        assert json.loads(line)["message"] == "layers: 1 in config.json, 2 in the weights"
        assert json.loads(line)["level"] == "WARNING"
    else:
        assert line.endswith("WARNING deploy.server: layers: 1 in config.json, 2 in the weights")


def test_times_of_json_are_those_of_rfc_3339(monkeypatch: pytest.MonkeyPatch) -> None:
    """In UTC, whatever the zone of the machine is: collectors read no others."""
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        record = logging.LogRecord("a", logging.INFO, "", 0, "b", (), None)
        record.created = 1_700_000_000.25
        assert json.loads(_JsonFormatter().format(record))["timestamp"] == "2023-11-14T22:13:20.250Z"
    finally:
        monkeypatch.undo()
        time.tzset()


MANY = """
import logging, sys
from deploy.server.logs import start_logging
start_logging()
log = logging.getLogger("deploy.server")
for number in range(5000):
    log.warning("line %s", "x" * 100)
print("done", flush=True)
sys.stdin.readline()
log.warning("a long %s", "y" * 9000)
"""


def test_a_log_that_nobody_reads_holds_nobody_up() -> None:
    """A pipe has room for 64 KB; the server answered nobody, /health included, until somebody read."""
    process = subprocess.Popen(
        [sys.executable, "-c", MANY],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert select.select([process.stdout], [], [], 60)[0], "the process waits for its reader"
        assert process.stdout.readline() == b"done\n"
        read = b""
        while select.select([process.stderr], [], [], 0)[0]:
            read += os.read(process.stderr.fileno(), 1 << 16)
        read += process.communicate(b"\n", timeout=60)[1]
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
    *lines, told, last = read.decode().splitlines()
    found = re.search(r"WARNING deploy.server: (\d+) lines of the log were lost before this one", told)
    assert found is not None
    assert len(lines) > 100
    assert len(lines) + int(found[1]) == 5000
    assert last.endswith("a long " + "y" * 9000)
