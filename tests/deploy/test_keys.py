"""API keys: the file and the tool that writes it, who is let in, and what each may use in a minute."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.keys import Key, KeysError, digest_of, main, parse_keys, read_keys
from deploy.server.limits import meters as meters_module
from deploy.server.limits.bounds import Settings
from deploy.server.limits.keys import Keys
from deploy.server.limits.meters import Meters
from tests.deploy.server_harness import Client, LiveServer, make_manifest, running, wait_until
from tests.deploy.test_workers import ROOT, BundleMaker, workers

KEY = "txr_abcd1234_" + "x" * 43
OTHER = "txr_efgh5678_" + "y" * 43
LIMITED = "txr_ijkl9012_" + "z" * 43


def line(key: str, **limits: int) -> str:
    return " ".join([key[:12], f"sha256:{digest_of(key.encode()).hex()}", *(f"{n}={v}" for n, v in limits.items())])


def entry(key: str, requests: int | None = None, tokens: int | None = None) -> Key:
    return Key(key[:12], digest_of(key.encode()), requests, tokens)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_key_that_is_made_is_a_line_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    options = ["--file", str(path), "--name", "the shop", "--requests-per-minute", "60", "--tokens-per-minute", "900"]
    assert main(options) == 0
    made = capsys.readouterr().out.strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(path.read_text().rstrip("\n"))  # As an editor may leave it.
    assert main(["--file", str(path)]) == 0
    other = capsys.readouterr().out.strip()
    assert read_keys(str(path)) == (entry(made, 60, 900), entry(other))
    text = path.read_text()
    assert text.splitlines()[0].endswith("# the shop")
    assert made not in text
    assert made[12:] not in text
    assert main([]) == 0
    printed = capsys.readouterr()
    assert parse_keys(printed.err, "it") == (entry(printed.out.strip()),)


def test_a_key_of_ones_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{KEY}\n"))
    assert main(["--stdin"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert parse_keys(printed.err, "it") == (entry(KEY),)
    monkeypatch.setattr(sys, "stdin", io.StringIO("short\n"))
    assert main(["--stdin"]) == 2
    assert "expected a key of at least 32 printable ASCII characters" in capsys.readouterr().err
    assert main(["--file", "/proc/none"]) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected a line for each key, got none"),
        ("# nothing\n\n", "got none"),
        (KEY, "line 1: expected the first 12 characters of a key and sha256:HEX"),
        (f"{KEY} sha256:{'0' * 64}", "a key itself must not be here"),
        (f"{KEY[:12]} sha256:12", "line 1"),
        (
            f"# x\n{line(KEY, tokens=3)}",
            "line 2: expected requests_per_minute=N or tokens_per_minute=N, got 'tokens=3'",
        ),
        (line(KEY, tokens_per_minute=0), "got 'tokens_per_minute=0'"),
        (f"{line(KEY)}\n{line(KEY)}", "line 2: expected another prefix than txr_abcd1234"),
    ],
)
def test_a_wrong_file_is_told_of_and_no_key_is_quoted(text: str, problem: str) -> None:
    with pytest.raises(KeysError) as told:
        parse_keys(text, "keys")
    assert problem in str(told.value)
    assert KEY not in str(told.value)


# ---- budgets ---------------------------------------------------------------------------------------------------------


class Clock:
    """Time that a test moves."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters_module, "time", clock)
    return clock


@pytest.mark.parametrize("shared", [False, True])
def test_a_budget_fills_up_evenly_and_says_truly_when(clock: Clock, shared: bool) -> None:
    meters = Meters(Meters.make()) if shared else Meters()
    place = meters.place(digest_of(b"a"))
    assert meters.place(digest_of(b"b")) != place
    for _ in range(60):
        assert meters.take(place, 0, 1, 60) == 0.0
    assert meters.take(place, 0, 1, 60) == pytest.approx(1.0)
    assert meters.take(place, 1, 90, 100) == 0.0  # Another budget.
    clock.now_s += 0.5
    assert meters.take(place, 0, 1, 60) == pytest.approx(0.5)
    clock.now_s += 0.5
    assert meters.take(place, 0, 1, 60) == 0.0
    assert meters.take(place, 0, 1, 60) > 0.0
    meters.take(place, 0, -1, 60)
    assert meters.take(place, 0, 1, 60) == 0.0
    # A pause fills it, and no more than that.
    clock.now_s += 3600
    assert meters.take(place, 1, 100, 100) == 0.0
    assert meters.take(place, 1, 100, 100) == pytest.approx(60.0)


