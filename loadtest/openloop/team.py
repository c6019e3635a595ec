"""Several processes, here or on other machines, that make one load together: one leads, the others work.

They talk in lines of JSON over TCP. The leader makes no load itself. It is told every second that a worker lives; a
worker that leaves, or is silent for `SILENCE_S`, makes the run void.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from loadtest.options import CannotStartError
from loadtest.tasks import Traits

from .engine import Load, Outcome
from .options import Settings

__all__ = ["Team", "lead", "work"]

SILENCE_S = 10.0
"""A worker is lost if nothing was heard of it for so long."""

_LINE_LIMIT = 1 << 28
_START_S = 0.2
_HEARTBEAT_S = 1.0


class _Worker:
    """A worker as its leader sees it."""

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self._reader = reader
        self._writer = writer

    def tell(self, message: dict[str, Any]) -> None:
        if self._writer.is_closing():
            return
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def hear(self, kind: str) -> Any:
        """Waits for a message; heartbeats in between only show that the worker lives.

        Raises:
            ConnectionError: The worker is lost; the message says how.
        """
        while True:
            try:
                line = await asyncio.wait_for(self._reader.readline(), SILENCE_S)
            except (asyncio.TimeoutError, OSError) as error:
                raise ConnectionError(f"was not heard of for {SILENCE_S:g} s") from error
            if not line:
                raise ConnectionError("left during the run (its own output says why)")
            message = json.loads(line)
            if "error" in message:
                raise CannotStartError(f"worker {self.name}: {message['error']}")
            if kind in message:
                return message[kind]

    async def leave(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class Team:
    """Who makes the load: this process alone if there are no workers."""

    def __init__(self, workers: list[_Worker]) -> None:
        self._workers = workers
        self._load: Load | None = None

    def stop(self) -> None:
        """Ends the run before its time; what is under way still counts."""
        if self._load is not None:
            self._load.stop()
        for worker in self._workers:
            worker.tell({"stop": True})

    async def run(self, settings: Settings, traits: Traits) -> Outcome:
        """Makes a load.

        Args:
            settings: What is sent, and when.
            traits: What was learnt of the server.

        Returns:
            What all did together.

        Raises:
            CannotStartError: It cannot start here, or at a worker.
        """
        if not self._workers:
            self._load = Load(settings, traits)
            return await self._load.run()
        count = len(self._workers)
        plan = {"settings": dataclasses.asdict(settings), "traits": dataclasses.asdict(traits), "workers": count}
        for index, worker in enumerate(self._workers):
            worker.tell({"plan": plan, "index": index})
        try:
            await asyncio.gather(*(worker.hear("ready") for worker in self._workers))
        except ConnectionError as error:
            raise CannotStartError(f"a worker {error}") from error
        for worker in self._workers:
            worker.tell({"start": _START_S})
        results = await asyncio.gather(*map(self._result_of, self._workers), return_exceptions=True)
        whole = Outcome(workers=0)
        whole.record.warm_up_s = settings.warm_up_s
        for result in results:
            if isinstance(result, BaseException):
                if not isinstance(result, ConnectionError):
                    raise result
                whole.lost.append(f"{result}; run the test again")
            else:
                whole.merge(Outcome.from_wire(result))
        return whole

    async def _result_of(self, worker: _Worker) -> dict[str, Any]:
        """What a worker did; if it is lost, the others end at once, since the rest of the run would be waste."""
        try:
            found: dict[str, Any] = await worker.hear("outcome")
        except ConnectionError as error:
            reason = f"worker {worker.name} {error}: its part of the load is missing"
            print(f"loadtest: the run is void: {reason}", file=sys.stderr, flush=True)
            self.stop()
            raise ConnectionError(reason) from error
        return found


def _start_worker(address: str) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    return subprocess.Popen(
        [sys.executable, "-m", "loadtest", "worker", "--join", address],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


@contextlib.asynccontextmanager
async def lead(processes: int, others: int, max_wait_s: float, bind: str) -> AsyncIterator[Team]:
    """Gathers a team.

    Args:
        processes: How many processes of this machine make load; 1 and no others means this one.
        others: How many workers to wait for that somebody else starts.
        max_wait_s: How long.
        bind: Host and port where they connect to.

    Raises:
        CannotStartError: They did not all come in time.
    """
    if processes <= 1 and not others:
        yield Team([])
        return
    host, _, port = bind.rpartition(":")
    arrived: asyncio.Queue[_Worker] = asyncio.Queue()

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError, asyncio.TimeoutError):
            hello = json.loads(await asyncio.wait_for(reader.readline(), SILENCE_S))
            await arrived.put(_Worker(str(hello["hello"]), reader, writer))

    try:
        server = await asyncio.start_server(welcome, host or "127.0.0.1", int(port), limit=_LINE_LIMIT)
    except (OSError, ValueError, OverflowError) as error:
        raise CannotStartError(f"--bind: expected HOST:PORT of this machine, got {bind!r}: {error}") from error
    bound_host, bound_port = server.sockets[0].getsockname()[:2]
    own = 0 if processes <= 1 else processes
    children = [_start_worker(f"{bound_host}:{bound_port}") for _ in range(own)]
    team: list[_Worker] = []
    try:
        if others:
            print(f"loadtest: waiting for {others} workers at {bound_host}:{bound_port}", file=sys.stderr, flush=True)
        deadline_s = time.monotonic() + max_wait_s
        while len(team) < own + others:
            try:
                team.append(await asyncio.wait_for(arrived.get(), max(0.0, deadline_s - time.monotonic())))
            except asyncio.TimeoutError as error:
                raise CannotStartError(
                    f"expected {own + others} workers within {max_wait_s:g} s, got {len(team)}: do the others run, and "
                    f"is their --join right? They connect to {bound_host}:{bound_port}"
                ) from error
        yield Team(team)
    finally:
        for worker in team:
            await worker.leave()
        server.close()
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(child.wait, 5)
            child.kill()
            child.wait()


async def work(address: str) -> int:
    """Works for a leader until it hangs up.

    Args:
        address: Where the leader listens, host and port.

    Returns:
        Exit code: 0 if the leader ended it, 2 if it could not be reached or went during a run.
    """
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), limit=_LINE_LIMIT)
    except (OSError, ValueError, OverflowError) as error:
        print(f"loadtest: cannot join {address!r}, expected HOST:PORT of a leader: {error}", file=sys.stderr)
        return 2

    def tell(message: dict[str, Any]) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    async def beat() -> None:
        while True:
            tell({"alive": True})
            await asyncio.sleep(_HEARTBEAT_S)

    tell({"hello": f"{os.uname().nodename}_{os.getpid()}"})
    heart = asyncio.create_task(beat())
    load: Load | None = None
    running: asyncio.Task[None] | None = None

    async def run(ready: Load, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        try:
            tell({"outcome": (await ready.run()).to_wire()})
        except CannotStartError as error:
            tell({"error": str(error)})

    try:
        while line := await reader.readline():
            message = json.loads(line)
            if "plan" in message:
                plan = message["plan"]
                try:
                    settings = Settings.from_values(plan["settings"])
                    load = await asyncio.to_thread(
                        Load, settings, Traits(**plan["traits"]), message["index"], plan["workers"]
                    )
                    tell({"ready": True})
                except CannotStartError as error:
                    tell({"error": str(error)})
            elif "start" in message and load is not None:
                running = asyncio.create_task(run(load, float(message["start"])))
            elif "stop" in message and load is not None:
                load.stop()
    except OSError:
        pass
    finally:
        heart.cancel()
        writer.close()
    if running is not None and not running.done():
        running.cancel()
        print("loadtest: the leader went during the run", file=sys.stderr)
        return 2
    return 0
