"""Files that say who may connect, as the options name them; read at start, and when everything is loaded again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..keys import Key, KeysError, read_keys
from .process import UsageError

if TYPE_CHECKING:
    import ssl

    from .tls import Tls

__all__ = ["FILES", "open_tls", "read_api_keys", "read_tls"]

FILES = ("api_keys_file", "tls_cert", "tls_key")
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


def open_tls(arguments: argparse.Namespace) -> Tls | None:
    """What clients are shown by `--tls-cert` and `--tls-key`; None without them.

    Raises:
        UsageError: They are wrong.
    """
    if arguments.tls_cert is None:
        if arguments.tls_key is not None:
            raise UsageError("--tls-key: expected --tls-cert beside it, got none")
        return None
    from .tls import Tls, TlsError

    try:
        return Tls(arguments.tls_cert, arguments.tls_key)
    except TlsError as error:
        raise UsageError(str(error)) from error


def read_tls(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    """The certificate and its key as they are on disk now; see `open_tls`.

    Raises:
        UsageError: They are wrong.
    """
    tls = open_tls(arguments)
    return None if tls is None else tls.context
