"""Containers for the tests that need an engine."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

DOCKER = os.environ.get("DOCKER", "docker")

# How a careful operator runs the image.
HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")


def docker(*arguments: str, check: bool = True, timeout_s: float = 120) -> str:
    """Runs the client; its output, both streams, without white space at the ends.

    Raises:
        RuntimeError: It failed; the message has its output.
    """
    result = subprocess.run(
        [DOCKER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if check and result.returncode != 0:
        raise RuntimeError(f"{DOCKER} {' '.join(arguments)}: exit code {result.returncode}\n{result.stdout}")
    return result.stdout.strip()


@dataclass(frozen=True)
class Container:
    """A server in a container.

    Attributes:
        name: Of the container.
        url: Where it answers, on 127.0.0.1.
    """

    name: str
    url: str

    def state(self) -> dict[str, Any]:
        """The engine's record of it."""
        state: dict[str, Any] = json.loads(docker("inspect", "--format", "{{json .State}}", self.name))
        return state

    def wait_until_healthy(self, timeout_s: float) -> float:
        """Returns after how many seconds the image's own health check passed.

        Raises:
            RuntimeError: It stopped, is unhealthy, or takes too long; the message has its log.
        """
        started_s = time.monotonic()
        while (waited_s := time.monotonic() - started_s) < timeout_s:
            state = self.state()
            if state["Health"]["Status"] == "healthy":
                return waited_s
            if state["Status"] != "running" or state["Health"]["Status"] == "unhealthy":
                break
            time.sleep(1)
        raise RuntimeError(f"{self.name} is not healthy after {waited_s:.0f} s: {self.state()}\n{self.logs()}")

    def logs(self) -> str:
        """What it has printed."""
        return docker("logs", self.name)

    def post(self, path: str, body: Any, timeout_s: float = 300) -> Any:
        """Sends JSON, and returns the answer's."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def stop(self, timeout_s: int) -> tuple[int, float]:
        """Sends SIGTERM, and SIGKILL after `timeout_s`. Returns the exit code and the seconds it took."""
        started_s = time.monotonic()
        docker("stop", f"--time={timeout_s}", self.name, timeout_s=timeout_s + 60)
        return int(self.state()["ExitCode"]), time.monotonic() - started_s


@contextmanager
def serving(
    image: str, arch: str, bundle: str | None, *arguments: str, options: Sequence[str] = ()
) -> Iterator[Container]:
    """A container with the server; removed at the end, whatever happens.

    Args:
        image: Its tag.
        arch: Docker's name of the architecture.
        bundle: Folder that is mounted; None: the image makes its own.
        arguments: For the server, after the bundle.
        options: More for `docker run`.
    """
    name = f"torch-ext-test-{uuid.uuid4().hex[:12]}"
    docker(
        *("run", "--detach", f"--name={name}", f"--platform=linux/{arch}", *HARDENED, "--publish=127.0.0.1::8000"),
        *([] if bundle is None else [f"--volume={bundle}:/bundle:ro"]),
        *(*options, image, *([] if bundle is None else ["/bundle"]), *arguments),
    )
    try:
        port = docker("port", name, "8000/tcp").splitlines()[0].rsplit(":", 1)[1]
        yield Container(name, f"http://127.0.0.1:{port}")
    finally:
        docker("rm", "--force", "--volumes", name)
