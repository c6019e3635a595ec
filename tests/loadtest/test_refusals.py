"""What is refused before any load is made, in words that help; and that nothing else ends with the code of a limit."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.openloop import commands
from loadtest.openloop.commands import main
from loadtest.openloop.options import Settings, check_effects
from loadtest.openloop.schema import check_output
from loadtest.options import CannotStartError, request_headers
from loadtest.probe import check_host


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": "steady", "spike_s": 1.0}, "--spike-s has no effect with --shape steady"),
        ({"rate_to": 9.0}, "--rate-to has no effect with --shape steady"),
        ({"shape": "diurnal", "rate_to": 9.0, "steps": 3}, "--steps has no effect with --shape diurnal"),
        ({"shape": "at-once", "rate": 5.0}, "--rate has no effect with --shape at-once"),
        ({"shape": "at-once", "duration_s": 5.0}, "--duration-s has no effect with --shape at-once"),
        ({"shape": "at-once", "warm_up_s": 5.0}, "--warm-up-s has no effect with --shape at-once"),
        ({"count": 5}, "--count has no effect with --shape steady"),
        ({"trace_speed": 2.0}, "--trace-speed has no effect without --trace"),
        ({"trace": "t", "rate": 2.0}, "--rate has no effect with --trace"),
        ({"trace": "t", "shape": "steps"}, "--shape has no effect with --trace"),
        ({"top_k": 3}, "--top-k has no effect with --task embed"),
        ({"mask_token": "[M]"}, "--mask-token has no effect with --task embed"),
        ({"task": "tei-embed", "encoding_format": "base64"}, "--encoding-format has no effect with --task tei-embed"),
    ],
)
def test_options_without_an_effect(values: dict[str, Any], message: str) -> None:
    settings = Settings.from_values({"rate": 1.0, **values})
    with pytest.raises(CannotStartError, match=message):
        check_effects(values, settings)


def test_a_search_has_no_shape() -> None:
    settings = Settings.from_values({"rate": 1.0})
    check_effects({"rate": 1.0, "rate_to": 9.0, "duration_s": 12.0, "process": "constant"}, settings, search=True)
    for name in ("steps", "spike_s", "day_s", "count"):
        with pytest.raises(CannotStartError, match="has no effect in a search"):
            check_effects({name: 3}, settings, search=True)
    with pytest.raises(CannotStartError, match="--trace-speed has no effect without --trace"):
        check_effects({"trace_speed": 3}, settings, search=True)


@pytest.mark.parametrize(
    "values",
    [
        {"rate": 1.0, "shape": "spike", "rate_to": 2.0, "spike_s": 1.0, "spike_every_s": 5.0},
        {"rate": 1.0, "shape": "steps", "rate_to": 2.0, "steps": 3},
        {"rate": 1.0, "shape": "diurnal", "rate_to": 2.0, "day_s": 60.0},
        {"shape": "at-once", "count": 5},
        {"trace": "t", "trace_speed": 2.0, "warm_up_s": 1.0},
        {"rate": 1.0, "task": "fill-mask", "top_k": 3, "mask_token": "[M]"},
        {"rate": 1.0, "task": "oip-fill-mask", "mask_token": "[M]"},
        {"rate": 1.0, "task": "openai", "encoding_format": "base64"},
    ],
)
def test_options_with_an_effect(values: dict[str, Any]) -> None:
    check_effects(values, Settings.from_values(values))


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("http://user:secret@127.0.0.1:1", "expected no user, password"),
        ("http://user@127.0.0.1:1", "expected no user, password"),
        ("http://127.0.0.1:1/?a=1", "expected no user, password, query"),
        ("http://127.0.0.1:1/#x", "expected no user, password, query or fragment"),
        ("http://127.0.0.1:99999", "expected a URL"),
        ("http://b\u00fccher.example", "expected a URL"),
        ("http://a b", "expected a URL"),
        ("http://a\r\nX: y", "expected a URL"),
    ],
)
def test_addresses(host: str, message: str) -> None:
    with pytest.raises(CannotStartError, match=message) as raised:
        check_host(host)
    assert "secret" not in str(raised.value)


def test_keys_that_fit_no_header_are_not_shown() -> None:
    assert "Authorization" not in request_headers("") | request_headers(" \n")
    # A file of one line, as a secret of a cluster is one.
    assert request_headers("abc\n") == {**request_headers(""), "Authorization": "Bearer abc"}
    for key in ("secret\nX: y", "secret word", "secret\u20ac"):
        with pytest.raises(CannotStartError, match=r"--api-key .* expected ASCII") as raised:
            request_headers(key)
        assert "secret" not in str(raised.value)


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers the same to everything, and what it was sent."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        stopped = threading.Event()

        def serve() -> None:
            while not stopped.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(5)
                        seen.append(connection.recv(65536))
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        finally:
            stopped.set()
            thread.join()


def test_redirects_are_not_followed(capsys: pytest.CaptureFixture[str]) -> None:
    """The load would not follow them; urllib would take the key along to another server."""
    with (
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}") as (other, seen),
        answering(
            b"HTTP/1.1 302 Found\r\nLocation: %b/x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % other.encode()
        ) as (host, _),
    ):
        assert main(["run", "--host", host, "--rate", "1", "--api-key", "secret"]) == 2
        printed = capsys.readouterr().err
        assert f"{host}/ready redirects to {other}/x, and the load follows no redirect: pass the address" in printed
        assert not seen


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"]
)
def test_what_answers_is_no_server(answer: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(answer) as (host, _):
        assert main(["run", "--host", host, "--rate", "1"]) == 2
        printed = capsys.readouterr().err
        assert f"loadtest: no answer from {host}/ready: " in printed
        assert "Traceback" not in printed


def test_a_result_that_cannot_be_written_is_found_before_the_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_output(tmp_path / "new" / "run.json")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "run.json"):
        for command in ("run", "knee"):
            limit = ("--slo-p99-ms", "1")
            assert main([command, "--host", "http://127.0.0.1:1", "--rate", "1", *limit, "-o", str(path)]) == 2
            assert f"loadtest: -o: cannot write {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bind", "127.0.0.1:99999", "--expect-workers", "1"), "--bind: expected HOST:PORT"),
        (("--expect-workers", "1", "--expect-workers-max-wait-s", "inf"), "--expect-workers-max-wait-s: expected more"),
        (("--expect-workers", "1", "--expect-workers-max-wait-s", "nan"), "--expect-workers-max-wait-s: expected more"),
    ],
)
def test_teams(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "_learn", lambda settings: None)
    assert main(["run", "--host", "http://127.0.0.1:1", "--rate", "1", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_leader_at_an_impossible_port(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "--join", "127.0.0.1:99999"]) == 2
    assert "expected HOST:PORT of a leader" in capsys.readouterr().err


def test_a_fault_of_the_load_test_is_no_missed_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(commands, "read_result", fail)
    assert main(["compare", "a", "b"]) == 2
    printed = capsys.readouterr().err
    assert "RuntimeError: a bug" in printed
    assert "loadtest: void: this is a fault of the load test" in printed
