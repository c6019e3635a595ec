"""Real text for accuracy checks, load tests and benchmarks, without a download.

Every Python carries it: the docstrings of its standard library. They are English prose mixed with names and code, and
ragged: from a few words to pages. The sources are parsed, never imported, so nothing of them runs. For one version of
Python, a count and a seed always give the same texts.

Needs the standard library only: load generators import this module where neither torch nor transformers is installed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["TextsError", "docstrings", "load_texts", "sample"]

MIN_CHARS = 12
"""Shorter docstrings are dropped: they say nothing that a model could embed."""

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "config", "dist-packages", "idlelib", "idle_test", "lib2to3", "site-packages", "test", "tests"}
    | {"turtledemo", "ensurepip"}
)


class TextsError(ValueError):
    """Texts are missing or cannot be read; the message says what was expected and what to do."""


def _sources(root: Path) -> Iterator[Path]:
    """Yields the modules of the standard library below `root`, in an order that does not depend on the file system."""
    for entry in sorted(root.iterdir(), key=lambda path: path.name):
        if entry.is_dir():
            if entry.name not in _SKIPPED_FOLDERS and not entry.name.startswith(("config-", "lib-")):
                yield from _sources(entry)
        elif entry.suffix == ".py":
            yield entry


@functools.cache
def docstrings() -> tuple[str, ...]:
    """All different docstrings of this Python's standard library, in the order of file and line.

    Returns:
        Docstrings with their indentation removed, each at least `MIN_CHARS` characters.

    Raises:
        TextsError: The standard library is there without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for path in _sources(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        # Definitions inside functions are rare and not worth a walk over every expression.
        pending: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
        while pending:
            node = pending.pop(0)
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
            if len(text) >= MIN_CHARS:
                found.setdefault(text)
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                pending.extend(
                    child
                    for child in node.body
                    if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
                )
    if not found:
        raise TextsError(
            f"no docstrings found: expected the sources of the standard library in {root}; pass a file of texts"
        )
    return tuple(found)


def sample(count: int = 256, seed: int = 0) -> list[str]:
    """Picks `count` different docstrings at random, the same ones for the same seed and version of Python.

    A smaller sample is the beginning of a larger one with the same seed.

    Args:
        count: How many texts; at least 1.
        seed: Which sample.

    Raises:
        TextsError: `count` is not positive, or more than this Python has.
    """
    texts = list(docstrings())
    if not 1 <= count <= len(texts):
        raise TextsError(
            f"expected a count of texts between 1 and {len(texts)} (docstrings of this Python), got {count}"
        )
    random.Random(seed).shuffle(texts)
    return texts[:count]


def load_texts(path: str | Path, limit: int | None = None) -> list[str]:
    """Reads texts from a file: one per line, or JSON lines (strings, or objects with a `text` field).

    A file is read as JSON lines if its name ends in `.jsonl` or `.ndjson`. Empty lines are dropped.

    Args:
        path: A file in UTF-8.
        limit: Reads at most that many texts.

    Raises:
        TextsError: No such file, not UTF-8, a line that is not JSON or has no text, or no texts at all.
    """
    path = Path(path)
    as_json = path.suffix.lower() in {".jsonl", ".ndjson"}
    texts: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline=None) as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(texts) >= limit:
                    break
                line = line.strip()
                if line:
                    text = _text_of_json(line, f"{path}, line {number}") if as_json else line
                    if text.strip():
                        texts.append(text)
    except OSError as error:
        raise TextsError(f"cannot read texts from {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TextsError(f"cannot read texts from {path}: expected UTF-8 ({error})") from error
    if not texts:
        raise TextsError(f"no texts in {path}: expected one per line, or JSON lines in a file named *.jsonl")
    return texts


def _text_of_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise TextsError(f"{where}: expected JSON ({error})") from error
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, str):
        raise TextsError(f'{where}: expected a JSON string, or an object with a string in its field "text"')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise TextsError(f"{where}: expected Unicode text, got a lone surrogate")
    return value
