"""Several workers: how the machine is split, what they share, and that a request is lost only with its worker."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.server.exposition import counted, labelled, merge
from deploy.server.sockets import listen
from deploy.server.workers.board import SUPERVISOR, Board
from deploy.server.workers.channel import CONNECTION, Channel
from deploy.server.workers.cpus import Share, caches, plan
from deploy.server.workers.events import Events
from deploy.server.workers.front import Front
from deploy.server.workers.keeper import Keeper
from tests.deploy.server_harness import Client, wait_until
from torch_ext.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
BundleMaker = Callable[[str, str], Path]


# ---- how the machine is split ----------------------------------------------------------------------------------------


def machine(
    root: Path,
    cpus: int,
    cache: int = 0,
    siblings: int = 1,
    nodes: Sequence[str] = (),
    quota: float | None = None,
) -> Machine:
    """A machine whose CPUs share a level-3 cache in runs of `cache`, and a core in runs of `siblings`."""

    def run(cpu: int, length: int) -> str:
        first = cpu // length * length
        return f"{first}-{first + length - 1}" if length > 1 else str(first)

    files = {}
    for cpu in range(cpus):
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        files[f"{folder}/topology/thread_siblings_list"] = run(cpu, siblings)
        if cache:
            files[f"{folder}/cache/index3/shared_cpu_list"] = run(cpu, cache)
    for node, text in enumerate(nodes):
        files[f"sys/devices/system/node/node{node}/cpulist"] = text
        files["sys/devices/system/node/online"] = f"0-{node}"
    if quota is not None:
        files["proc/self/cgroup"] = "0::/"
        files["sys/fs/cgroup/cpu.max"] = f"{int(quota * 100_000)} 100000"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return Machine(root=root, environ={}, affinity=cpus)


def spans(start: int, length: int, count: int) -> list[tuple[int, ...]]:
    return [tuple(range(first, first + length)) for first in range(start, start + length * count, length)]


@pytest.mark.parametrize(
    ("made", "workers", "expected"),
    [
        ({"cpus": 2, "cache": 2}, None, spans(0, 2, 1)),
        ({"cpus": 8, "cache": 8}, None, spans(0, 8, 1)),
        ({"cpus": 16, "cache": 4}, None, spans(0, 4, 4)),
        ({"cpus": 64, "cache": 64}, None, spans(0, 8, 8)),
        ({"cpus": 12, "cache": 12}, None, spans(0, 6, 2)),
        ({"cpus": 16, "cache": 16, "siblings": 2}, 3, [(0, 1, 2, 3), (4, 5, 6, 7, 8, 9), (10, 11, 12, 13, 14, 15)]),
        ({"cpus": 16, "cache": 8}, 3, [*spans(0, 4, 2), tuple(range(8, 16))]),
        # A cache for each CPU is what some virtual machines show; then memory counts, else nothing.
        ({"cpus": 16, "cache": 1, "nodes": ("0-7", "8-15")}, None, spans(0, 8, 2)),
        ({"cpus": 16}, None, spans(0, 8, 2)),
        # Fewer than caches: whole ones.
        ({"cpus": 16, "cache": 4}, 2, spans(0, 8, 2)),
        # More than cores: nobody is bound.
        ({"cpus": 2, "cache": 2}, 3, [()] * 3),
        # Under a quota that leaves less than the CPUs, others run on the same.
        ({"cpus": 64, "cache": 8, "quota": 16.5}, None, [()] * 2),
        ({"cpus": 8, "cache": 8, "quota": 8}, 2, spans(0, 4, 2)),
    ],
)
def test_cpus_are_split_by_cores_and_caches(
    tmp_path: Path, made: dict[str, Any], workers: int | None, expected: list[tuple[int, ...]]
) -> None:
    cpus = range(made["cpus"])
    found = plan(workers, None, machine(tmp_path, **made), cpus)
    assert [share.cpus for share in found.shares] == expected
    assert ("auto" in str(found)) == (workers is None)
    assert str(found).startswith(f"workers={len(expected)}")
    for share in found.shares:
        assert share.threads == len(share.cpus) or not share.cpus


def test_no_worker_of_auto_is_behind_two_caches_or_half_of_a_core(tmp_path: Path) -> None:
    for number, (cpus, cache, siblings) in enumerate([(96, 16, 2), (24, 6, 2), (12, 3, 1), (128, 32, 1)]):
        found = machine(tmp_path / str(number), cpus, cache, siblings)
        groups = [{cpu for core in group for cpu in core} for group in caches(found, range(cpus))]
        shares = plan(None, None, found, range(cpus)).shares
        assert sorted(cpu for share in shares for cpu in share.cpus) == list(range(cpus))
        for share in shares:
            assert sum(set(share.cpus) <= group for group in groups) == 1
            assert 1 <= len(share.cpus) <= 8
            assert {cpu // siblings for cpu in share.cpus} == {cpu // siblings for cpu in share.cpus[::siblings]}
            assert len(share.cpus) % siblings == 0


def test_threads_and_quota(tmp_path: Path) -> None:
    large = machine(tmp_path / "large", 16, 4)
    # What fits behind one cache stays there.
    assert [share.cpus for share in plan(2, 4, large, range(16)).shares] == [(0, 1, 2, 3), (8, 9, 10, 11)]
    assert plan(None, 2, large, range(16)).shares == tuple(Share(2, cpus) for cpus in spans(0, 2, 8))
    # The cpuset counts, not the machine.
    assert [share.cpus for share in plan(None, None, large, (2, 3, 4, 5)).shares] == [(2, 3), (4, 5)]
    limited = machine(tmp_path / "limited", 64, 8, quota=3.9)
    assert plan(2, None, limited, range(64)).shares == (Share(1), Share(1))
    assert plan(None, None, limited, range(64)).shares == (Share(3),)
    assert "quota of 3.9 CPUs" in str(plan(None, None, limited, range(64)))
    assert "workers=100 (more than 16 CPUs)" in str(plan(100, None, large, range(16)))
    assert "workers=4 (more than 3 CPUs)" in str(plan(4, None, limited, range(64)))
    assert "more than" not in str(plan(16, None, large, range(16)))
    assert Share(4, (0, 1, 2, 3)).pin
    assert not Share(2, (0, 1, 2, 3)).pin


# ---- what they share -------------------------------------------------------------------------------------------------


def test_messages_come_with_descriptors() -> None:
    ours, theirs = Channel.pair()
    with pytest.raises(BlockingIOError):
        theirs.receive(wait=False)
    read, write = os.pipe()
    ours.send("job", {"values": [1, "two"]}, [write])
    os.close(write)
    left, right = socket.socketpair()
    assert ours.send_connection(left)
    left.close()
    message = theirs.receive()
    assert message is not None
    assert (message.kind, message.values, len(message.fds)) == ("job", {"values": [1, "two"]}, 1)
    os.write(message.fds[0], b"x")
    message.close()
    assert os.read(read, 2) == b"x"
    assert os.read(read, 2) == b""
    os.close(read)
    message = theirs.receive()
    assert message is not None
    assert message.kind == CONNECTION
    with socket.socket(fileno=message.fds[0]) as connection, right:
        connection.sendall(b"y")
        assert right.recv(2) == b"y"
    ours.end()
    assert theirs.receive() is None
    ours.close()
    theirs.close()


def test_a_full_channel_takes_no_connection() -> None:
    ours, theirs = Channel.pair()
    left, right = socket.socketpair()
    with left, right:
        sent = 0
        while ours.send_connection(left):
            sent += 1
            assert sent < 100_000
        assert theirs.receive() is not None
        assert ours.send_connection(left)
    ours.close()
    theirs.close()


class FullChild:
    """A worker that has no room for a connection until it reads."""

    slot = 1
    sent = 0

    def __init__(self) -> None:
        self.channel, self.theirs = Channel.pair()
        with socket.socket() as any_socket:
            while self.channel.send_connection(any_socket):
                pass

    def takes(self) -> list[socket.socket]:
        """Those that were waiting, as a worker that is ready reads them."""
        taken = []
        with contextlib.suppress(BlockingIOError):
            while (message := self.theirs.receive(wait=False)) is not None:
                taken += [socket.socket(fileno=fd) for fd in message.fds]
        return taken


def test_a_server_that_ends_waits_for_room_for_what_it_has_accepted() -> None:
    """A burst before SIGTERM fills the channels; what is accepted last is handed over when workers have read."""
    events = Events(lambda number: None)
    child = FullChild()
    listener = listen("127.0.0.1", 0)
    front = Front(listener, Board.make(1), events, Keeper(events, keep=False), lambda: [child])  # type: ignore[list-item]
    ended: list[bool] = []
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(5)]
        front.close(lambda: ended.append(True))
        assert front.closed
        assert not ended
        taken = child.takes()
        while not ended:
            events.wait()
            taken += child.takes()
        peers = set()
        for connection in taken:
            with contextlib.suppress(OSError):
                peers.add(connection.getpeername())
            connection.close()
        assert peers == {client.getsockname() for client in clients}
    child.channel.close()
    child.theirs.close()


def test_board_keeps_the_last_complete_text() -> None:
    board = Board.make(2)
    reader = Board(board.fd)
    board.publish(1, b"first")
    board.publish(1, b"second")
    board.publish(2, b"other")
    board.count(2, 7, 3)
    assert reader.texts() == [b"", b"second", b"other"]
    assert reader.texts(without=1) == [b"", b"other"]
    assert (reader.received(2), reader.open(2)) == (7, 3)
    # Killed in the middle of the third text: the second one stays.
    torn = board._memory.find(b"first")
    board._memory[torn : torn + 5] = b"thir\0"
    assert reader.text(1) == b"second"
    board.publish(1, b"x" * (1 << 20))  # Does not fit.
    assert reader.text(1) == b"second"
    board.retire(2, b"what the other had counted")
    assert reader.texts() == [b"what the other had counted", b"second", b""]
    assert reader.text(SUPERVISOR)
    assert (reader.received(2), reader.open(2)) == (0, 0)


ONE = b"""\
# HELP requests_total Answered.
# TYPE requests_total counter
requests_total{endpoint="/a b",status="200"} 3.0
# HELP seconds Time.
# TYPE seconds histogram
seconds_bucket{le="0.5"} 1.0
seconds_bucket{le="+Inf"} 2.0
seconds_sum 1.5
# HELP serve_ready Ready.
# TYPE serve_ready gauge
serve_ready 1.0
# HELP serve_queue_wait_seconds Wait.
# TYPE serve_queue_wait_seconds gauge
serve_queue_wait_seconds 0.5
# HELP queue Waits.
# TYPE queue gauge
queue 2.0
"""
TWO = ONE.replace(b'"200"} 3.0', b'"200"} 4.0\nrequests_total{endpoint="/a b",status="429"} 1.0').replace(
    b"ready 1", b"ready 0"
)
TWO = TWO.replace(b"wait_seconds 0.5", b"wait_seconds 0.75")


def test_metrics_are_added_up() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    total = merge([b"", ONE, TWO])
    assert list(text_string_to_metric_families(total.decode()))
    lines = total.decode().splitlines()
    assert len([line for line in lines if line.startswith("# TYPE")]) == 5
    for line in (
        'requests_total{endpoint="/a b",status="200"} 7.0',
        'requests_total{endpoint="/a b",status="429"} 1.0',
        'seconds_bucket{le="+Inf"} 4.0',
        "seconds_sum 3.0",
        "serve_ready 1.0",
        "queue 4.0",
        "serve_queue_wait_seconds 0.75",
    ):
        assert line in lines
    left = counted([ONE, TWO]).decode()
    assert "seconds_sum 3.0" in left
    assert "queue" not in left
    assert "serve_ready" not in left


@pytest.mark.parametrize("value", ["a\u2028b", "a\x85b", "a\x0bb", "a\x1cb", 'a"b\\\nb', "a b {c}"])
def test_metrics_of_a_name_with_any_characters(value: str) -> None:
    """One of a model, say: what Python takes for the end of a line ended the supervisor."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    registry = CollectorRegistry()
    Gauge("serve_model_info", "What is served.", ("model",), registry=registry).labels(value).set(1)
    text = generate_latest(registry)
    for found in (merge([text, text]), labelled(text, value)):
        (line,) = [line for line in found.decode().split("\n") if line and not line.startswith("#")]
        assert f"{line}\n".encode() in text
    named = labelled(b"# TYPE a gauge\na 1\n", value).decode()
    if not set(value) & set("\u2028\x85\x0b\x1c"):  # Which the parser of the client takes for an end, too.
        (family,) = text_string_to_metric_families(named)
        assert family.samples[0].labels == {"model": value}
    assert counted([text]) == b""


