"""Mixed load while workers are killed and the bundle is loaded again; every answer is compared.

    python tests/deploy/chaos.py BUNDLE --seconds 1800

serves BUNDLE (embeddings) with workers, and runs beside each other: clients with kept connections, with one connection
for each request, with large requests, that pipeline, that read and write slowly, that leave, and that send nonsense;
kill -9 of a worker and a reload every few seconds. It prints what was answered, lost and wrong, what the server's
processes hold, and how that grows.

A request is *lost* if its client was there and got neither an answer nor an error of HTTP: the connection was reset or
closed, or nothing came for 30 s. 503 and 429 are answers: nothing was done, and the client may ask again. Whoever keeps
a connection may find it closed before a request was sent on it, or as it is sent; a request that was sent on a
connection that had been idle and got no byte back is sent once more on a new one, as clients of HTTP do (RFC 9110,
9.2.2, as far as computing a vector twice does no harm), and counted as *retried*. `--strict` counts those as lost.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0
TEXTS = ["a", "the name of the file", "returns a list of values " * 4, "one more " * 30]


class Run:
    """What happened so far; all clients write to it."""

    def __init__(self, port: int, seed: int, strict: bool) -> None:
        self.port = port
        self.seed = seed
        self.strict = strict
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.expected: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def count(self, what: str, problem: str = "") -> None:
        with self._lock:
            self.counts[what] += 1
            if problem and len(self.problems) < 20:
                self.problems.append(f"{what}: {problem}")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def ask(self, connection: http.client.HTTPConnection, texts: Sequence[str], who: str) -> bool:
        """One request, compared; whether the connection may be used again."""
        kept = connection.sock is not None
        for turn in range(2):
            try:
                connection.request("POST", "/embed", json.dumps({"inputs": texts}))
                answer = connection.getresponse()
                body = answer.read()
                break
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
                connection.close()
                if not kept or turn or self.strict:
                    self.count("lost", f"{who}: {error!r}")
                    return False
                self.count("retried")
            except Exception as error:
                connection.close()
                self.count("lost", f"{who}: {error!r}")
                return False
        if answer.status == 200:
            rows = json.loads(body)
            fine = len(rows) == len(texts) and all(
                max(abs(one - other) for one, other in zip(row, self.expected[text], strict=True)) < 0.01
                for row, text in zip(rows, texts, strict=True)
            )
            self.count("answered") if fine else self.count("wrong", f"{who}: {texts!r:.80}")
        elif answer.status in (429, 503):
            self.count(f"refused {answer.status}")
        else:
            self.count("wrong", f"{who}: {answer.status} {body!r:.80}")
        return answer.getheader("connection", "").lower() != "close"


def keeping(run: Run, chance: random.Random) -> None:
    """Many requests on one connection."""
    with contextlib.closing(run.connect()) as connection:
        for _ in range(chance.randint(1, 60)):
            if run.stop.is_set() or not run.ask(connection, [chance.choice(TEXTS)], "keeping"):
                return
            if chance.random() < 0.1:
                time.sleep(chance.random())


def single(run: Run, chance: random.Random) -> None:
    """A connection for each request."""
    with contextlib.closing(run.connect()) as connection:
        run.ask(connection, [chance.choice(TEXTS)], "single")


def large(run: Run, chance: random.Random) -> None:
    """Requests of many texts, whose answers come in parts."""
    with contextlib.closing(run.connect()) as connection:
        run.ask(connection, chance.choices(TEXTS[:3], k=chance.randint(50, 400)), "large")
    time.sleep(0.5)


def slow(run: Run, chance: random.Random) -> None:
    """A request byte by byte, and an answer that is read slowly."""
    text = chance.choice(TEXTS[:3])
    body = json.dumps({"inputs": [text]}).encode()
    data = b"POST /embed HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    try:
        with socket.create_connection(("127.0.0.1", run.port), timeout=PATIENCE_S) as sock:
            for start in range(0, len(data), 20):
                sock.sendall(data[start : start + 20])
                time.sleep(0.02 + 0.05 * chance.random())
            got = b""
            while part := sock.recv(256):
                got += part
                time.sleep(0.01)
    except OSError as error:
        run.count("lost", f"slow: {error!r}")
        return
    head, _, answer = got.partition(b"\r\n\r\n")
    status = head[9:12].decode()
    if status == "200":
        row = json.loads(answer)[0]
        fine = max(abs(one - other) for one, other in zip(row, run.expected[text], strict=True)) < 0.01
        run.count("answered") if fine else run.count("wrong", f"slow: {text!r}")
    elif status in ("429", "503"):
        run.count(f"refused {status}")
    else:
        run.count("lost", f"slow: {got[:80]!r}")


def leaving(run: Run, chance: random.Random) -> None:
    """Leaves somewhere in the middle; nobody is there who could lose anything."""
    body = json.dumps({"inputs": chance.choices(TEXTS, k=50)}).encode()
    data = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", run.port), timeout=PATIENCE_S) as sock:
        sock.sendall(data[: chance.randint(1, len(data))])
        time.sleep(0.2 * chance.random())
    run.count("left")
    time.sleep(0.2)


def nonsense(run: Run, chance: random.Random) -> None:
    """What is no request."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", run.port), timeout=PATIENCE_S) as sock:
        sock.sendall(chance.randbytes(chance.randint(1, 2000)) + b"\r\n\r\n")
        sock.recv(4096)
    run.count("nonsense")
    time.sleep(0.5)


