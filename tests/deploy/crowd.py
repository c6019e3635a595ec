"""Does a crowd of connections that do nothing, or next to nothing, slow another client down?

    python tests/deploy/crowd.py [BUNDLE] [--seconds 60]

serves BUNDLE (without it an engine that sleeps 25 us for each token) and measures a client that sends one text after
the other: in turns alone, and beside 600 idle connections, 300 that drip a request byte by byte, and 200 that have sent
half of one. Connections that the server closes are opened again. The machine's own noise is in both. Exit code 1: the
99th percentile beside them is more than 20 ms above that alone, or the client got anything but 200.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.deploy.abuse import Honest, verdict  # noqa: E402

PATH = "/api/embed"
BODY = json.dumps({"inputs": ["the quota of a server"] * 20}).encode()
HEAD = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(BODY))
DRIP_S = 0.5


async def member(port: int, data: bytes, drips: bool) -> None:
    """A connection that sends so much and then nothing, or one byte after the other; for ever."""
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                if drips:
                    for byte in data:
                        writer.write(bytes((byte,)))
                        await writer.drain()
                        await asyncio.sleep(DRIP_S)
                else:
                    writer.write(data)
                await reader.read()
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.1)


async def crowd(port: int, counts: Sequence[int]) -> None:
    """Everybody, until the process is ended."""
    idle, dripping, half = counts
    data = HEAD + BODY
    kinds = [(b"", False)] * idle + [(data, True)] * dripping + [(data[: len(data) // 2], False)] * half
    await asyncio.gather(*(member(port, sent, drips) for sent, drips in kinds))


def percentile(latencies_s: Sequence[float], part: float) -> float:
    """Of times, in ms."""
    return 1e3 * sorted(latencies_s)[int(part * len(latencies_s))]


def check(bundle: Path | None, seconds: float, turns: int, counts: Sequence[int], options: Sequence[str]) -> list[str]:
    """Runs it; returns what was broken."""
    command = [sys.executable, str(ROOT / "tests/deploy/abuse.py"), "--fake"]
    if bundle is not None:
        command = [sys.executable, "-m", "deploy", "serve", str(bundle), "--port", "0", *options]
    with tempfile.TemporaryFile() as errors:
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.search(r" on http://127\.0\.0\.1:(\d+)", line)
            if found is None:
                raise SystemExit(f"no start-up line: {line}")
            port = int(found[1])
            print(line.strip(), flush=True)
            honest = Honest(port, PATH, "")
            honest.start()
            time.sleep(2)
            taken: dict[bool, list[float]] = {False: [], True: []}
            for turn in range(2 * turns):
                crowded = bool(turn % 2)
                others = None
                if crowded:
                    arguments = [str(port), *map(str, counts)]
                    others = subprocess.Popen([sys.executable, __file__, "--crowd", *arguments])
                    time.sleep(5)  # They connect.
                honest.take(seconds / (2 * turns))
                taken[crowded] += honest.latencies_s
                if others is not None:
                    others.kill()
                    others.wait()
                    time.sleep(1)
            honest.ended.set()
            honest.join(60)
        finally:
            server.terminate()
            server.wait(40)
    alone_ms, beside_ms = (percentile(taken[crowded], 0.99) for crowded in (False, True))
    for name, crowded in (("alone", False), ("beside them", True)):
        times = taken[crowded]
        print(f"{name}: {len(times)} requests, p50 {percentile(times, 0.5):.1f}, p99 {percentile(times, 0.99):.1f} ms")
    broken = []
    if beside_ms > alone_ms + 20:
        broken.append(f"p99: expected at most {alone_ms:.1f} + 20 ms, got {beside_ms:.1f} ms")
    if set(honest.statuses) != {200} or honest.lost:
        broken.append(f"expected 200 only, got {dict(honest.statuses)}, {honest.lost} connections lost")
    return broken


def main(argv: Sequence[str]) -> int:
    """Runs it; the exit code is 1 if anything was broken."""
    if argv[:1] == ["--crowd"]:
        os.nice(10)
        asyncio.run(crowd(int(argv[1]), [int(count) for count in argv[2:]]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path, nargs="?", help="folder written by python -m deploy export")
    parser.add_argument("--seconds", type=float, default=60, help="of measuring (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="alone and beside them (default: %(default)s)")
    parser.add_argument(
        "--counts", type=int, nargs=3, default=(600, 300, 200), metavar=("IDLE", "DRIPPING", "HALF"), help="of them"
    )
    arguments, options = parser.parse_known_args(argv)
    return verdict(check(arguments.bundle, arguments.seconds, arguments.turns, arguments.counts, options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
