"""Random and damaged requests against served models: bytes that are no HTTP, no JSON, no gzip, no tensors.

    pip install hypothesis
    python tests/deploy/fuzz.py [--seconds 600] [--seed N]

Each case is drawn from a generator of random numbers: half of the time from one with a seed, which is quick, and half
of it from one of hypothesis, which looks for the smallest case that fails. `test_fuzz.py` runs a few hundred without
it. What fails: an answer of 500, one that is no HTTP, a server that does not answer any more, a line of the log about a
fault.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import logging
import random
import re
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deploy.bundle.fields import TASKS  # noqa: E402
from deploy.engines.open import load_engine  # noqa: E402
from deploy.folder.describe import describe_folder  # noqa: E402
from deploy.server.api import ROUTES  # noqa: E402
from deploy.server.app import rows_of  # noqa: E402
from deploy.server.limits.bounds import Settings  # noqa: E402
from tests.deploy.conftest import make_tiny_model  # noqa: E402
from tests.deploy.server_harness import LiveServer  # noqa: E402

__all__ = ["body", "check_body", "check_bytes", "connection", "serving"]

Random = random.Random
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n")
FAULTS = {500, 502}

WORDS = (
    *("a", "list", "of", "[MASK]", "\u4f60\u597d", "\U0001f600", "\u0000", "\ud800", "e\u0301", "\u202e", ""),
    *("x" * 300, " " * 40),
)
NUMBERS = (0, 1, -1, 2, 3, 100, 2**31, -(2**63), 2**64, 1.5, 1e308, -0.0, 1e-320)
KEYS = [
    "inputs",
    "input",
    "parameters",
    "query",
    "texts",
    "documents",
    "text",
    "source",
    "source_sentence",
    "sentences",
    "truncate",
    "normalize",
    "dimensions",
    "encoding_format",
    "top_k",
    "top_n",
    "ids",
    "name",
    "shape",
    "datatype",
    "data",
    "outputs",
    "id",
    "binary_data",
    "binary_data_size",
    "question",
    "context",
    "raw_scores",
    "aggregation_strategy",
    "max_seq_len",
    "doc_stride",
]


def value(rng: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(8 if depth < 4 else 5)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind < 5:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(6)))
    if kind < 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {rng.choice(KEYS): value(rng, depth + 1) for _ in range(rng.randrange(5))}


def changed(rng: Random, given: Any, depth: int = 0) -> Any:
    """A body with a part of it replaced, left out, doubled or added."""
    if rng.random() < 0.12:
        return value(rng, depth)
    if isinstance(given, dict):
        found = {name: changed(rng, item, depth + 1) for name, item in given.items() if rng.random() > 0.08}
        if rng.random() < 0.25:
            found[rng.choice(KEYS)] = value(rng, depth + 1)
        return found
    if isinstance(given, (list, tuple)):
        return [changed(rng, item, depth + 1) for item in given for _ in range(rng.choice((1, 1, 1, 1, 0, 2)))]
    if isinstance(given, str) and rng.random() < 0.3:
        return f"{given} {rng.choice(WORDS)}"
    return given


def damaged(rng: Random, data: bytes) -> bytes:
    """Bytes with some of them replaced, cut, doubled or added."""
    found = bytearray(data)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
        place = rng.randrange(len(found) + 1)
        kind = rng.randrange(5)
        if kind == 0 and found:
            found[place % len(found)] = rng.randrange(256)
        elif kind == 1:
            del found[place : place + rng.randrange(1, 9)]
        elif kind == 2:
            found[place:place] = found[place : place + rng.randrange(1, 40)]
        elif kind == 3:
            found[place:place] = rng.choice(
                (b"\r\n", b"\0", b"\n", b" ", b":", b"\xff", b"0\r\n\r\n", b'"', b"[", b"{", b"\\u")
            )
        else:
            del found[place:]
    return bytes(found)


def body(rng: Random, rows: list[tuple[str, Any]]) -> tuple[str, bytes, dict[bytes, bytes]]:
    """A path, a body for it that is more or less right, and headers."""
    path, example = rng.choice(rows)
    given = changed(rng, example)
    data = json.dumps(given, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    headers: dict[bytes, bytes] = {}
    if path.endswith("/infer") and rng.random() < 0.6:  # Binary tensors.
        texts = [rng.choice(WORDS).encode("utf-8", "surrogatepass") for _ in range(rng.randrange(4))]
        tail = b"".join(
            struct.pack("<I", len(text) if rng.random() < 0.9 else rng.getrandbits(32)) + text for text in texts
        )
        size = len(tail) if rng.random() < 0.9 else rng.choice((0, 1, -1, 2**40))
        tensor = {"name": rng.choice(("text", "text", "text_pair", "x")), "shape": [len(texts)], "datatype": "BYTES",
                  "parameters": {"binary_data_size": size}}  # fmt: skip
        head = json.dumps({"inputs": [changed(rng, tensor) if rng.random() < 0.3 else tensor]}).encode()
        length = len(head) if rng.random() < 0.9 else rng.choice((0, -5, 10**9, len(head) + 3))
        headers[b"inference-header-content-length"] = b"%d" % length
        data = head + tail
    if rng.random() < 0.4:
        data = damaged(rng, data)
    if rng.random() < 0.15:
        data = gzip.compress(data)
        data = damaged(rng, data) if rng.random() < 0.5 else data
        headers[b"content-encoding"] = rng.choice((b"gzip", b"gzip", b"GZIP", b"deflate"))
    if rng.random() < 0.1:
        headers[b"x-request-timeout-ms"] = rng.choice((b"1", b"0", b"-1", b"99999999999", b"x", b"5000"))
    if rng.random() < 0.1:
        headers[b"accept-encoding"] = b"gzip"
    return path, data, headers


def request(path: str, data: bytes, headers: dict[bytes, bytes]) -> bytes:
    """A request with a body, which closes its connection."""
    fields = {b"host": b"x", b"connection": b"close", b"content-length": b"%d" % len(data), **headers}
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n".encode() + lines + b"\r\n" + data


def connection(rng: Random, rows: list[tuple[str, Any]]) -> list[bytes]:
    """What a client sends on one connection, in parts: requests that are chunked, pipelined, and damaged."""
    found = b""
    for _ in range(rng.choice((1, 1, 2, 3))):
        path, data, headers = body(rng, rows)
        if rng.random() < 0.4:
            chunks = b""
            while data:
                size = rng.randrange(1, 200)
                chunks += b"%x%s\r\n%s\r\n" % (len(data[:size]), rng.choice((b"", b"", b";a=b")), data[:size])
                data = data[size:]
            data = chunks + b"0\r\n" + rng.choice((b"", b"x: y\r\n")) + b"\r\n"
            headers[b"transfer-encoding"] = rng.choice((b"chunked", b"chunked", b"gzip, chunked", b"identity"))
            fields = {b"host": b"x", **headers}
            lines = b"".join(name + b": " + value + b"\r\n" for name, value in fields.items())
            found += f"POST {path} HTTP/1.1\r\n".encode() + lines + b"\r\n" + data
        else:
            headers[b"connection"] = rng.choice((b"keep-alive", b"close", b"upgrade"))
            if headers[b"connection"] == b"upgrade":
                headers[b"upgrade"] = b"h2c"
            found += request(path, data, headers)
    if rng.random() < 0.7:
        found = damaged(rng, found)
    parts = []
    while found:
        size = rng.choice((len(found), len(found), rng.randrange(1, 2000)))
        parts.append(found[:size])
        found = found[size:]
    return parts or [b"\r\n"]


def check_bytes(port: int, parts: list[bytes], timeout_s: float = 15.0) -> list[int]:
    """Sends bytes and ends; what comes until the server closes has to be answers. Their statuses."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as sock, contextlib.suppress(ConnectionError):
        for part in parts:
            sock.sendall(part)
        with contextlib.suppress(OSError):  # The server has closed it already.
            sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(1 << 16):
            answer += data
    assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:200]
    found = [int(status) for status in STATUS.findall(answer)]
    assert not FAULTS & set(found), answer[:2000]
    return found


