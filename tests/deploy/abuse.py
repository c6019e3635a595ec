"""Abuse of a server by many connections, seeded: does an honest client notice, and does memory come back?

`python tests/deploy/abuse.py [BUNDLE] --seconds 60` starts `python -m deploy serve BUNDLE` where it may use 1 GB (a
control group where one can be made, else its memory is watched) and measures an honest client alone. Then 200
connections of another process send what they should not, while the honest client goes on. Without BUNDLE the engine is
one that sleeps 25 us for each token, so that the times do not depend on the machine. Exit code 1, and a line for each,
if:

- the server ends, or more memory is used than allowed;
- any answer has a 5xx status but 503, or the honest client gets anything but 200 and 429;
- the honest client's 99th percentile is above twice that of before plus a batch;
- 30 s later, memory is more than 10 % (or 16 MB) above where it was before;
- SIGTERM beside half-sent requests takes more than 5 s, or does not end with 0 and no traceback.

The file is longer than others: what is sent, who measures and what is checked are read together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATHS = {"feature-extraction": "/api/embed", "text-classification": "/api/classify", "fill-mask": "/api/fill-mask"}
WORDS = ("server", "the", "quota", "of", "a", "batch", "rounds", "down", "memory", "answers")
RESET = struct.pack("ii", 1, 0)
TOKEN_S = 25e-6
MAX_REQUEST_S = 20.0
SETTLE_S = 30.0
KEPT_BYTES = 16 << 20
"""What may stay without a model, of which a tenth is little: 8 MB were seen."""


# One kind of abuse is one function. Each gets a connection of its own, and returns what it has read.


class Abuser:
    """Sends abuse of random kinds, one connection after the other."""

    def __init__(self, port: int, path: str, mask: str, seed: int) -> None:
        self.port = port
        self.path = path.encode()
        self.mask = mask
        self.rng = random.Random(seed)
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    def texts(self, count: int, words: int) -> bytes:
        """A body of so many texts of so many words."""
        text = " ".join(self.rng.choices(WORDS, k=words)) + self.mask
        return json.dumps({"inputs": [text] * count}).encode()

    def request(self, body: bytes, *lines: bytes) -> bytes:
        fields = [b"Host: x", b"Content-Length: %d" % len(body), *lines]
        return b"POST %s HTTP/1.1\r\n%s\r\n\r\n%s" % (self.path, b"\r\n".join(fields), body)

    def large(self) -> bytes:
        """A request that is allowed, of a random shape."""
        count = self.rng.choice((20, 100, 400, 1024))
        return self.request(self.texts(count, self.rng.choice((5, 50, 300))))

    async def read(self, limit_s: float, most: int = 1 << 40) -> bytes:
        """What comes within a time; only what statuses need is kept."""
        kept = b""
        size = 0
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(limit_s):
                while size < most and (part := await self.reader.read(1 << 16)):
                    size += len(part)
                    kept += b"".join(re.findall(rb"HTTP/1\.1 \d{3} ", part))
        return kept

    def reset(self) -> None:
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    async def drip(self, data: bytes, step: int) -> bytes:
        for start in range(0, len(data), step):
            self.writer.write(data[start : start + step])
            await self.writer.drain()
            await asyncio.sleep(self.rng.uniform(0.01, 0.3))
        return await self.read(1)

    async def slow_head(self) -> bytes:
        return await self.drip(self.large()[:60], 2)

    async def slow_body(self) -> bytes:
        return await self.drip(self.request(self.texts(3, 20)), 30)

    async def answered(self) -> bytes:
        self.writer.write(self.large())
        return await self.read(MAX_REQUEST_S)

    async def left(self) -> bytes:
        self.writer.write(self.large())
        await asyncio.sleep(self.rng.uniform(0, 2))
        if self.rng.random() < 0.5:
            self.reset()
        return b""

    async def half(self) -> bytes:
        data = self.large()
        self.writer.write(data[: self.rng.randrange(len(data))])
        if self.rng.random() < 0.5:
            self.writer.write_eof()
            return await self.read(2)
        await asyncio.sleep(self.rng.uniform(0, 10))
        return b""

    async def half_closed(self) -> bytes:
        self.writer.write(self.large())
        self.writer.write_eof()
        return await self.read(MAX_REQUEST_S)

    async def pipelined(self) -> bytes:
        self.writer.write(self.request(self.texts(1, 5)) * self.rng.choice((5, 30, 300)))
        return await self.read(self.rng.uniform(0, 5))

    async def pipelined_large(self) -> bytes:
        self.writer.write(self.large() + self.large() + self.request(self.texts(1, 5)))
        return await self.read(self.rng.uniform(0, 5))

    async def trailers(self) -> bytes:
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n" % self.path
        self.writer.write(head + self.rng.choice((b"a: b\r\n" * 300_000, b"a" * 2_000_000)))
        return await self.read(3)

    async def headers(self) -> bytes:
        head = b"GET /health HTTP/1.1\r\nHost: x\r\n"
        self.writer.write(head + self.rng.choice((b"a: b\r\n" * 10_000, b"a: " + b"b" * 2_000_000)))
        return await self.read(3)

    async def never_read(self) -> bytes:
        self.reader._transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(15):
                for _ in range(20):
                    self.writer.write(self.request(self.texts(1024, 5)))
                    await self.writer.drain()
                await asyncio.sleep(15)
        return b""

    async def too_long(self) -> bytes:
        self.writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n" % self.path)
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(2):
                while True:
                    self.writer.write(b"x" * 65_536)
                    await self.writer.drain()
        return await self.read(1)

    async def nonsense(self) -> bytes:
        self.writer.write(self.rng.randbytes(self.rng.choice((10, 1000, 100_000))))
        return await self.read(2)

    async def offers(self) -> bytes:
        self.writer.write(self.request(self.texts(1, 5), b"Connection: Upgrade", b"UPGRADE: h2c") * 3)
        return await self.read(2)

    async def deep(self) -> bytes:
        self.writer.write(self.request(self.rng.choice((b"[" * 500_000, b'{"inputs":[' + b'"",' * 900_000 + b'""]}'))))
        return await self.read(3)

    KINDS: tuple[Callable[[Abuser], Awaitable[bytes]], ...] = (
        *(slow_head, slow_body, answered, left, half, half_closed, pipelined, pipelined_large, trailers, headers),
        *(never_read, too_long, nonsense, offers, deep),
    )

    async def run(self, until_s: float, seen: Counter[str]) -> None:
        """Abuses until a time, by `time.monotonic`."""
        while (left_s := until_s - time.monotonic()) > 0:
            kind = self.rng.choice(self.KINDS)
            found = b""
            try:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                seen["refused"] += 1
                await asyncio.sleep(0.1)
                continue
            try:
                async with asyncio.timeout(left_s):
                    found = await kind(self)
            except (OSError, asyncio.TimeoutError):
                pass
            finally:
                self.writer.transport.abort() if self.rng.random() < 0.3 else self.writer.close()
            seen[kind.__name__] += 1
            seen.update(f"status {status.decode()}" for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", found))


async def abuse(port: int, path: str, mask: str, connections: int, seconds: float, seed: int) -> Counter[str]:
    """All abusers at once; returns how many of each kind there were, and of each status."""
    seen: Counter[str] = Counter()
    until_s = time.monotonic() + seconds
    await asyncio.gather(
        *(Abuser(port, path, mask, zlib.crc32(b"%d/%d" % (seed, n))).run(until_s, seen) for n in range(connections))
    )
    return seen


# The honest client.


class Honest(threading.Thread):
    """Sends one text after the other over one connection, and again over another one if it is lost."""

    def __init__(self, port: int, path: str, mask: str) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.path = path
        self.body = json.dumps({"inputs": " ".join(WORDS) + mask})
        self.latencies_s: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.lost = 0
        self.ended = threading.Event()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while not self.ended.wait(0.02):
            begun_s = time.perf_counter()
            try:
                connection.request("POST", self.path, self.body)
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                self.lost += 1
                continue
            self.statuses[response.status] += 1
            if response.status == 200:
                self.latencies_s.append(time.perf_counter() - begun_s)

    def take(self, seconds: float) -> float:
        """The 99th percentile of the next seconds."""
        self.latencies_s.clear()
        time.sleep(seconds)
        return self.percentile()

    def percentile(self) -> float:
        found = sorted(self.latencies_s)
        return found[int(0.99 * len(found))] if found else float("inf")


# The server, within its memory.


def serve_fake() -> None:
    """Serves, on a free port, an engine that takes as long as a batch has tokens."""
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    from server_harness import make_manifest

    from deploy.server.app import App
    from deploy.server.lifecycle import Server
    from deploy.server.limits.bounds import Settings
    from deploy.server.service.batching import Batcher
    from deploy.server.service.tokens import TextTokenizer
    from deploy.server.sockets import listen
    from deploy.server.variants.choice import Choice

    row = memoryview(array("f", [1.0] * 384))

    class Sleeper:
        def cost(self, ids: Any) -> int:
            return len(ids)

        def rest(self) -> None:
            pass

        def run(self, ids: Sequence[Any], options: Sequence[Any]) -> Sequence[Any]:
            time.sleep(TOKEN_S * sum(map(len, ids)))
            return [row] * len(ids)

    with tempfile.TemporaryDirectory() as folder:
        manifest = dataclasses.replace(make_manifest(Path(folder), max_tokens=256), hidden_size=384)
        settings = Settings(port=0)
        batcher = Batcher(Sleeper, settings.max_batch_tokens, settings.max_queue_tokens)
        app = App(settings)
        app.use([app.model(manifest, TextTokenizer.from_manifest(manifest), batcher)])
        sock = listen("127.0.0.1", 0)
        port = sock.getsockname()[1]

        def announce() -> None:
            app.models[0].serves(Choice("fake", "only", {}, {}), "fake")
            print(f"serving a fake on http://127.0.0.1:{port} ", flush=True)

        server = Server(app, settings, announce)
        server.run(sockets=[sock])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(server.exit_code)


class Group:
    """A control group for one process, where one can be made; else `path` is None."""

    def __init__(self, limit_bytes: int) -> None:
        self.path: Path | None = None
        for parent, limit in (
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
            (Path("/sys/fs/cgroup"), "memory.max"),
        ):
            path = parent / f"abuse-{os.getpid()}"
            try:
                path.mkdir()
                (path / limit).write_text(str(limit_bytes))
            except OSError:
                with contextlib.suppress(OSError):
                    path.rmdir()
                continue
            self.path = path
            break

    def enter(self) -> None:
        """Puts this process in it."""
        if self.path is not None:
            (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.rmdir()


def memory_bytes(pid: int, field: str) -> int:
    """A figure of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def post(port: int, path: str, body: Any) -> float:
    """Sends a request and returns how long it took; fails unless it is answered with 200."""
    begun_s = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, json.dumps(body))
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"POST {path}: expected 200, got {response.status}: {answer[:300]!r}")
    return time.perf_counter() - begun_s