# ---- the server ------------------------------------------------------------------------------------------------------


class Workers:
    """`deploy serve --workers` as a process; `workers=None` leaves the option out."""

    def __init__(self, bundle: Path, *options: object, program: str | None = None, workers: object = 2) -> None:
        start = ["-m", "deploy"] if program is None else ["-c", program]
        fixed = ["--port", "0", "--variant", "torch_ext-bf16", "--threads", "1"]
        if workers is not None:
            fixed += ["--workers", str(workers)]
        self.process = subprocess.Popen(
            [sys.executable, *start, "serve", str(bundle), *fixed, *map(str, options)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.line = self.read_line()
        match = re.search(r" on http://127\.0\.0\.1:(\d+) ", self.line)
        if match is None:
            self.process.kill()
            raise AssertionError(f"no start-up line: {self.line!r} {self.process.communicate()[1]}")
        self.port = int(match[1])

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    @property
    def pids(self) -> list[int]:
        """Its workers."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def embed(self, text: str) -> list[float]:
        with Client(self.port) as client:
            reply = client("POST", "/api/embed", {"inputs": text})
        assert reply.status == 200, reply.body
        row: list[float] = reply.json["embeddings"][0]
        return row

    def metric(self, sample: str) -> float:
        with Client(self.port) as client:
            return metric(client, sample)

    def stop(self) -> tuple[int, str]:
        """SIGTERM; the exit code, and what the log says."""
        self.process.send_signal(signal.SIGTERM)
        _, err = self.process.communicate(timeout=40)
        return self.process.returncode, err


def metric(client: Client, sample: str) -> float:
    """What the worker behind a connection says of a metric; 0 if it is not there."""
    text = client("GET", "/metrics").body.decode()
    found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@contextlib.contextmanager
def workers(bundle: Path, *options: object, **settings: Any) -> Iterator[Workers]:
    server = Workers(bundle, *options, **settings)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        for stream in (server.process.stdout, server.process.stderr):
            if stream is not None:
                stream.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Load:
    """Clients that ask all the time, some on kept connections; every answer is compared."""

    def __init__(self, server: Workers, clients: int = 4) -> None:
        self.server = server
        self.texts = ["a", "the name of the file", "returns a list of values " * 4]
        self.expected = {text: server.embed(text) for text in self.texts}
        self.answered = 0
        self.broken: list[str] = []
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self.threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self.threads), "a client hangs"

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError), Client(self.server.port) as client:
                for turn in range(1 if number % 2 else 50):
                    if self._stop.is_set():
                        return
                    text = self.texts[turn % len(self.texts)]
                    try:
                        reply = client("POST", "/api/embed", {"inputs": text})
                    except Exception as problem:
                        with self._lock:
                            self.broken.append(repr(problem))
                        break
                    with self._lock:
                        if reply.status != 200 or not close(reply.json["embeddings"][0], self.expected[text]):
                            self.wrong.append(f"{reply.status} {text}")
                        self.answered += 1
                    if reply.headers.get("connection") == "close":
                        break

    def go_on(self, answers: int = 60) -> None:
        """Waits for so many more answers."""
        goal = self.answered + answers
        wait_until(lambda: self.answered >= goal, 30)


def close(left: Sequence[float], right: Sequence[float]) -> bool:
    return all(abs(one - other) < 0.01 for one, other in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def tiny(tiny_bundle: BundleMaker) -> Path:
    return tiny_bundle("bert", "feature-extraction")


def copy(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "bundle"))


def test_a_killed_worker_takes_only_its_requests_and_is_replaced(tiny: Path) -> None:
    with workers(tiny, "--max-concurrent-requests", 999) as server:
        assert re.search(r" variant=torch_ext-bf16 workers=2 threads=1 isa=\S+ \(by --variant\)$", server.line.strip())
        first = server.pids
        assert len(first) == 2
        with Client(server.port) as client:
            info = client("GET", "/info").json
            assert client("GET", "/ready").status == 200
        assert (info["workers"], info["threads"], info["limits"]["max_queue_tokens"]) == (2, 1, 131_072)
        assert info["max_concurrent_requests"] == 500
        with Load(server) as load:
            load.go_on()
            assert not load.broken
            for pid in first:
                before = len(load.wrong) + len(load.broken)
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda dead=pid: len(set(server.pids) - {dead}) == 2 and not alive(dead), 20)
                load.go_on()
                # At most one request of each client was there.
                assert len(load.wrong) + len(load.broken) - before <= len(load.threads)
        # Those that were read are refused, but for one whose answer was just leaving.
        assert all(problem.startswith("503 ") for problem in load.wrong)
        assert not set(first) & set(server.pids)
        wait_until(lambda: server.metric("serve_workers") == 2, 20)
        assert server.metric("serve_worker_deaths_total") == 2
        code, err = server.stop()
    assert code == 0
    assert err.count("has died: it was ended by SIGKILL") == 2


def proportional_kb(pid: int, mapping: str) -> tuple[int, int]:
    """Proportional share of a process in memory, and that in mappings of a name, in kB."""
    total = named = 0
    current = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            current = line
        elif line.startswith("Pss:"):
            total += int(line.split()[1])
            named += int(line.split()[1]) * (mapping in current)
    return total, named


def test_workers_share_one_copy_of_the_weights(tiny: Path) -> None:
    with workers(tiny) as server:
        shares = [proportional_kb(pid, "memfd:torch_ext image") for pid in server.pids]
        inode = {
            os.stat(f"/proc/{pid}/fd/{fd.name}").st_ino
            for pid in [server.process.pid, *server.pids]
            for fd in Path(f"/proc/{pid}/fd").iterdir()
            if "torch_ext image" in os.readlink(fd)
        }
        (image_bytes,) = {
            os.stat(fd).st_size
            for fd in Path(f"/proc/{server.process.pid}/fd").iterdir()
            if "torch_ext image" in os.readlink(fd)
        }
        assert len(inode) == 1
        # All of it is in memory once, and what a worker has of its own is within the bound.
        assert sum(image for _, image in shares) <= image_bytes / 1024 + 8
        assert all(image > 0 for _, image in shares)
        for total, image in shares:
            assert total - image <= 45_000, shares
        assert server.stop() == (0, "")


def test_connections_are_dealt_out_evenly_and_metrics_are_those_of_all(tiny: Path) -> None:
    with workers(tiny, workers=2) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.port)) for _ in range(4)]
        for client in clients:
            assert client("POST", "/api/embed", {"inputs": "a"}).status == 200

        def sockets(pid: int) -> int:
            links = (os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
            return sum(link.startswith("socket:") for link in links)

        counts = [sockets(pid) for pid in server.pids]
        assert counts[0] == counts[1]
        # Each of the two workers counted two, and knows of the other's; then one dies, and they are not forgotten.
        sample = 'serve_requests_total{endpoint="/api/embed",status="200"}'
        wait_until(lambda: all(metric(client, sample) == 4 for client in clients[:2]), 20)
        assert metric(clients[0], "serve_workers") == 2
        os.kill(server.pids[0], signal.SIGKILL)
        wait_until(lambda: server.metric("serve_worker_deaths_total") == 1, 20)
        assert server.metric(sample) == 4
        wait_until(lambda: server.metric("serve_workers") == 2, 20)
        assert server.stop()[0] == 0


def test_drain_answers_what_was_accepted(tiny: Path) -> None:
    with workers(tiny) as server:
        with Load(server) as load:
            load.go_on(20)
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(30)
        assert not load.wrong
        # Nothing that was accepted broke; whoever came later found nobody.
        assert all("ConnectionRefused" in problem for problem in load.broken), load.broken[:3]
        assert server.process.returncode == 0


def test_a_worker_that_finds_another_bundle_is_no_part_of_the_one_served(tiny: Path, tmp_path: Path) -> None:
    bundle = copy(tiny, tmp_path)
    with workers(bundle) as server:
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["model"]["name"] = "another"
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        os.kill(server.pids[0], signal.SIGKILL)
        # All of them serve the new one then.
        assert server.read_line().startswith("reloaded, serving another ")
        names = set()
        for _ in range(4):
            with Client(server.port) as client:
                names.add(client("GET", "/info").json["model_id"])
        assert names == {"another"}
        code, err = server.stop()
    assert code == 0
    assert "the bundle has changed since it was loaded" in err


# A server that may open few files.
FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
from deploy.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_connections_wait_while_workers_have_no_descriptors(tiny: Path) -> None:
    with workers(tiny, program=FEW) as server, contextlib.ExitStack() as stack:
        # Each worker takes 32.
        clients = [stack.enter_context(Client(server.port)) for _ in range(90)]
        for client in clients:
            client.send("POST", "/api/embed", {"inputs": "a"})
        for client in clients:
            assert client.read().status == 200
            client.connection.close()  # Makes room for one that waits.
        stack.close()
        code, err = server.stop()
        assert (code, err.count("\n")) == (0, 1), err
        assert "this process may open 160 files and connections" in err


# A supervisor that looks often.
STRICT = """
import sys
from deploy.server.workers import supervisor, watch
supervisor.LOOK_S = 0.3
watch.LOOKS = 4
from deploy.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_worker_that_hangs_is_replaced(tiny: Path) -> None:
    with workers(tiny, program=STRICT) as server:
        first = server.pids[0]
        os.kill(first, signal.SIGSTOP)
        wait_until(lambda: first not in server.pids, 20)
        for _ in range(4):
            server.embed("a")
        code, err = server.stop()
    assert code == 0
    assert f"worker {first} hangs, and is killed" in err


def test_workers_end_with_their_supervisor(tiny: Path) -> None:
    with workers(tiny) as server:
        pids = server.pids
        server.process.kill()
        server.process.wait(10)
        wait_until(lambda: not any(map(alive, pids)), 20)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), 5)


