"""The Ray Serve application on a local cluster of two nodes, beside the plain server; one node is killed under load.

    python -m venv /tmp/ray && /tmp/ray/bin/pip install 'ray[serve]>=2.60,<3' "$(echo dist/torch_ext-*.whl)[serve]"
    /tmp/ray/bin/python benchmarks/ray_cluster.py bundles/demo

1. **Throughput of a replica.** The plain server and one replica behind Ray's proxy answer the same requests in turns,
   a few seconds each, with one thread each and the same number of connections. The ratio is that of pairs of turns,
   since other work on the machine changes both. The CPU time of the serving process for each text says the same
   without the machine's other work.
2. **A node dies.** Two replicas on two nodes; a closed loop finds what both can do, then requests arrive at random
   times (Poisson) at 70 % of it. Raylet and replica of the second node are killed (SIGKILL) at once; the first node has
   a spare core, where Ray starts another replica. Engines sleep for as long as their tokens take at a fixed speed, so
   that what the fleet can do is not that of a machine which two replicas, Ray and the clients share. Clients do what
   the server asks them to: after 429 and 503 they send the request again, once `Retry-After` has passed. So they do
   after 500 and after a connection that broke, which is how a request ends that the dead replica had: to compute it
   twice does no harm. Lost is a request without an answer of 200 after a minute.

Load goes to 127.0.0.1 only. The last line of the output is a JSON object with all figures.

The file is longer than others: an experiment that is run as one script is read as one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deploy.options import bundle_folder  # noqa: E402
from deploy.server.sockets import listen  # noqa: E402
from deploy.texts import sample  # noqa: E402

CONNECTIONS = 8
TOKENS_PER_S = 400.0
"""Of engines that sleep: so few that what Ray itself computes for each request does not count."""
PATIENCE_S = 60.0
"""How long a client sends a refused request again."""
WINDOW_S = 5.0
"""Latencies are compared by windows of so many seconds."""
DETECTION = {"health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
"""A node that is silent for so long is dead to Ray; its own settings take about 30 s."""
PATIENCE = {
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
}
"""For machines that are slow or busy: Ray's processes give up on each other after 15 s."""
ROUTING = {"RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0"}
"""With one proxy for the cluster, replicas on its own node would get all requests (docs/ray-serve.md)."""


class Answer(NamedTuple):
    """How one request went, with all its tries; times by `time.monotonic`."""

    sent_s: float
    ended_s: float
    status: int | str
    refused: int = 0
    broken: int = 0

    @property
    def took_s(self) -> float:
        """From the first try to the last answer."""
        return self.ended_s - self.sent_s


class Client:
    """One keep-alive connection, opened again where it breaks; `body` is that of the last answer."""

    def __init__(self, port: int, body: bytes) -> None:
        self.body = b""
        self.retry_after_s = 1.0
        self._port = port
        self._request = (
            b"POST /api/embed HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: "
            + str(len(body)).encode() + b"\r\n\r\n" + body
        )  # fmt: skip
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self) -> Answer:
        """Sends the request and reads its answer."""
        sent_s = time.monotonic()
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._streams
            writer.write(self._request)
            status: int | str = await asyncio.wait_for(self._read(reader), PATIENCE_S)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, ValueError) as error:
            status = type(error).__name__
            self._streams, self.retry_after_s = None, 1.0
        return Answer(sent_s, time.monotonic(), status)

    async def close(self) -> None:
        """Closes the connection."""
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()

    async def insist(self) -> Answer:
        """Sends the request until it is answered."""
        first = answer = await self.ask()
        refused = broken = 0
        while answer.status != 200 and answer.ended_s - first.sent_s < PATIENCE_S:
            if answer.status in (429, 503):
                refused += 1
            else:
                broken += 1
            # Spread, or all that were refused in one second would come back in one.
            await asyncio.sleep(self.retry_after_s * random.uniform(1, 1.5))
            answer = await self.ask()
        return Answer(first.sent_s, answer.ended_s, answer.status, refused, broken)

    async def _read(self, reader: asyncio.StreamReader) -> int:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"content-length: (\d+)", head)
        retry_after = re.search(rb"retry-after: (\d+)", head)
        self.retry_after_s = float(retry_after[1]) if retry_after else 1.0
        if length is not None:
            self.body = await reader.readexactly(int(length[1]))
        else:  # Chunked, as Ray's proxy may send it.
            self.body = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                self.body += (await reader.readexactly(size + 2))[:-2]
            await reader.readuntil(b"\r\n")
        return int(head.split(b" ", 2)[1])