def test_what_is_more_than_a_minute_has_is_taken_from_a_full_budget(clock: Clock) -> None:
    meters = Meters()
    place = meters.place(digest_of(b"a"))
    assert meters.take(place, 1, 300, 100) == 0.0
    wait_s = meters.take(place, 1, 10, 100)
    assert wait_s == pytest.approx(126.0)
    clock.now_s += wait_s
    assert meters.take(place, 1, 10, 100) == 0.0
    assert meters.take(place, 1, 300, 100) == pytest.approx(60.0)


def test_processes_count_together(clock: Clock) -> None:
    fd = Meters.make()
    one, other = Meters(fd), Meters(os.dup(fd))
    place = one.place(digest_of(b"a"))
    assert other.place(digest_of(b"a")) == place
    assert one.take(place, 0, 6, 10) == 0.0
    assert other.take(place, 0, 6, 10) > 0.0


def test_keys_are_found_by_prefix_and_compared_by_hash() -> None:
    keys = Keys((entry(KEY), entry(OTHER)), "plain", Meters())

    def admitted(value: str) -> Any:
        return keys.admit({b"authorization": value.encode()})

    assert admitted(f"Bearer {KEY}").prefix == "txr_abcd1234"
    assert admitted(f"bearer  {OTHER}").prefix == "txr_efgh5678"
    assert admitted("Bearer plain") is None
    for wrong in ("", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:12]}", f"Bearer {KEY[:-1]}y", KEY):
        with pytest.raises(Exception, match="expected the header Authorization"):
            admitted(wrong)


# ---- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, clock: Clock) -> Iterator[LiveServer]:
    with running(make_manifest(tmp_path), Settings(port=0, api_key="plain", max_queue_tokens=50)) as live:
        live.app.admits([entry(KEY), entry(OTHER, requests=2), entry(LIMITED, tokens=20)])
        live.app.use(live.app.models)
        yield live


def test_requests_of_a_key_are_refused_in_the_form_of_each_dialect(server: LiveServer) -> None:
    for _ in range(4):
        assert server("POST", "/embed", {"inputs": "w1"}, **bearer(KEY)).status == 200
        assert server("POST", "/embed", {"inputs": "w1"}, **bearer("plain")).status == 200
    assert server("POST", "/embed", {"inputs": "w1"}).status == 401
    for _ in range(2):
        assert server("POST", "/embed", {"inputs": "w1"}, **bearer(OTHER)).status == 200
    body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w1"]}]}
    for path, sent, keys in (
        ("/embed", {"inputs": "w1"}, {"error", "error_type"}),
        ("/v1/embeddings", {"input": "w1"}, {"error"}),
        ("/v1/rerank", {"query": "w1", "documents": ["w1"]}, {"message", "detail"}),
        ("/v2/embed", {"texts": ["w1"]}, {"message", "detail"}),
        ("/v2/models/fake/infer", body, {"error"}),
        ("/api/embed", {"inputs": "w1"}, {"error"}),
    ):
        refused = server("POST", path, sent, **bearer(OTHER))
        assert (refused.status, set(refused.json)) == (429, keys)
        assert refused.headers["retry-after"] == "30"
    refused = server("POST", "/v1/embeddings", {"input": "w1"}, **bearer(OTHER))
    assert refused.json["error"]["type"] == "rate_limit_error"
    assert refused.kind == "rate_limit_exceeded"
    # What needs no key goes on.
    assert server("GET", "/health").status == 200


