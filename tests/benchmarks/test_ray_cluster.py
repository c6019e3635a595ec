"""benchmarks/ray_cluster.py without Ray: what its clients do when they are refused; how a death is judged."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.ray_cluster import Answer, Client, judge


def test_clients_come_back_when_they_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [
        b"HTTP/1.1 429 x\r\nRetry-After: 7\r\n",
        b"HTTP/1.1 503 x\r\n",
        b"HTTP/1.1 500 x\r\n",
        b"HTTP/1.1 200 OK\r\n",
    ]
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while heads:
            await reader.readuntil(b"\r\n\r\n{}")
            writer.write(heads.pop(0) + b"Content-Length: 2\r\n\r\nok")
        writer.close()
        await writer.wait_closed()

    async def ask() -> Answer:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            monkeypatch.setattr(asyncio, "sleep", sleep)
            client = Client(server.sockets[0].getsockname()[1], b"{}")
            try:
                return await client.insist()
            finally:
                await client.close()

    answer = asyncio.run(ask())
    assert (answer.status, answer.refused, answer.broken) == (200, 2, 1)
    assert 7 <= waits[0] <= 10.5
    assert 1 <= waits[1] <= 1.5, "without the header, a second"


def steady(first_s: int, last_s: int, took_s: float, status: int = 200, refused: int = 0) -> list[Answer]:
    """Ten requests a second."""
    times = [second + tenth / 10 for second in range(first_s, last_s) for tenth in range(10)]
    return [Answer(sent_s, sent_s + took_s, status, refused) for sent_s in times]


def test_what_a_death_costs() -> None:
    """Killed at 20 s; two were in flight; then 12 s of long waits, in which one request is lost."""
    answers = steady(0, 20, 0.15) + steady(20, 32, 3, refused=1) + steady(32, 60, 0.1)
    answers += [
        Answer(25.0, 30.0, "IncompleteReadError"),
        Answer(19.95, 21.0, 200, broken=1),
        Answer(20.5, 22.0, 200, 0, 1),
    ]
    found = judge(answers, 20.0 - 1e-6)
    assert found["in_flight_at_kill"] == 2
    assert (found["lost"], found["broken_in_flight"], found["broken_later"]) == (1, 1, 1)
    assert found["last_broken_sent_after_s"] == pytest.approx(0.5, abs=1e-3)
    assert found["lost_statuses"] == ["IncompleteReadError"]
    assert found["refused_at_first"] == 120
    assert found["longest_before_s"] == pytest.approx(0.15)
    assert found["as_before_after_s"] == 15.0, "the end of the last window of 5 s with long waits"


def test_a_death_that_nobody_notices() -> None:
    assert judge(steady(0, 60, 0.1), 20.0)["as_before_after_s"] == 0.0
