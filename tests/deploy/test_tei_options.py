"""Options and environment of text-embeddings-inference."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import FakeEngine, LiveServer, make_manifest, running, wait_until

from deploy.bundle import BundleError, Prompts
from deploy.server import main as command
from deploy.server.limits.bounds import Settings
from deploy.server.logs import log_as_json
from deploy.server.tei_options import fit_manifest


def given(monkeypatch: pytest.MonkeyPatch, *argv: str, **environment: str) -> argparse.Namespace:
    """What a command line and an environment come to."""
    found: list[argparse.Namespace] = []
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command, "serve", lambda arguments, process: found.append(arguments) or 0)
    assert command.main(argv) == 0
    return found[0]


OURS: dict[str, tuple[str, Any]] = {
    "--model-id": ("model", "7"),
    "--served-model-name": ("served_model_name", "7"),
    "--max-batch-tokens": ("max_batch_tokens", 7),
    "--max-batch-requests": ("max_batch_requests", 7),
    "--max-concurrent-requests": ("max_concurrent_requests", 7),
    "--max-client-batch-size": ("max_inputs", 7),
    "--payload-limit": ("max_body_bytes", 7),
    "--tokenization-workers": ("tokenization_workers", 7),
    "--default-prompt": ("default_prompt", "7"),
    "--default-prompt-name": ("default_prompt_name", "7"),
    "--pooling": ("pooling", "7"),
    "--api-key": ("api_key", "7"),
}


@pytest.mark.parametrize("name", OURS)
def test_an_option_is_ours_and_so_is_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    field, value = OURS[name]
    folder = [] if field == "model" else ["a"]
    assert getattr(given(monkeypatch, *folder, name, "7"), field) == value
    monkeypatch.delenv("MODEL_ID", raising=False)
    variable = name.strip("-").replace("-", "_").upper()
    assert getattr(given(monkeypatch, *folder, **{variable: "7"}), field) == value
    if field != "model":  # An option goes before a variable.
        other = given(monkeypatch, *folder, name, "8", **{variable: "7"})
        assert getattr(other, field) in (8, "8", ["8"])


def test_origins_are_those_that_browsers_send(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several = given(monkeypatch, "a", CORS_ALLOW_ORIGIN="https://a.example, http://localhost:3000")
    assert several.cors_allow_origin == ["https://a.example", "http://localhost:3000"]
    assert given(monkeypatch, "a", "--cors-allow-origin", "*").cors_allow_origin == ["*"]
    for text in ("a.example", "https://a.example/", "https://a.example/page", "localhost:3000", ""):
        with pytest.raises(SystemExit):
            given(monkeypatch, "a", "--cors-allow-origin", text)
        assert "expected * or an origin such as https://app.example.com" in capsys.readouterr().err


def test_flags_and_what_containers_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found = given(monkeypatch, "a", HOSTNAME="f00d", HF_TOKEN="x")
    assert (found.host, found.auto_truncate, found.json_output) == ("127.0.0.1", True, False)
    assert given(monkeypatch, "a", "--hostname", "0.0.0.0").host == "0.0.0.0"
    for value, truncate in (("false", False), ("true", True), ("0", False)):
        assert given(monkeypatch, "a", "--auto-truncate", value).auto_truncate is truncate
        assert given(monkeypatch, "a", AUTO_TRUNCATE=value).auto_truncate is truncate
    monkeypatch.delenv("AUTO_TRUNCATE")
    assert given(monkeypatch, "a", "--auto-truncate", "--json-output").json_output is True
    assert given(monkeypatch, "a", JSON_OUTPUT="true").json_output is True


def test_ours_go_before_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = given(monkeypatch, "a", "--max-inputs", "5", "--max-client-batch-size", "7", MODEL_ID="b")
    assert (found.model, found.max_inputs) == ("a", 5)
    default = Settings().max_batch_tokens
    found = given(monkeypatch, "a", f"--max-batch-tokens={default}", MAX_BATCH_TOKENS="7")
    assert found.max_batch_tokens == default
    assert given(monkeypatch, "a", "--max-batch-tok", "9", MAX_BATCH_TOKENS="7").max_batch_tokens == 9  # Abbreviated.
    assert given(monkeypatch, "a", API_KEY="theirs", DEPLOY_API_KEY="ours").api_key == "ours"


def test_what_has_no_counterpart_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(monkeypatch, "a")
    assert capsys.readouterr().err == ""
    given(monkeypatch, "a", "--revision", "main", "--disable-spans", "--dtype", "float16", PROMETHEUS_PORT="9000")
    (line,) = capsys.readouterr().err.splitlines()
    for name in ("--revision", "--disable-spans", "PROMETHEUS_PORT", "--dtype float16"):
        assert name in line


def test_wrong_values(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, environment, words in (
        (["a", "--auto-truncate", "perhaps"], {}, "--auto-truncate: expected true or false, got 'perhaps'"),
        (["a"], {"MAX_BATCH_TOKENS": "many"}, "MAX_BATCH_TOKENS: expected a number from 1, got 'many'"),
        (["a"], {"MAX_BATCH_TOKENS": "0"}, "MAX_BATCH_TOKENS: expected a number from 1, got '0'"),
        (["a", "--default-prompt", "x", "--default-prompt-name", "y"], {}, "expected one of them, got both"),
        ([], {}, "expected MODEL"),
    ):
        for name in ("MAX_BATCH_TOKENS", "MODEL_ID"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(SystemExit):
            given(monkeypatch, *argv, **environment)
        assert words in capsys.readouterr().err


def test_prompts_pooling_and_dtype_are_those_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = dataclasses.replace(make_manifest(tmp_path), prompts=Prompts({"query": "w9 "}))

    def fitted(*argv: str) -> Any:
        return fit_manifest(manifest, given(monkeypatch, "a", *argv))

    assert fitted() == manifest
    assert fitted("--default-prompt-name", "query").prompts.default_text == "w9 "
    assert fitted("--default-prompt", "w8 ").prompts.default_text == "w8 "
    assert fitted("--default-prompt", "w9 ").prompts == Prompts({"query": "w9 "}, "query")
    with pytest.raises(BundleError, match=r"expected one of the bundle's prompts \(query\)"):
        fitted("--default-prompt-name", "nope")
    assert fitted("--pooling", "mean") == manifest
    with pytest.raises(BundleError, match="--pooling cls: the bundle was made and verified with mean"):
        fitted("--pooling", "cls")
    (fake,) = manifest.variants.values()
    manifest = dataclasses.replace(manifest, variants={"torch_ext-bf16": fake, "onnx-fp32": fake})
    for dtype, variant in (("float32", "onnx-fp32"), ("bfloat16", "torch_ext-bf16"), ("float16", None)):
        arguments = given(monkeypatch, "a", "--dtype", dtype)
        fit_manifest(manifest, arguments)
        assert arguments.variant in (variant, *(("auto",) if variant is None else ()))


def test_a_batch_has_at_most_so_many_texts(tmp_path: Path) -> None:
    gate, engine = threading.Event(), FakeEngine()
    server = LiveServer(make_manifest(tmp_path), Settings(port=0, max_batch_requests=3), engine)
    server.batcher.max_batch_texts = 3
    assert server.ready.wait(10)
    try:
        waiting = threading.Thread(target=server, args=("POST", "/embed", {"inputs": ["w1"] * 10}))
        waiting.start()
        wait_until(lambda: engine.batches)
        engine.gate.set()
        waiting.join()
        assert max(map(len, engine.batches)) == 3
        assert server("GET", "/info").json["max_batch_requests"] == 3
    finally:
        gate.set()
        assert server.stop() == 0


def test_a_name_of_its_own_and_lines_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(make_manifest(tmp_path), Settings(port=0, served_model_name="mine")) as server:
        info = server("GET", "/info").json
        assert (info["model_id"], info["served_model_name"]) == ("fake", "mine")
        assert server("POST", "/v1/embeddings", {"input": "w1"}).json["model"] == "mine"
        assert server("GET", "/v2/models/mine").status == 200
    root = logging.getLogger()
    handler = logging.StreamHandler(sys.stdout)
    root.addHandler(handler)
    formatters = [(known, known.formatter) for known in root.handlers]
    try:
        log_as_json()
        logging.getLogger("deploy.server").error("a %s", "word")
    finally:
        for known, formatter in formatters:
            known.setFormatter(formatter)
        root.removeHandler(handler)
    line = json.loads(capsys.readouterr().out)
    assert (line["level"], line["target"], line["message"]) == ("ERROR", "deploy.server", "a word")
