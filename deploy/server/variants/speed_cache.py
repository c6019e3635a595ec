"""Measured speeds of variants, kept between starts: one small file per bundle, machine and set of versions.

Standard library only. A folder that cannot be used costs a measurement, never a failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...bundle import MANIFEST_FILE, Manifest
from ...machine import versions

__all__ = ["CACHE_VARIABLE", "SpeedCache", "default_folder", "fingerprint"]

log = logging.getLogger("deploy.server")

CACHE_VARIABLE = "DEPLOY_CACHE_DIR"
OFF = "none"
FORMAT = 1

# What decides on kernels and threads without being an option of the server.
_VARIABLES = (
    *("TORCH_EXT_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "THP_MEM_ALLOC_ENABLE"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
)
# Fields of /proc/cpuinfo that are the same at every look; frequencies are not.
_CPU_FIELDS = frozenset(
    {"vendor_id", "model name", "cpu family", "model", "stepping", "flags"}
    | {"CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"}
)


def default_folder(environ: Mapping[str, str]) -> Path | None:
    """Where measurements are kept unless an option says otherwise.

    Args:
        environ: Variables; `DEPLOY_CACHE_DIR`, else `XDG_CACHE_HOME`, else `HOME` decides.

    Returns:
        A folder that need not exist; None if it is switched off (`none`) or there is no home.
    """
    if chosen := environ.get(CACHE_VARIABLE):
        return None if chosen == OFF else Path(chosen)
    for variable, below in (("XDG_CACHE_HOME", ""), ("HOME", ".cache")):
        base = Path(environ.get(variable) or ".", below)
        if base.is_absolute():
            return base / "torch-ext" / "serve"
    return None


def _extension_digest() -> str:
    """SHA-256 of torch_ext's runtime: its version alone stays the same in a checkout that is built again."""
    package = importlib.util.find_spec("torch_ext")
    if package is None or package.origin is None:
        return "none"
    digest = hashlib.sha256()
    for path in sorted(Path(package.origin).parent.glob("*runtime*.so")):
        with contextlib.suppress(OSError):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _cpu() -> list[str]:
    """Model and features of the CPUs, each different line once."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return sorted({" ".join(line.split()) for line in lines if line.partition(":")[0].strip() in _CPU_FIELDS})


def fingerprint(manifest: Manifest, names: Sequence[str], threads: int) -> dict[str, Any]:
    """Everything that the speeds depend on; measurements are kept under its digest.

    Args:
        manifest: The bundle.
        names: The candidates.
        threads: Threads of the engine.

    Raises:
        OSError: The manifest cannot be read.
    """
    return {
        "format": FORMAT,
        "manifest": hashlib.sha256((manifest.root / MANIFEST_FILE).read_bytes()).hexdigest(),
        "candidates": list(names),
        "threads": threads,
        "machine": platform.machine(),
        "cpu": _cpu(),
        "versions": versions(),
        "torch_ext_library": _extension_digest(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


class SpeedCache:
    """The kept measurement of one fingerprint.

    Attributes:
        path: Its file, or None if nothing is kept.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self._key = dict(key)
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self.path = None if folder is None else folder / f"speed-{digest[:32]}.json"

    def load(self) -> tuple[dict[str, float], dict[str, str]] | None:
        """Measured texts/s by variant and what was left out, or None. A damaged file is ignored with a warning."""
        if self.path is None:
            return None
        try:
            text = self.path.read_bytes()
        except OSError:
            return None
        try:
            value = json.loads(text)
            names = set(self._key["candidates"])
            speeds = {str(name): float(speed) for name, speed in value["texts_per_s"].items()}
            left_out = {str(name): str(reason) for name, reason in value["left_out"].items()}
            right = bool(speeds) and set(speeds) | set(left_out) == names and not set(speeds) & set(left_out)
            if value["key"] != self._key or not right or not all(0 < speed < math.inf for speed in speeds.values()):
                raise ValueError("not a measurement of this bundle on this machine")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s: damaged (%s); the variants are measured again", self.path, error)
            return None
        return speeds, left_out

    def save(self, texts_per_s: Mapping[str, float], left_out: Mapping[str, str]) -> None:
        """Keeps a measurement, complete or not at all; where the folder cannot be written, the log says so."""
        import tempfile  # With what it imports, 5 ms that other starts need not spend.

        if self.path is None:
            return
        value = {"texts_per_s": dict(texts_per_s), "left_out": dict(left_out), "key": self._key}
        written: str | None = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            number, written = tempfile.mkstemp(dir=self.path.parent, prefix=".speed-")
            with os.fdopen(number, "w", encoding="utf-8") as stream:
                json.dump(value, stream, indent=1)
            os.replace(written, self.path)
        except OSError as error:
            log.warning(
                "%s cannot be written (%s), so every start measures the variants; name a folder by --cache-dir, or a "
                "variant by --variant",
                self.path,
                error.strerror or error,
            )
            if written is not None:
                with contextlib.suppress(OSError):
                    os.unlink(written)
