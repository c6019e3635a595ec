"""What SECURITY.md claims and no other file tests, and that the tests exist that it names."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.server.api import ROUTES
from deploy.server.limits.bounds import Settings
from deploy.server.logs import ACCESS, _JsonFormatter, _TextFormatter
from tests.deploy.server_harness import make_manifest, raw, running

ROOT = Path(__file__).resolve().parents[2]


def test_the_tests_exist_that_are_named() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[a-z_/]+\.py)::(test_[a-z0-9_]+)`", text)
    assert len(named) > 20
    assert text.count("::test_") == len(named)
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {name}"


_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir", "ctypes.dlopen", "subprocess.Popen"):
        _opened.append(f"{event} {arguments[0]!r}")


@pytest.fixture(scope="module")
def opened() -> Callable[[], list[str]]:
    """Tells what this process has opened since it was asked before; hooks stay until its end."""
    sys.addaudithook(_note)

    def since() -> list[str]:
        global _opened
        found, _opened = _opened or [], []
        return found

    return since


NAMES = (
    "/etc/passwd",
    "../../../../etc/passwd",
    "..%2f..%2fetc/passwd",
    "file:///etc/passwd",
    "tokenizer.json",
    "C:\\x",
)


def test_no_request_opens_a_file(tmp_path: Path, opened: Callable[[], list[str]]) -> None:
    """No path of a request is one of the disk, nor anything else that it says; /metrics reads /proc."""
    with running(make_manifest(tmp_path), Settings(port=0, access_log=True)) as server:

        def ask() -> None:
            for row in ROUTES:
                path = row.path.replace("{model}", "fake")
                server(row.method, path, None if row.request is None else dict(row.example))
            for name in NAMES:
                for path in (
                    f"/{name}",
                    f"/docs/{name}",
                    f"/v1/models/{name}",
                    f"/v2/models/{name}/infer",
                    f"/?file={name}",
                ):
                    raw(server.port, f"GET {path} HTTP/1.0\r\n\r\n".encode())
                    raw(server.port, f"GET http://x{path} HTTP/1.0\r\n\r\n".encode())
                server("POST", "/embed", {"inputs": name, "prompt_name": name})
                server("POST", "/v1/embeddings", {"input": name, "model": name, "user": name})
                server("POST", "/tokenize", {"inputs": name, "prompt_name": name}, X_Forwarded_Prefix=name)

        ask()  # Modules that are imported for the first request are read once.
        opened()
        ask()
        assert [found for found in opened() if "'/proc/" not in found] == []


def test_a_request_cannot_write_lines_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, ACCESS),
        running(make_manifest(tmp_path), Settings(port=0, access_log=True), infinite=5) as server,
    ):
        for path in ("/a%0d%0aERROR%20forged", "/a%00b", "/%1b[31m", "/\u2028x", "/%e2%80%a8", "/%85"):
            raw(server.port, f"GET {path} HTTP/1.0\r\n\r\n".encode())
        raw(server.port, b"POST /embed HTTP/1.0\r\nContent-Length: 16\r\n\r\n" + b'{"inputs": "w0"}')
    assert len([record for record in caplog.records if record.name == ACCESS]) == 6  # One was no HTTP.
    for record in caplog.records:
        for formatter in (_TextFormatter("%(message)s"), _JsonFormatter()):
            record.exc_info = record.exc_text = None  # What the server itself has to say may have lines.
            assert len(formatter.format(record).splitlines()) == 1
            assert formatter.format(record).isprintable()
