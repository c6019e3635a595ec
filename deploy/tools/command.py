"""What the command lines of the tools have in common: texts of a bundle, errors in one line, tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.bundle import VARIANTS, BundleError, Manifest
from deploy.engines.batch import Item, encoded
from deploy.folder.errors import FolderError
from deploy.options import model_name
from deploy.tasks import TASKS, TaskError, open_task, prompted
from deploy.texts import TextsError, load_texts, sample

__all__ = ["ToolError", "chosen_variants", "make_parser", "read_items", "run", "table", "texts_of", "usable_threads"]


class ToolError(Exception):
    """The command cannot do what was asked; the message says what was expected, what came, and what to do."""


def make_parser(name: str, description: str, target: str = "folder of a bundle") -> argparse.ArgumentParser:
    """The parser of a tool, with the argument that all of them have, and what that names."""
    parser = argparse.ArgumentParser(
        prog=f"python -m deploy {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="exit codes: 0 all is well, 2 something is wrong, which the output says; 130 stopped by Ctrl-C.",
    )
    parser.add_argument("model", metavar="DIR", type=model_name, help=target)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
    """Parses the arguments and runs a tool; what the caller can put right is told in one line.

    Returns:
        What `work` returns, or 2 after an error.
    """
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    try:
        return work(arguments)
    except (ToolError, BundleError, FolderError, TextsError, TaskError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def texts_of(file: Path | None, most: int) -> tuple[list[str], str]:
    """Texts to run on, at most `most`, evenly spread over a file, and where they are from."""
    if file is None:
        return sample(most), "docstrings of the Python standard library"
    texts = load_texts(file)
    count = min(most, len(texts))
    return [texts[index * len(texts) // count] for index in range(count)], file.name


def read_items(manifest: Manifest, texts: Sequence[str]) -> list[Item]:
    """Token ids of what a bundle's task makes of texts, with its default prompt, truncated.

    Raises:
        TaskError: No text can become an input of the task.
        ToolError: The tokenizer gives no token for any of them.
    """
    from tokenizers import Tokenizer

    if manifest.tokenizer_json is not None:
        tokenizer = Tokenizer.from_str(manifest.tokenizer_json)
    else:
        tokenizer = Tokenizer.from_file(str(manifest.tokenizer_path))
    tokenizer.enable_truncation(manifest.max_tokens, direction=manifest.truncation_side)
    prompt = "" if manifest.prompts is None else manifest.prompts.default_text
    task = TASKS[manifest.task]
    pairs = bool(manifest.verification.get("pairs", task.needs.pairs))
    inputs = prompted(task.pairs_of(texts) if pairs else texts, prompt)
    rows = encoded(tokenizer.encode_batch(inputs), manifest.token_types, pairs)
    if not rows:
        raise ToolError("the tokenizer gives no token for any of the texts; pass other ones with --texts")
    return open_task(manifest).trials(rows)


def chosen_variants(manifest: Manifest, asked: str | None) -> list[str]:
    """Names of variants that `--variants` asks for; all of the bundle by default.

    Raises:
        BundleError: The bundle lacks one.
    """
    names = [name.strip() for name in (asked or "").split(",") if name.strip()]
    for name in names:
        manifest.variant(name)
    found = names or list(manifest.variants)
    return sorted(found, key=lambda name: list(VARIANTS).index(name) if name in VARIANTS else len(VARIANTS))


def usable_threads(asked: int | None) -> int:
    """Threads of the engines: those asked for, else as many as the process may use."""
    from deploy.machine import usable_cpus

    return asked or usable_cpus()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )
