"""What a worker is started for."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from ...bundle import MANIFEST_FILE

if TYPE_CHECKING:
    from ...bundle import Manifest

__all__ = ["CHANGED", "Job", "digest"]

CHANGED = 3
"""Exit code of a worker that found another bundle than it was started for."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The first message to a worker; descriptors of the board and, if there are any, of the weights come with it.

    Attributes:
        argv: Options of the server.
        bundle: SHA-256 of the manifest.
        choice: Fields of the `Choice` of the variant.
        slot: Its place on the board.
        workers: How many there are.
        threads: Threads of the engine.
        cpus: CPUs that it is bound to; none: it is not.
        pin: Bind each thread of the engine to one of them.
    """

    argv: list[str]
    bundle: str
    choice: dict[str, Any]
    slot: int
    workers: int
    threads: int
    cpus: tuple[int, ...]
    pin: bool


def digest(manifest: Manifest) -> str:
    """SHA-256 of a bundle's manifest, which has those of its files."""
    return hashlib.sha256((manifest.root / MANIFEST_FILE).read_bytes()).hexdigest()
