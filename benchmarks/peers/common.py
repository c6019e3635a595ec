"""What every peer's script needs; their environments have neither this project nor its packages."""

from __future__ import annotations

import argparse
import os
import socket
import threading
import time
import urllib.error
import urllib.request

__all__ = ["BATCH", "BATCH_S", "announce_when_ready", "arguments", "free_port"]

BATCH = 32
BATCH_S = 0.005


def arguments() -> argparse.Namespace:
    """`model`, `threads` and `port`; the threads of OpenMP are set, so call it before torch is imported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="the model's folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    found = parser.parse_args()
    found.port = found.port or free_port()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(found.threads)
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def announce_when_ready(name: str, port: int, path: str = "/health") -> None:
    """Prints the line that the benchmark waits for, as soon as a path is answered with 200; returns at once."""

    def wait() -> None:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
                    break
            except (OSError, urllib.error.HTTPError):
                time.sleep(0.1)
        print(f"serving {name} on http://127.0.0.1:{port}", flush=True)

    threading.Thread(target=wait, daemon=True).start()