# A supervisor whose workers end at once after they were ready, with little patience.
FRAIL = """
import sys
from deploy.server.workers import child, supervisor
supervisor.QUICK_DEATHS, supervisor.BACKOFF_S = 3, 0.01
supervisor.Supervisor.__init__.__kwdefaults__["worker"] = (sys.executable, "-c", '''
import os, sys
from deploy.server.workers.channel import Channel
channel = Channel.inherited(int(sys.argv[1]))
channel.receive()
channel.send("ready", {"isas": ["none"]})
os._exit(7)
''')
from deploy.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_server_whose_workers_always_die_ends(tiny: Path) -> None:
    with workers(tiny, program=FRAIL, workers=1) as server:
        _, err = server.process.communicate(timeout=30)
    assert server.process.returncode == 1
    assert err.count("has died: it exited with 7") == 3
    assert "3 workers have died one after the other, and the server ends" in err


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy", "serve", *map(str, arguments), "--workers", "2"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_what_cannot_start_says_why(tiny: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "--port", 0)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"python -m deploy serve: .*manifest\.json.*\n", done.stderr)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tiny, "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_sigterm_ends_a_start_at_once(tiny: Path) -> None:
    command = [sys.executable, "-m", "deploy", "serve", str(tiny), "--workers", "2", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: children.read_text(), 20)
        process.terminate()
        assert process.wait(20) == 0


def test_onnx_variants_have_workers_too(tiny: Path) -> None:
    pytest.importorskip("onnxruntime")
    with workers(tiny, "--variant", "onnx-fp32") as server:
        assert "variant=onnx-fp32 workers=2" in server.line
        assert server.embed("a")
        assert server.stop() == (0, "")


HALF = """
import sys
from deploy.server.workers import supervisor
supervisor.Supervisor.__init__.__kwdefaults__["worker"] = (sys.executable, "-c", '''
import sys
from deploy.server.workers import worker
tell = worker._Worker.announce
def announce(self, *loaded):
    if self._job.slot == 1:
        tell(self, *loaded)
        print("one is ready", flush=True)
worker._Worker.announce = announce
sys.exit(worker.main(int(sys.argv[1])))
''')
from deploy.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_server_that_is_stopped_before_all_workers_are_ready_has_lost_nothing(tiny: Path) -> None:
    command = [sys.executable, "-c", HALF, "serve", str(tiny), "--port", "0", "--variant", "torch_ext-bf16"]
    process = subprocess.Popen([*command, "--workers", "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "one is ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=40) == ("", None)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("count", [None, 2])
def test_a_server_whose_output_nobody_takes_serves_on(tiny: Path, count: int | None) -> None:
    """Also when it is loaded again: the line that says so is no part of it."""
    with workers(tiny, workers=count) as server:
        assert server.process.stdout is not None
        server.process.stdout.close()
        server.process.send_signal(signal.SIGHUP)
        assert server.process.stderr is not None
        assert "a line cannot be printed ([Errno 32] Broken pipe): reloaded, " in server.process.stderr.readline()
        assert server.embed("a")
        if count is not None:
            assert server.metric("serve_reloads_total") == 1
        server.process.stdout = None  # `communicate` would read it.
        assert server.stop() == (0, "")


@pytest.mark.parametrize("count", [None, 2])
def test_a_server_takes_as_many_connections_as_the_system_allows(tiny: Path, count: int | None) -> None:
    """Services start with 1024 descriptors at first, and may have more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        server = Workers(tiny, workers=count)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with contextlib.closing(server.process.stdout), contextlib.closing(server.process.stderr):  # type: ignore[type-var]
        assert server.metric("process_max_fds") == min(before[1], 1 << 16)
        code, err = server.stop()
    assert code == 0
    assert ("this process may open" in err) == (before[1] < 1024)


def test_few_descriptors_are_told(tmp_path: Path) -> None:
    few = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); "
    command = [sys.executable, "-c", f"{few}from deploy.__main__ import main; sys.exit(main())", "serve", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "this process may open 200 files and connections (ulimit -n)" in done.stderr