async def closed_loop(port: int, body: bytes, seconds: float, connections: int = CONNECTIONS) -> list[Answer]:
    """Each connection sends its next request after its answer."""
    end_s = time.monotonic() + seconds

    async def user() -> list[Answer]:
        client, answers = Client(port, body), []
        while time.monotonic() < end_s:
            answers.append(await client.ask())
        return answers

    return [answer for of in await asyncio.gather(*(user() for _ in range(connections))) for answer in of]


async def open_loop(port: int, body: bytes, rate: float, stop: asyncio.Event, seed: int) -> list[Answer]:
    """Requests at random times, whatever the answers do, on connections that are free or new ones."""
    chance, free, tasks = random.Random(seed), [], []

    async def one() -> Answer:
        client = free.pop() if free else Client(port, body)
        answer = await client.insist()
        free.append(client)
        return answer

    due_s = time.monotonic()
    while not stop.is_set():
        due_s += chance.expovariate(rate)
        await asyncio.sleep(max(due_s - time.monotonic(), 0))
        tasks.append(asyncio.create_task(one()))
    return list(await asyncio.gather(*tasks))


def sleep_in_engines() -> None:
    """Ray calls it in each process of its own: engines answer with rows of one number, after a time."""
    from deploy.engines import open as opening

    real = opening.load_engine

    class Sleeping:
        def __init__(self, engine: Any) -> None:
            self.cost = engine.cost
            self.rest = engine.rest
            self._engine = engine
            self._row: Any = None

        def run(self, ids: Any, options: Any) -> Any:
            if self._row is None:
                self._row = self._engine.run(ids[:1], options[:1])[0]
            time.sleep(sum(map(len, ids)) / TOKENS_PER_S)
            return [self._row] * len(ids)

    def load_engine(*arguments: Any, **named: Any) -> tuple[Any, str]:
        engine, isa = real(*arguments, **named)
        return Sleeping(engine), isa

    opening.load_engine = load_engine


