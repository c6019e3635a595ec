"""The files of a bundle: which names they may have, what a manifest says of each, and whether that is true."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle.fields import FORMAT, MANIFEST_FILE, BundleError, Reader

__all__ = ["FileEntry", "check_file", "check_file_name", "check_format", "file_entry", "owned_files", "read_json"]

_MAX_MANIFEST_BYTES = 16 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HOW_TO_EXPORT = "python -m deploy export MODEL -o DIR"


@dataclass(frozen=True)
class FileEntry:
    """What a file of the bundle has to be.

    Attributes:
        sha256: 64 lower-case hexadecimal digits.
        bytes: Size.
    """

    sha256: str
    bytes: int

    @classmethod
    def read(cls, reader: Reader) -> FileEntry:
        """Reads its JSON object."""
        sha256 = reader.string("sha256")
        if not _SHA256.fullmatch(sha256):
            raise BundleError(f"{reader.where}.sha256: expected 64 hexadecimal digits, got {sha256!r}")
        return cls(sha256, reader.count("bytes"))


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    size = 0
    buffer = bytearray(1 << 20)
    with path.open("rb") as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return FileEntry(digest.hexdigest(), size)


def read_json(root: Path) -> Any:
    """The content of a folder's manifest, unchecked."""
    path = root / MANIFEST_FILE
    if not root.is_dir():
        kind = "a file" if root.exists() else "no such folder"
        raise BundleError(f"{root}: expected the folder of a bundle, found {kind}; make one with: {_HOW_TO_EXPORT}")
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: expected at most {_MAX_MANIFEST_BYTES} bytes, got {path.stat().st_size}")
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{root}: not a bundle (no {MANIFEST_FILE}); make one with: {_HOW_TO_EXPORT}") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path}: expected JSON in UTF-8 ({error}); export the model again") from error
    return value


def owned_files(folder: Path) -> frozenset[str]:
    """Names of the files that a bundle's manifest owns, its own included; what else the folder holds is somebody's.

    Neither the files nor the rest of the manifest are checked: a damaged bundle, or one of another version, owns its
    files, too.

    Args:
        folder: Folder of the bundle.

    Raises:
        BundleError: The folder is not a bundle, or the manifest names files outside of it.
    """
    top = Reader(str(folder / MANIFEST_FILE), read_json(folder))
    check_format(top)
    files = top.child("files")
    return frozenset({MANIFEST_FILE, *(check_file_name(files.where, name) for name in files.value)})


def check_file(path: Path, entry: FileEntry, verify: bool) -> None:
    """Compares a file with its entry: kind, size, and with `verify` the SHA-256.

    Raises:
        BundleError: It is missing, cannot be read, or differs.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path}: expected a regular file; copy or export the bundle again")
        if status.st_size != entry.bytes:
            raise BundleError(
                f"{path}: expected {entry.bytes} bytes, got {status.st_size}; the file is truncated or was replaced: "
                "copy or export the bundle again"
            )
        if verify and (found := file_entry(path)).sha256 != entry.sha256:
            raise BundleError(
                f"{path}: expected SHA-256 {entry.sha256}, got {found.sha256}; the file was changed after the export: "
                "copy or export the bundle again"
            )
    except FileNotFoundError:
        raise BundleError(f"{path}: listed in the manifest but missing; copy or export the bundle again") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_file_name(where: str, name: str) -> str:
    """Accepts plain names only: nothing that leads out of the folder, nor a hidden file."""
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST_FILE:
        raise BundleError(f"{where}: expected the plain name of a file in the bundle, got {name!r}; refused")
    return name


def check_format(top: Reader) -> None:
    """Refuses what is not the manifest of a bundle of any version."""
    found = top.value.get("format")
    if found != FORMAT:
        raise BundleError(f"{top.where}: expected format {FORMAT!r}, got {found!r}; this is not a bundle")