def test_tokens_of_a_key_are_charged_for_answers_only(
    server: LiveServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    full = {"inputs": ["w1 w2 w3"] * 4}  # 20 tokens.
    for _ in range(3):  # An error costs nothing.
        assert server("POST", "/embed", {"inputs": ["w1 w2 w3"] * 11}, **bearer(LIMITED)).status == 413
    with caplog.at_level(logging.WARNING, "deploy.server"):
        assert server("POST", "/embed", full, **bearer(LIMITED)).status == 200
        refused = server("POST", "/embed", full, **bearer(LIMITED))
    assert refused.status == 429
    assert refused.headers["retry-after"] == "60"
    assert "key txr_ijkl9012 has used up its 20 tokens a minute" in caplog.text
    assert LIMITED not in caplog.text
    server.app.admits([entry(LIMITED, tokens=20)])  # A file that is read again does not give it more.
    server.app.use(server.app.models)
    small = server("POST", "/embed", {"inputs": ""}, **bearer(LIMITED))
    assert (small.status, small.headers["retry-after"]) == (429, "6")
    clock.now_s += 6
    assert server("POST", "/embed", {"inputs": ""}, **bearer(LIMITED)).status == 200


def test_workers_share_budgets_and_a_changed_file(tiny_bundle: BundleMaker, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{line(KEY)}\n{line(OTHER, requests_per_minute=4)}\n")
    with workers(tiny_bundle("bert", "feature-extraction"), "--api-keys-file", path) as server:

        def ask(key: str) -> int:
            with Client(server.port) as client:
                return client("POST", "/embed", {"inputs": "a"}, **bearer(key)).status

        answers = [ask(OTHER) for _ in range(8)]  # Each on a connection of its own, so with any worker.
        assert answers == [200] * 4 + [429] * 4
        assert [ask(OTHER) for _ in range(40)] == [429] * 40  # By now both have refused some.
        assert ask(KEY) == 200
        assert ask(LIMITED) == 401
        # A broken file: nothing changes, also for a worker that is started later.
        path.write_text("nonsense\n")
        server.process.send_signal(signal.SIGHUP)
        assert server.process.stderr is not None
        for _ in range(2):  # Each worker warns once.
            assert "key txr_efgh5678 has used up its 4 requests a minute" in server.process.stderr.readline()
        told = server.process.stderr.readline()
        assert "nothing was loaded again" in told
        assert "--api-keys-file" in told
        os.kill(server.pids[0], signal.SIGKILL)
        wait_until(lambda: server_metric(server, "serve_worker_deaths_total") == 1, 20)
        wait_until(lambda: server_metric(server, "serve_workers") == 2, 20)
        assert [ask(KEY) for _ in range(4)] == [200] * 4
        assert ask(OTHER) == 429
        path.write_text(f"{line(LIMITED)}\n")
        server.process.send_signal(signal.SIGHUP)
        assert server.read_line().startswith("reloaded, ")
        assert [ask(key) for key in (KEY, OTHER, LIMITED)] == [401, 401, 200]
        assert server.stop()[0] == 0


def server_metric(server: Any, sample: str) -> float:
    value: float = server.metric(sample)
    return value


def test_a_wrong_file_ends_a_start(tiny_bundle: BundleMaker, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("nonsense\n")
    bundle = str(tiny_bundle("bert", "feature-extraction"))
    for more in ([], ["--workers", "1"]):
        command = [sys.executable, "-m", "deploy", "serve", bundle, "--port", "0", "--api-keys-file", str(path), *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert f"--api-keys-file: {path}, line 1: expected the first 12 characters" in done.stderr


def test_the_document_says_that_a_key_is_needed(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path), Settings(port=0, api_keys_file="keys")) as live:
        document = live("GET", "/openapi.json").json
    responses = document["paths"]["/embed"]["post"]["responses"]
    assert "unauthorized" in responses["401"]["description"]
    assert "rate_limit_exceeded" in responses["429"]["description"]
    assert json.dumps(document["components"]["securitySchemes"])
