"""A running stub server, and Locust runs against it."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stub_server import OWN_TEXTS, Run, Stub, StubServer, start_locust

from loadtest.options import KEY_VARIABLE


@contextlib.contextmanager
def running_stub() -> Iterator[Stub]:
    """A stub server within a block."""
    behaviour = Stub()
    server = StubServer(("127.0.0.1", 0), behaviour.handler())
    behaviour.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key comes from outside. Set rather than deleted: what --api-key puts there is taken back after the test."""
    monkeypatch.setenv(KEY_VARIABLE, "")


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A running stub server."""
    with running_stub() as behaviour:
        yield behaviour


@pytest.fixture
def stubs() -> Iterator[list[Stub]]:
    """Four of them, for runs at the same time."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running_stub()) for _ in range(4)]


@pytest.fixture
def locust(tmp_path: Path) -> Callable[..., Run]:
    """Runs Locust to its end, for 2 s of which 0.3 s are warm-up, as in ``locust(host, "--task", "embed", ...)``.

    Runs at the same time, from threads, get folders of their own.
    """

    def run(host: str, *arguments: str, texts: tuple[str, ...] = OWN_TEXTS) -> Run:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        process = start_locust(
            *("--host", host, "--headless", "-u", "4", "-r", "100", "-t", "2s", "--warm-up-s", "0.3", "--only-summary"),
            *("--csv", str(folder / "out"), "--html", str(folder / "report.html"), *texts, *arguments),
        )
        try:
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        return Run(process.returncode, output, folder)

    return run
