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
    """The first message to a worker.

    Descriptors come with it: of the board, of the meters of API keys, of the marks of connections, of copies of files,
    and of shared weights.

    Attributes:
        argv: Options of the server.
        models: Of each model what `prepare` says of it: the digest of its bundle (`bundle`), the fields of the
            `Choice` of its variant (`choice`), whether a descriptor of its weights comes with the job (`shared`).
        files: Options whose files come with the job, as copies.
        slot: Its place on the board.
        workers: How many there are.
        threads: Threads of the engine.
        cpus: CPUs that it is bound to; none: it is not.
        pin: Bind each thread of the engine to one of them.
    """

    argv: list[str]
    models: list[dict[str, Any]]
    files: list[str]
    slot: int
    workers: int
    threads: int
    cpus: tuple[int, ...]
    pin: bool


def digest(manifest: Manifest) -> str:
    """What changes with a bundle, or with a model that was not exported: a SHA-256.

    Of a bundle, that of its manifest, which has those of its files; of a model, that of the names, sizes and times of
    its files.
    """
    path = manifest.root / MANIFEST_FILE
    if path.exists():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = ((str(file.relative_to(manifest.root)), file.stat()) for file in sorted(manifest.root.rglob("*")))
    listed = [(name, state.st_size, state.st_mtime_ns) for name, state in files]
    return hashlib.sha256(repr(listed).encode()).hexdigest()