def check_body(port: int, path: str, data: bytes, headers: dict[bytes, bytes]) -> int:
    """Sends one request; it has to be answered, and not by a fault of the server. Its status."""
    found = [status for status in check_bytes(port, [request(path, data, headers)]) if status != 100]
    assert found, f"{path}: no answer"
    return found[0]


@contextlib.contextmanager
def serving(model: Path, task: str) -> Iterator[tuple[LiveServer, list[tuple[str, Any]]]]:
    """A server in this process, and its routes that take a body, with the examples."""
    manifest = describe_folder(str(model), task)
    variant = manifest.variant("torch_ext-fp32")
    load: Callable[[], Any] = lambda: load_engine(manifest, variant, 1)[0]  # noqa: E731
    engine: Any = None
    settings = Settings(port=0, request_timeout_s=2.0, keep_alive_s=2.0, max_body_bytes=1 << 20, cache_mb=1)
    server = LiveServer(manifest, settings, engine, load)
    try:
        assert server.ready.wait(60)
        fill = {"{model}": manifest.model.name, "{mask}": "[MASK]"}
        examples = []
        for row in rows_of(ROUTES, task, manifest.model.name):
            if row.request is not None and row.task in (None, task):
                text = json.dumps(row.example)
                for name, word in fill.items():
                    text = text.replace(name, word)
                examples.append((row.path, json.loads(text)))
        yield server, examples
        assert server("GET", "/health").status == 200
        assert server("POST", *examples[0]).status == 200
    finally:
        server.terminate()
        server.thread.join(30)


class _Exceptions(logging.Handler):
    """Keeps what is said of exceptions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.found.append(self.format(record))


def statuses(port: int, rows: list[tuple[str, Any]], rng: Random, told: list[str]) -> list[int]:
    """Tries a case, and returns what came.

    Args:
        port: Of the server.
        rows: See `serving`.
        rng: Makes the case.
        told: What the log has said of faults.

    Raises:
        AssertionError: It fails.
    """
    found = check_bytes(port, connection(rng, rows)) if rng.random() < 0.3 else [check_body(port, *body(rng, rows))]
    assert not told, told
    return found


def many(port: int, rows: list[tuple[str, Any]], seconds: float, number: int, told: list[str]) -> Counter[int]:
    """Tries many cases for a time, 1,000 in a second; see `hunt`."""
    count: Counter[int] = Counter()
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        number += 1
        try:
            count.update(statuses(port, rows, random.Random(number), told))
        except Exception:
            print(f"failed with random.Random({number})")
            raise
    return count


def hunt(port: int, rows: list[tuple[str, Any]], seconds: float, number: int, told: list[str]) -> Counter[int]:
    """Tries cases that hypothesis chooses for a time, and returns how often which status came.

    Args:
        port: Of the server.
        rows: See `serving`.
        seconds: How long.
        number: Seed.
        told: What the log has said of faults.

    Raises:
        AssertionError: A case fails; hypothesis has looked for the smallest.
    """
    from hypothesis import HealthCheck, Phase, given, seed, settings, strategies

    end_s = time.monotonic() + seconds
    count: Counter[int] = Counter()

    @seed(number)
    @settings(
        max_examples=1_000_000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategies.randoms(use_true_random=False))
    def run(rng: Random) -> None:
        count.update(statuses(port, rows, rng, told))
        if time.monotonic() > end_s:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        run()
    return count


def main() -> int:
    """Runs, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    told = _Exceptions()
    logging.getLogger().addHandler(told)
    for task in TASKS:
        with tempfile.TemporaryDirectory() as folder:
            model = make_tiny_model(Path(folder) / "m", "bert", task)
            with serving(model, task) as (server, rows):
                given = (server.port, rows, arguments.seconds / len(TASKS) / 2, arguments.seed, told.found)
                found = many(*given) + hunt(*given)
        print(f"{task}: {sum(found.values())} answers: {dict(sorted(found.items()))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