# Processes.


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of each process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(folder.name)] = (parent, (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def replicas_of(raylet: int) -> list[int]:
    """Processes of replicas that a node's raylet has started."""
    return [pid for pid, (parent, line) in processes().items() if parent == raylet and "ServeReplica" in line]


def cpu_s(pid: int) -> float:
    """CPU time of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def plain_server(bundle: str, threads: int, options: list[str]) -> Iterator[tuple[int, int]]:
    """Port and process of `deploy serve`."""
    command = [sys.executable, "-m", "deploy", "serve", bundle, "--port", "0", "--threads", str(threads), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if port is None:
            raise SystemExit(f"the plain server did not start: {line}")
        yield int(port[1]), process.pid
    finally:
        process.terminate()
        process.wait()


# The two measurements.


def throughput(plain: tuple[int, int], ray_port: int, replica: int, body: bytes, arguments: Any) -> dict[str, Any]:
    """Turns of both; see the module's text."""
    turns: dict[str, list[tuple[float, float]]] = {"plain": [], "ray": []}
    for port in (plain[0], ray_port):
        asyncio.run(closed_loop(port, body, 2))
    for _ in range(arguments.turns):
        for name, port, pid in (("plain", *plain), ("ray", ray_port, replica)):
            cpu, begun_s = cpu_s(pid), time.monotonic()
            answers = asyncio.run(closed_loop(port, body, arguments.seconds))
            wall_s = time.monotonic() - begun_s
            wrong = {answer.status for answer in answers} - {200}
            if wrong:
                raise SystemExit(f"{name}: answers {wrong}, expected 200")
            texts = len(answers) * arguments.texts
            turns[name].append((texts / wall_s, 1e3 * (cpu_s(pid) - cpu) / texts))
    pairs = list(zip(turns["plain"], turns["ray"], strict=True))
    return {
        "texts_per_request": arguments.texts,
        "plain_texts_per_s": statistics.median(plain for (plain, _), _ in pairs),
        "replica_texts_per_s": statistics.median(ray for _, (ray, _) in pairs),
        "throughput_ratio": statistics.median(ray / plain for (plain, _), (ray, _) in pairs),
        "throughput_ratios": [round(ray / plain, 3) for (plain, _), (ray, _) in pairs],
        "plain_cpu_ms_per_text": statistics.median(plain for (_, plain), _ in pairs),
        "replica_cpu_ms_per_text": statistics.median(ray for _, (_, ray) in pairs),
        "cpu_ratio": statistics.median(plain / ray for (_, plain), (_, ray) in pairs),
    }


async def kill_one(port: int, body: bytes, rate: float, kill: Any, replicas: Any, arguments: Any) -> dict[str, Any]:
    """Load before, during and after a node's death."""
    stop = asyncio.Event()
    load = asyncio.create_task(open_loop(port, body, rate, stop, arguments.seed))
    await asyncio.sleep(arguments.before)
    kill()
    killed_s = time.monotonic()
    running_s = None
    while time.monotonic() - killed_s < arguments.after:
        await asyncio.sleep(0.25)
        if running_s is None and len(replicas()) == 2:
            running_s = time.monotonic() - killed_s
    stop.set()
    answers = await load
    return {"rate_per_s": rate, "second_replica_after_s": running_s, **judge(answers, killed_s)}


def judge(answers: Sequence[Answer], killed_s: float) -> dict[str, Any]:
    """What a kill did to requests.

    Args:
        answers: All of them, from before the kill to long after it.
        killed_s: When it was.

    Returns:
        Counts; and when requests took no longer than before again: the end of the last window of which more than 5 %
        was lost or took longer than the longest request before the kill.
    """
    bound_s = max(answer.took_s for answer in answers if answer.ended_s < killed_s)
    lost = [answer for answer in answers if answer.status != 200]
    after = [answer for answer in answers if answer.sent_s > killed_s]
    windows: dict[int, list[bool]] = {}
    for answer in after:
        slow = answer.status != 200 or answer.took_s > bound_s
        windows.setdefault(int((answer.sent_s - killed_s) / WINDOW_S), []).append(slow)
    bad = [number for number, of in windows.items() if sum(of) > 0.05 * len(of)]
    return {
        "requests": len(answers),
        "in_flight_at_kill": sum(answer.sent_s <= killed_s < answer.ended_s for answer in answers),
        "lost": len(lost),
        "broken_in_flight": sum(answer.broken > 0 and answer.sent_s <= killed_s for answer in answers),
        "broken_later": sum(answer.broken > 0 for answer in after),
        "last_broken_sent_after_s": max((answer.sent_s - killed_s for answer in after if answer.broken), default=0.0),
        "lost_statuses": sorted({str(answer.status) for answer in lost}),
        "refused_at_first": sum(answer.refused > 0 for answer in after),
        "refused_most_often": max((answer.refused for answer in after), default=0),
        "longest_before_s": bound_s,
        "longest_after_s": max((answer.took_s for answer in after), default=0.0),
        "as_before_after_s": WINDOW_S * (max(bad) + 1) if bad else 0.0,
    }


def main() -> None:
    """Runs both measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=bundle_folder, help="folder that `deploy export` wrote")
    parser.add_argument("--texts", type=int, default=8, help="texts of a request")
    parser.add_argument("--seconds", type=float, default=5, help="length of a turn")
    parser.add_argument("--turns", type=int, default=7, help="turns of each server")
    parser.add_argument("--load", type=float, default=0.7, help="part of what two replicas can do")
    parser.add_argument("--before", type=float, default=15, help="seconds of load before the kill")
    parser.add_argument("--after", type=float, default=60, help="seconds of load after the kill")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals (default: %(default)s)")
    parser.add_argument("--options", default="", help="more options of both servers, in one text")
    parser.add_argument("--only-kill", action="store_true", help="leave the throughput out")
    arguments = parser.parse_args()
    options = ["--variant", "torch_ext-bf16", *arguments.options.split()]
    # A closed loop's queue is as long as there are connections, however slow the machine: nothing is refused for it.
    patient = [*options, "--max-queue-ms", "60000"]
    body = json.dumps({"inputs": sample(arguments.texts)}).encode()

    os.environ.update({name: os.environ.get(name, value) for name, value in (PATIENCE | ROUTING).items()})
    try:
        import ray
    except ModuleNotFoundError:
        raise SystemExit(
            "ray_cluster: Ray is not installed: pip install 'ray[serve]>=2.60,<3' (docs/ray-serve.md)"
        ) from None
    from ray import serve
    from ray.cluster_utils import Cluster

    from deploy.ray_serve import app

    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]

    @contextlib.contextmanager
    def cluster_of(nodes: int, **named: Any) -> Iterator[Any]:
        head = {"num_cpus": 2, "include_dashboard": False, "_system_config": DETECTION}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", **named)
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            yield cluster
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()

    def run(replicas: int, options: list[str]) -> None:
        count = {"min_replicas": replicas, "max_replicas": replicas}
        serve.run(app({"bundle": str(Path(arguments.bundle).resolve()), "options": " ".join(options), **count}))

    def running() -> list[int]:
        raylets = [pid for pid, (_, line) in processes().items() if re.match(r"\S*/raylet/raylet ", line)]
        return [pid for raylet in raylets for pid in replicas_of(raylet)]

    result: dict[str, Any] = {}
    if not arguments.only_kill:
        with cluster_of(1), plain_server(arguments.bundle, 1, patient) as plain:
            run(1, patient)
            (replica,) = running()
            result["throughput"] = throughput(plain, port, replica, body, arguments)
        print(json.dumps(result), flush=True)
    with cluster_of(2, runtime_env={"worker_process_setup_hook": sleep_in_engines}) as cluster:
        run(2, options)
        while len(running()) != 2:
            time.sleep(0.2)
        (second,) = cluster.worker_nodes
        raylet = second.all_processes["raylet"][0].process.pid
        if len(replicas_of(raylet)) != 1:
            raise SystemExit("expected one replica on each node; run again")

        victims = (*replicas_of(raylet), raylet)

        def kill() -> None:
            for pid in victims:
                os.kill(pid, signal.SIGKILL)

        one = json.dumps({"inputs": sample(1)}).encode()
        asyncio.run(closed_loop(port, one, 3, 2 * CONNECTIONS))
        both = running()
        before = [cpu_s(pid) for pid in both]
        answers = asyncio.run(closed_loop(port, one, 2 * arguments.seconds, 2 * CONNECTIONS))
        most = sum(answer.status == 200 for answer in answers) / (2 * arguments.seconds)
        shares = [cpu_s(pid) - used for pid, used in zip(both, before, strict=True)]
        if min(shares) < 0.5 * max(shares):
            raise SystemExit(f"expected both replicas to compute, got CPU times of {shares} s")
        killed = asyncio.run(kill_one(port, one, arguments.load * most, kill, running, arguments))
        result["node_killed"] = {"most_per_s": most, **killed}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
