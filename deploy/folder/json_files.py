"""JSON files of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.folder.errors import FolderError, first_line, refuse_pointer

__all__ = ["read_json", "read_settings"]

_MOST_JSON_BYTES = 256 << 20
"""The largest files are tokenizers: 33 MB with 262,144 tokens."""


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, of the given kind (`dict` or `list`).

    Raises:
        FolderError: It cannot be read, or is something else.
    """
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise FolderError(f"{path}: expected JSON of at most {_MOST_JSON_BYTES >> 20} MiB; copy the model again")
        data = path.read_bytes()
        refuse_pointer(data, str(path))
        value = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise FolderError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path}: expected JSON: {first_line(error)}") from error
    if not isinstance(value, kind):
        raise FolderError(
            f"{path}: expected a JSON {'object' if kind is dict else 'array'}, got {type(value).__name__}"
        )
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object of a file that a model need not have; empty where there is none.

    Raises:
        FolderError: See `read_json`.
    """
    return dict(read_json(path, dict)) if path.is_file() else {}
