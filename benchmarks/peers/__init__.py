"""Servers that people would take instead: one row each, and one script that serves a model as its documentation does.

A peer's script takes a model's folder, `--threads` and `--port`, answers one text a request by the unit vector of its
mean pooling, and prints `serving NAME on http://127.0.0.1:PORT` when it is ready. It runs in an environment of its own
below `.venv/peers`, made when it is first needed, since peers pin versions that exclude each other.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["NATIVE", "PEERS", "Api", "Peer"]

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv" / "peers"


def _embeddings(answer: Any) -> list[float]:
    return list(answer["embeddings"][0])


@dataclass(frozen=True)
class Api:
    """How a server is asked for the vector of a text.

    Attributes:
        path: Of the route.
        body: The request for one text.
        vector: The text's vector, from the answer.
    """

    path: str = "/api/embed"
    body: Callable[[str], Any] = lambda text: {"inputs": text}
    vector: Callable[[Any], list[float]] = _embeddings

    def embed(self, port: int, text: str) -> list[float]:
        """The vector of a text, from a server that listens.

        Raises:
            SystemExit: It answers anything but 200.
        """
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", self.path, json.dumps(self.body(text)), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        if response.status != 200:
            raise SystemExit(f"POST {self.path}: expected 200, got {response.status}: {answer[:300]!r}")
        return self.vector(json.loads(answer))

    def requests(self, texts: Sequence[str]) -> list[bytes]:
        """HTTP requests, one text each."""
        return [_post(self.path, self.body(text)) for text in texts]


NATIVE = Api()
"""How this project's servers are asked, and those whose script is free to choose."""


@dataclass(frozen=True)
class Peer:
    """A server to compare with.

    Attributes:
        name: As in the table.
        script: In this folder.
        requirements: What its environment has beside torch; None: the script runs in this project's own.
        api: How it is asked.
        onnx: Whether the script gets a folder with `model.onnx` instead of the model's.
    """

    name: str
    script: str
    requirements: tuple[str, ...] | None
    api: Api = NATIVE
    onnx: bool = False

    def command(self, model: str, bundle: str) -> list[str]:
        """What starts it; `--threads` and `--port` are still to be added.

        Args:
            model: The model's folder.
            bundle: A folder with its `model.onnx`.
        """
        return [str(self.python()), str(Path(__file__).parent / self.script), bundle if self.onnx else model]

    def python(self) -> Path:
        """The interpreter of its environment, which is made if it is not there.

        Raises:
            subprocess.CalledProcessError: Its packages cannot be installed.
        """
        if self.requirements is None:
            return Path(sys.executable)
        folder = ENVIRONMENTS / Path(self.script).stem
        python = folder / "bin" / "python"
        complete = folder / ".complete"
        wanted = "\n".join(self.requirements)
        if not complete.exists() or complete.read_text(encoding="utf-8") != wanted:
            print(f"== {self.name}: installing {', '.join(self.requirements)}", file=sys.stderr)
            uv = [sys.executable, "-m", "uv"]
            subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
            install = [*uv, "pip", "install", "--quiet", "--python", str(python), f"torch=={_torch()}"]
            subprocess.run([*install, *self.requirements], check=True)
            complete.write_text(wanted, encoding="utf-8")
        return python


def _post(path: str, body: Any) -> bytes:
    """A POST request with a JSON body, as bytes."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _torch() -> str:
    """The version of torch in this environment, without the build's name: every peer gets the same."""
    return importlib.metadata.version("torch").partition("+")[0]


PEERS = (
    Peer("sentence-transformers, FastAPI", "sentence_transformers_fastapi.py", None),
    Peer("ONNX Runtime fp32, FastAPI", "onnxruntime_fastapi.py", None, onnx=True),
    Peer(
        "Infinity",
        "infinity.py",
        ("infinity-emb[server,torch]==0.0.78", "transformers<4.58", "click<8.2"),
        Api(
            "/embeddings",
            lambda text: {"model": "model", "input": text},
            lambda answer: list(answer["data"][0]["embedding"]),
        ),
    ),
    Peer("LitServe", "litserve_server.py", ("litserve>=0.2.16,<0.3", "sentence-transformers>=5,<7")),
    Peer(
        "BentoML",
        "bentoml_server.py",
        ("bentoml>=1.4,<2", "sentence-transformers>=5,<7"),
        Api(body=lambda text: {"texts": [text]}, vector=lambda answer: list(answer[0])),
    ),
    Peer("Ray Serve", "ray_serve.py", ("ray[serve]>=2.50,<3", "sentence-transformers>=5,<7")),
)
"""In the order of the table. Where a peer makes batches by itself, that is on: of at most 32 texts, within 5 ms if that
can be set."""
