"""A running stub server, and Locust runs against it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stub_server import OWN_TEXTS, Run, Stub, StubServer, start_locust


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A running stub server."""
    behaviour = Stub()
    server = StubServer(("127.0.0.1", 0), behaviour.handler())
    behaviour.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield behaviour
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def locust(tmp_path: Path) -> Callable[..., Run]:
    """Runs Locust to its end, for 2 s of which 0.3 s are warm-up, as in ``locust(host, "--task", "embed", ...)``."""

    def run(host: str, *arguments: str, texts: tuple[str, ...] = OWN_TEXTS) -> Run:
        process = start_locust(
            *(
                "--host",
                host,
                "--headless",
                "-u",
                "4",
                "-r",
                "100",
                "-t",
                "2s",
                "--warm-up-s",
                "0.3",
                "--only-summary",
            ),
            *texts,
            *("--csv", str(tmp_path / "out"), "--html", str(tmp_path / "report.html"), *arguments),
        )
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        return Run(process.returncode, output, tmp_path)

    return run
