"""API keys: `python -m deploy key` makes one, and the file of `--api-keys-file` has a line for each.

    PREFIX sha256:HEX [requests_per_minute=N] [tokens_per_minute=N] [# whose it is]

The file has no key, only its SHA-256 and its first characters, by which logs name it. A key that was made here has 256
random bits, so that a fast hash is enough: nobody can guess a key to try.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .options import positive

__all__ = ["PREFIX_CHARS", "Key", "KeysError", "digest_of", "main", "parse_keys", "read_keys"]

PREFIX_CHARS = 12
"""How much of a key its line and the log have."""

LEAST_CHARS = 32
"""Shortest key: what is left behind the prefix must not be guessed."""

_LIMITS = ("requests_per_minute", "tokens_per_minute")
_KEY = re.compile(r"[!-~]+")


class KeysError(ValueError):
    """A file of keys is wrong; the message says where, and what was expected."""


@dataclass(frozen=True)
class Key:
    """A line of the file.

    Attributes:
        prefix: First characters of the key.
        digest: SHA-256 of the key.
        requests_per_minute: How many requests it may send; None: any number.
        tokens_per_minute: How many tokens may be computed for it; None: any number.
    """

    prefix: str
    digest: bytes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


def digest_of(key: bytes) -> bytes:
    """What a line has of a key."""
    return hashlib.sha256(key).digest()


def parse_keys(text: str, where: str) -> tuple[Key, ...]:
    """The keys of a file.

    Args:
        text: What it holds.
        where: Its name, for errors.

    Raises:
        KeysError: A line is wrong, two have one prefix, or there is none.
    """
    keys: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        key = _parse_line(words, f"{where}, line {number}")
        if key.prefix in keys:
            raise KeysError(
                f"{where}, line {number}: expected another prefix than {key.prefix}, which a line above has"
            )
        keys[key.prefix] = key
    if not keys:
        raise KeysError(
            f"{where}: expected a line for each key, got none; python -m deploy key --file {where} adds one"
        )
    return tuple(keys.values())


def _parse_line(words: Sequence[str], where: str) -> Key:
    prefix, *rest = words
    digest = re.fullmatch(r"sha256:([0-9a-f]{64})", rest[0]) if rest else None
    if digest is None or len(prefix) != PREFIX_CHARS:
        raise KeysError(
            f"{where}: expected the first {PREFIX_CHARS} characters of a key and sha256:HEX, as python -m deploy key "
            "writes them; a key itself must not be here"
        )
    limits: dict[str, int] = {}
    for word in rest[1:]:
        name, _, value = word.partition("=")
        if name not in _LIMITS or not re.fullmatch(r"[1-9]\d{0,11}", value):
            raise KeysError(f"{where}: expected {' or '.join(f'{limit}=N' for limit in _LIMITS)}, got {word[:60]!r}")
        limits[name] = int(value)
    return Key(prefix, bytes.fromhex(digest[1]), **limits)


def read_keys(path: str) -> tuple[Key, ...]:
    """The keys of a file; see `parse_keys`.

    Raises:
        KeysError: The file cannot be read, too.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{path}: expected a file of API keys that can be read: {error}") from error
    return parse_keys(text, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy key",
        description="Make an API key for python -m deploy serve --api-keys-file. The key goes to standard output, "
        "once: only its hash is kept.",
        epilog="A server takes a changed file on SIGHUP, or on POST /admin/reload.",
    )
    parser.add_argument(
        "--file", metavar="FILE", help="add its line to this file; without it, the line is printed, too"
    )
    parser.add_argument("--name", default="", help="whose it is, for who reads the file")
    parser.add_argument("--requests-per-minute", type=positive, metavar="N", help="default: no limit")
    parser.add_argument("--tokens-per-minute", type=positive, metavar="N", help="default: no limit")
    parser.add_argument(
        "--stdin", action="store_true", help=f"read a key of at least {LEAST_CHARS} characters instead of making one"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Makes a key.

    Args:
        argv: Arguments after `key`.

    Returns:
        The exit code: 2 if a key is too short or the file cannot be written.
    """
    arguments = _parser().parse_args(argv)
    # 8 characters of the prefix are random, too, so that two keys hardly ever share one.
    key = sys.stdin.readline().strip() if arguments.stdin else f"txr_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"
    if len(key) < LEAST_CHARS or _KEY.fullmatch(key) is None:
        expected = f"at least {LEAST_CHARS} printable ASCII characters without blanks"
        print(f"python -m deploy key: expected a key of {expected}, got {len(key)}", file=sys.stderr)
        return 2
    words = [key[:PREFIX_CHARS], f"sha256:{digest_of(key.encode()).hex()}"]
    words += [f"{name}={value}" for name in _LIMITS if (value := getattr(arguments, name)) is not None]
    name = " ".join(arguments.name.split())
    line = " ".join([*words, *([f"# {name}"] if name else [])])
    if arguments.file is None:
        print(line, file=sys.stderr)
    else:
        try:
            _append(arguments.file, line)
        except OSError as error:
            print(f"python -m deploy key: cannot write to {arguments.file}: {error.strerror}", file=sys.stderr)
            return 2
    if not arguments.stdin:
        print(key)
    return 0


def _append(path: str, line: str) -> None:
    """Adds a line, on a line of its own; a new file is its owner's alone."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+", encoding="utf-8") as file:
        text = file.read()
        file.write(f"{'' if not text or text.endswith(chr(10)) else chr(10)}{line}\n")
