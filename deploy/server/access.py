"""Files that say who may connect, as the options name them; read at start, and when everything is loaded again."""

from __future__ import annotations

import argparse

from ..keys import Key, KeysError, read_keys
from .process import UsageError

__all__ = ["FILES", "read_api_keys"]

FILES = ("api_keys_file",)
"""Options that name such files. The supervisor of several workers keeps a copy of each, so that a worker that is
started later has what the others have."""


def read_api_keys(arguments: argparse.Namespace) -> tuple[Key, ...]:
    """The keys of `--api-keys-file`; none without it.

    Raises:
        UsageError: The file is wrong.
    """
    if arguments.api_keys_file is None:
        return ()
    try:
        return read_keys(arguments.api_keys_file)
    except KeysError as error:
        raise UsageError(f"--api-keys-file: {error}") from error
