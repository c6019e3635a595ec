"""Prepares a bundle for all workers: verifies it, chooses the variant, and packs its weights where they can be mapped.

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
from typing import Any

from ...bundle import BundleError, check_config, load_manifest
from ..cli import parse
from ..model import describe
from ..process import UsageError, missing, settle_threads, start_logging
from ..tei_options import fit_manifest
from ..variants import Selection
from .channel import Channel
from .job import digest

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def _end_with(parent: int) -> None:
    """Ends this process when its parent does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _prepare(arguments: argparse.Namespace, threads: int) -> tuple[dict[str, Any], int | None]:
    """The message for the supervisor, and the descriptor of the weights if they can be shared.

    Raises:
        BundleError: The bundle cannot be served.
    """
    from ...engines.open import load_engine
    from ..service import TextTokenizer

    manifest, exported = describe(arguments.model, arguments.task)
    fit_manifest(manifest, arguments)  # Refuses another pooling, and takes the variant of --dtype.
    known = digest(manifest)
    selection = Selection(manifest, arguments.variant, threads, arguments.cache_dir)
    if exported:
        manifest = load_manifest(manifest.root, verify=True, variants=selection.names)
        check_config(manifest)
    tokenizer = TextTokenizer.from_manifest(manifest)
    selection.prepare(tokenizer.vocab_size, arguments.measure_limit)
    choice = selection.decide()
    engine, isa = load_engine(manifest, manifest.variant(choice.variant), threads, tokenizer.token, shared=True)
    message = {
        "name": manifest.model.name,
        "task": manifest.task,
        "bundle": known,
        "choice": dataclasses.asdict(choice),
        "isa": isa,
    }
    return message, engine.share()


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
        prepared, image = _prepare(arguments, threads)
    except (BundleError, UsageError) as error:
        channel.send("failed", {"reason": str(error)})
        return 2
    except ModuleNotFoundError as error:
        channel.send("failed", {"reason": missing(error)})
        return 2
    except Exception as error:  # What the engine says of a file.
        channel.send("failed", {"reason": f"the bundle cannot be loaded: {type(error).__name__}: {error}"})
        return 2
    channel.send("prepared", prepared, () if image is None else (image,))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