CLIENTS: Sequence[tuple[Callable[[Run, random.Random], None], int]] = (
    (keeping, 3),
    (single, 2),
    (large, 1),
    (slow, 2),
    (leaving, 1),
    (nonsense, 1),
)


def repeat(client: Callable[[Run, random.Random], None], run: Run, chance: random.Random) -> None:
    while not run.stop.is_set():
        try:
            client(run, chance)
        except Exception as error:
            run.count("wrong", f"{client.__name__}: {error!r}")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def resident_mb(pid: int) -> float:
    """What a process and its children hold."""
    total = 0
    for each in (pid, *children(pid)):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(points: Sequence[tuple[float, float]]) -> float:
    """MB a minute, by least squares, of the second half: what a server takes at first does not count."""
    points = points[len(points) // 2 :]
    if len(points) < 3:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    below = sum((x - mean_x) ** 2 for x, _ in points)
    return 60 * sum((x - mean_x) * (y - mean_y) for x, y in points) / below


def disturb(run: Run, process: subprocess.Popen[str], chance: random.Random, every_s: float, seconds: float) -> Any:
    """Kills and reloads until the time is over; the memory by time."""
    begun_s = time.monotonic()
    memory: list[tuple[float, float]] = []
    next_s = begun_s + every_s
    while (now_s := time.monotonic()) < begun_s + seconds and process.poll() is None:
        time.sleep(1)
        found = children(process.pid)
        if len(found) == 2:  # Neither in a reload nor one short.
            memory.append((now_s - begun_s, resident_mb(process.pid)))
        if now_s < next_s:
            continue
        next_s = now_s + every_s * (0.5 + chance.random())
        if chance.random() < 0.75 and found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(found), signal.SIGKILL)
            run.count("killed")
        else:
            process.send_signal(signal.SIGHUP)
            run.count("reloads")
    return memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between two kills or reloads, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strict", action="store_true", help="a request that had to be sent again is lost")
    options = parser.parse_args()
    command = [sys.executable, "-m", "deploy", "serve", options.bundle, "--port", "0", "--workers", "2"]
    command += ["--threads", "1", "--variant", "torch_ext-bf16"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    run = Run(int(line.partition("http://127.0.0.1:")[2].split()[0]), options.seed, options.strict)
    threading.Thread(target=process.stdout.read, daemon=True).start()
    for text in TEXTS:
        with contextlib.closing(run.connect()) as connection:
            connection.request("POST", "/embed", json.dumps({"inputs": [text]}))
            run.expected[text] = json.loads(connection.getresponse().read())[0]
    threads = [
        threading.Thread(target=repeat, args=(client, run, random.Random(f"{options.seed} {client.__name__} {number}")))
        for client, count in CLIENTS
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    memory = disturb(run, process, random.Random(options.seed), options.every, options.seconds)
    run.stop.set()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    hanging = sum(thread.is_alive() for thread in threads)
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    for problem in run.problems:
        print(problem)
    print(", ".join(f"{what} {number}" for what, number in sorted(run.counts.items())))
    lost, wrong = run.counts["lost"], run.counts["wrong"]
    print(f"lost {lost}, wrong {wrong}, hanging clients {hanging}, exit code {code}", end="; ")
    print(f"resident {memory[-1][1] if memory else 0:.0f} MB, slope {slope(memory):+.2f} MB/min")
    return int(bool(lost or wrong or hanging or code))


if __name__ == "__main__":
    sys.exit(main())