def stop(process: subprocess.Popen[str], port: int) -> tuple[int, float]:
    """SIGTERM beside half-sent requests; returns the exit code and how long it took."""
    half = []
    for data in (b"POST /em", b"POST /api/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{", b""):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(data)
        half.append(sock)
    time.sleep(0.3)
    begun_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    for sock in half:
        sock.close()
    return code, time.monotonic() - begun_s


def check(arguments: argparse.Namespace) -> list[str]:
    """Runs it all; returns what was broken."""
    command = [sys.executable, __file__, "--fake"]
    manifest = {"task": "feature-extraction"}
    if arguments.bundle is not None:
        command = [sys.executable, "-m", "deploy", "serve", str(arguments.bundle), "--port", "0", *arguments.options]
        manifest = json.loads((arguments.bundle / "manifest.json").read_bytes())
    path = PATHS[manifest["task"]]
    mask = " " + manifest["special_tokens"]["mask"]["token"] if manifest["task"] == "fill-mask" else ""
    limit_bytes = arguments.memory_mb << 20
    broken = []
    group = Group(limit_bytes)
    with tempfile.TemporaryFile("w+") as errors, contextlib.closing(group):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONMALLOC": "malloc"},  # As `deploy serve` sets it.
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=group.enter,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r" on http://127\.0\.0\.1:(\d+)", line)
            if found is None:
                errors.seek(0)
                raise SystemExit(f"no start-up line: {errors.read()[-2000:]}")
            port = int(found[1])
            where = "watched" if group.path is None else f"in {group.path}"
            print(
                f"{line.strip()}\nmemory: at most {arguments.memory_mb} MB, {where}; seed {arguments.seed}", flush=True
            )

            # Batches of every size have run, and so has a large request.
            words = list(WORDS) * 8
            long_text = " ".join(words) + mask
            for _ in range(3):
                batch_s = post(port, path, {"inputs": [long_text] * 24})
            post(port, path, {"inputs": [long_text] * 400})
            honest = Honest(port, path, mask)
            honest.start()
            time.sleep(1)
            alone_s = honest.take(arguments.alone_s)
            before = memory_bytes(process.pid, "VmRSS")

            honest.latencies_s.clear()
            abuser = [sys.executable, __file__, "--abuse", str(port), path, mask, str(arguments.connections)]
            abuser += [str(arguments.seconds), str(arguments.seed)]
            done = subprocess.run(abuser, check=True, stdout=subprocess.PIPE, text=True)
            under_s = honest.percentile()
            seen: dict[str, int] = json.loads(done.stdout)
            print(json.dumps(seen))
            honest.ended.set()
            honest.join(60)

            if process.poll() is not None:
                return [f"the server has ended with exit code {process.returncode}"]
            peak = memory_bytes(process.pid, "VmHWM")
            begun_s = time.monotonic()
            most = before + max(before // 10, KEPT_BYTES)
            while (after := memory_bytes(process.pid, "VmRSS")) > most:
                if time.monotonic() - begun_s > SETTLE_S:
                    broken.append(f"memory: expected at most {most >> 20} MB afterwards, got {after >> 20} MB")
                    break
                time.sleep(0.5)
            statuses = {int(name.removeprefix("status ")): n for name, n in seen.items() if name.startswith("status ")}
            print(
                f"honest: {dict(honest.statuses)}, {honest.lost} connections lost, p99 alone {1e3 * alone_s:.1f} ms, "
                f"under abuse {1e3 * under_s:.1f} ms, a batch {1e3 * batch_s:.1f} ms\n"
                f"memory: {before >> 20} MB before, {peak >> 20} MB at most, {after >> 20} MB after"
            )
            if peak > limit_bytes:
                broken.append(f"memory: expected at most {arguments.memory_mb} MB, got {peak >> 20} MB")
            for status in (*statuses, *honest.statuses):
                if status >= 500 and status != 503:
                    broken.append(f"an answer with status {status}")
            others = set(honest.statuses) - {200, 429}
            if others or not honest.statuses[200]:
                broken.append(f"honest client: expected 200 (or 429), got {dict(honest.statuses)}")
            if under_s > arguments.p99_factor * alone_s + batch_s:
                broken.append(
                    f"honest client: expected a p99 of at most {arguments.p99_factor:g} x {1e3 * alone_s:.1f} + "
                    f"{1e3 * batch_s:.1f} ms, got {1e3 * under_s:.1f} ms"
                )
            code, took_s = stop(process, port)
            errors.seek(0)
            text = errors.read()
            print(f"SIGTERM: exit code {code} after {took_s:.1f} s")
            if code or took_s > 5 or "Traceback" in text:
                broken.append(f"SIGTERM: expected 0 within 5 s, got {code} after {took_s:.1f} s\n{text[-2000:]}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return broken


def verdict(broken: Sequence[str]) -> int:
    """Prints what was broken; the exit code is 1 if anything was."""
    for line in broken:
        print(f"BROKEN: {line}")
    print("broken" if broken else "all kept")
    return int(bool(broken))


def main(argv: Sequence[str]) -> int:
    """Runs it; the exit code is 1 if anything was broken."""
    if argv[:1] == ["--abuse"]:
        port, path, mask, connections, seconds, seed = argv[1:]
        os.nice(10)
        print(json.dumps(asyncio.run(abuse(int(port), path, mask, int(connections), float(seconds), int(seed)))))
        return 0
    if argv[:1] == ["--fake"]:
        serve_fake()
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path, nargs="?", help="folder written by python -m deploy export")
    parser.add_argument("--seconds", type=float, default=60, help="of abuse (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--memory-mb", type=int, default=1024, help="of the server (default: %(default)s)")
    parser.add_argument("--alone-s", type=float, default=10, help="how long to measure before (default: %(default)s)")
    parser.add_argument("--p99-factor", type=float, default=2, help="(default: %(default)s)")
    arguments, arguments.options = parser.parse_known_args(argv)
    return verdict(check(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
