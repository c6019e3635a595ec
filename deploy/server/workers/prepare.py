"""Prepares bundles for all workers: verifies them, chooses variants, and packs weights where they can be mapped.

    python -m deploy.server.workers.prepare FD

where FD is its end of a channel. It is a process of its own, so that a bundle that is broken takes nothing down, and
that what loading needs is given back when it ends.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ...bundle import BundleError
from ...extras import missing
from ..access import FILES, open_tls, read_api_keys
from ..cli import parse
from ..loading import begin
from ..logs import start_logging
from ..process import Process, UsageError, settle_threads
from .channel import Channel
from .job import digest

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def _end_with(parent: int) -> None:
    """Ends this process when its parent does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _prepare(arguments: argparse.Namespace, threads: int) -> tuple[list[dict[str, Any]], list[int]]:
    """What the supervisor is told of each model, and the descriptors of the weights that can be shared.

    Raises:
        BundleError: A bundle cannot be served.
        UsageError: An option is wrong.
    """
    models, images = [], []
    for one in begin(arguments, Process(), threads):
        digest_then = digest(one.manifest)
        one.begin(open_known=False)
        tokenizer = one.verified()
        one.selection.prepare(tokenizer.vocab_size, arguments.measure_limit_s)
        image = one.share()
        if image is not None:
            images.append(image)
        models.append(
            {
                "name": one.name,
                "task": one.manifest.task,
                "bundle": digest_then,
                "choice": dataclasses.asdict(one.selection.decide()),
                "shared": image is not None,
            }
        )
    return models, images


def _copies(arguments: argparse.Namespace) -> dict[str, int]:
    """Descriptors of copies of the files of `access`, by their options.

    Raises:
        UsageError: A file cannot be read.
    """
    copies: dict[str, int] = {}
    for name in FILES:
        path = getattr(arguments, name)
        if path is None:
            continue
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UsageError(f"--{name.replace('_', '-')}: {path} cannot be read: {error.strerror}") from error
        copies[name] = os.memfd_create(f"deploy-{name}", os.MFD_CLOEXEC)
        with open(copies[name], "wb", closefd=False) as copy:
            copy.write(data)
    return copies


def main(fd: int) -> int:
    """Prepares, tells the supervisor, and ends.

    Args:
        fd: Descriptor of the channel.
    """
    channel = Channel.inherited(fd)
    message = channel.receive()
    if message is None:
        return 0
    _end_with(message.values["parent"])
    threads = message.values["threads"]
    settle_threads(threads)
    arguments = parse(message.values["argv"])
    start_logging(arguments.json_output)
    try:
        read_api_keys(arguments)
        open_tls(arguments)
        copies = _copies(arguments)
        models, images = _prepare(arguments, threads)
    except (BundleError, UsageError) as error:
        channel.send("failed", {"reason": str(error)})
        return 2
    except ModuleNotFoundError as error:
        channel.send("failed", {"reason": missing(error, "serve")})
        return 2
    except Exception as error:  # What the engine says of a file.
        channel.send("failed", {"reason": f"the bundle cannot be loaded: {type(error).__name__}: {error}"})
        return 2
    channel.send("prepared", {"models": models, "files": list(copies)}, [*copies.values(), *images])
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
