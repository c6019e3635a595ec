"""What becomes of the connections of a worker that is killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from deploy.server.workers.events import Events
from deploy.server.workers.keeper import Keeper
from deploy.server.workers.marks import ANSWERING, PENDING, is_idle
from tests.deploy.server_harness import Client, wait_until
from tests.deploy.test_workers import BundleMaker, workers

OWNER = 7


class Connection:
    """A client, its worker's end, and the duplicate that is kept."""

    def __init__(self, keeper: Keeper, read_bytes: int = 0) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname(), 10)
            self.worker, _ = listener.accept()
        self.keeper = keeper
        self.number = keeper.number(read_bytes)
        keeper.keep(self.number, OWNER, self.worker.dup())

    def mark(self, value: int) -> None:
        self.keeper.marks.values[self.number] = value

    def arrives(self, data: bytes) -> None:
        """Lets bytes arrive, unread."""
        self.client.sendall(data)
        wait_until(lambda: self.worker.recv(1 << 16, socket.MSG_PEEK))


@pytest.fixture
def events() -> Events:
    return Events(lambda number: None)


@pytest.fixture
def keeper(events: Events) -> Keeper:
    return Keeper(events)


@pytest.fixture
def connection(keeper: Keeper) -> Iterator[Connection]:
    made = Connection(keeper)
    yield made
    made.client.close()
    made.worker.close()


def test_a_connection_between_requests_is_given_to_another_worker(keeper: Keeper, connection: Connection) -> None:
    connection.arrives(b"12345")
    assert connection.worker.recv(5) == b"12345"
    connection.mark(5 + 1)
    connection.arrives(b"678")  # The next request, which nobody has read.
    connection.worker.close()
    assert list(keeper.died(OWNER + 1)) == []
    ((left, read_bytes),) = keeper.died(OWNER)
    assert read_bytes == 5
    assert left.recv(10) == b"678"
    left.close()
    assert connection.client.recv(1) == b""
    assert list(keeper.died(OWNER)) == []


@pytest.mark.parametrize("mark", [PENDING, 1])
def test_a_request_that_was_read_is_refused(events: Events, keeper: Keeper, connection: Connection, mark: int) -> None:
    """Also if the worker had no time to mark that it had read it."""
    connection.arrives(b"12345")
    assert connection.worker.recv(5) == b"12345"
    connection.mark(mark)
    connection.worker.close()
    assert list(keeper.died(OWNER)) == []
    connection.client.sendall(b"the rest of its body")  # Does not reset the connection.
    answer = http.client.HTTPResponse(connection.client)
    answer.begin()
    assert (answer.status, answer.getheader("connection"), answer.getheader("retry-after")) == (503, "close", "1")
    assert json.loads(answer.read())["error"]["type"] == "draining"
    connection.client.close()
    events.wait()  # Reads to the end, and lets go.
    events.wait()


def test_a_part_of_an_answer_is_followed_by_nothing(keeper: Keeper, connection: Connection) -> None:
    connection.worker.sendall(b"HTTP/1.1 200 OK")
    connection.mark(ANSWERING)
    connection.worker.close()
    assert list(keeper.died(OWNER)) == []
    assert connection.client.recv(100) == b"HTTP/1.1 200 OK"
    assert connection.client.recv(100) == b""


def test_a_connection_that_its_worker_closes_is_let_go(events: Events, keeper: Keeper, connection: Connection) -> None:
    connection.worker.shutdown(socket.SHUT_RDWR)
    connection.worker.close()
    assert connection.client.recv(1) == b""  # At once, whatever is kept.
    events.wait()
    assert keeper.forget(connection.number) is None
    assert keeper.number(0) == connection.number


def test_numbers_and_what_is_not_kept(events: Events) -> None:
    nobody = Keeper(events, keep=False)
    assert nobody.number(0) == -1
    with contextlib.closing(socket.socket()) as sock:
        duplicate = sock.dup()
        nobody.keep(-1, OWNER, duplicate)
        assert duplicate.fileno() == -1
    nobody.unused(-1)
    assert nobody.number(0) == -1
    assert nobody.forget(-1) is None


def test_what_cannot_be_asked_is_not_idle() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert not is_idle(one, 1)


def test_a_killed_worker_and_a_connection_that_is_kept(tiny_bundle: BundleMaker) -> None:
    with workers(tiny_bundle("bert", "feature-extraction")) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.port)) for _ in range(4)]
        for client in clients:
            assert client("POST", "/embed", {"inputs": "a"}).status == 200
        sockets = [client.connection.sock for client in clients]
        # Stopped, so that what comes is certainly not read.
        for pid in server.pids[:1]:
            os.kill(pid, signal.SIGSTOP)
            for client in clients:
                client.send("POST", "/embed", {"inputs": "a"})
            os.kill(pid, signal.SIGKILL)
        for client in clients:
            assert client.read().status == 200
        assert [client.connection.sock for client in clients] == sockets
        # Half of a request: it goes on with another worker, or is refused, as far as it was read.
        body = json.dumps({"inputs": "a"}).encode()
        head = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        halves = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20)) for _ in range(4)]
        for sock in halves:
            sock.sendall(head)
        time.sleep(0.1)
        for pid in server.pids:
            os.kill(pid, signal.SIGKILL)
        for sock in halves:
            with contextlib.suppress(OSError):
                sock.sendall(body)
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            assert answer.status in (200, 503)
        wait_until(lambda: server.metric("serve_workers") == 2, 20)
        stack.close()
        assert server.stop()[0] == 0
