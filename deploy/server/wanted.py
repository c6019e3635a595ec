"""What is named on the command line: a bundle, or a model that was not exported, described from its own files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bundle import CONFIG_FILE, MANIFEST_FILE, Manifest, load_manifest
from .process import UsageError

__all__ = ["Wanted", "check_names", "describe", "named_model", "threads_of", "wanted"]


@dataclass(frozen=True)
class Wanted:
    """A model that shall be served.

    Attributes:
        source: A folder, or an id on the hub.
        name: What clients call it; None: as its bundle does.
    """

    source: str
    name: str | None = None


def named_model(text: str) -> Wanted:
    """The value of `--model`: `NAME=DIR`.

    Raises:
        ArgumentTypeError: It is none.
    """
    name, equals, source = text.partition("=")
    fine = equals and source and name and name.isprintable() and name == name.strip("/ ")
    if not fine:
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, got {text!r}")
    return Wanted(source, name)


def wanted(arguments: argparse.Namespace) -> list[Wanted]:
    """The models that the options name; the first is asked by requests that name none.

    Raises:
        UsageError: Two have one name.
    """
    first = [] if arguments.model is None else [Wanted(arguments.model, arguments.served_model_name)]
    found = [*first, *arguments.models]
    check_names([each.name for each in found if each.name is not None])
    return found


def check_names(names: Sequence[str]) -> None:
    """Refuses models of one name.

    Raises:
        UsageError: Two have one name.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two models are called {twice}; give each a name of its own by --model NAME=DIR")


def threads_of(threads: int, models: int) -> list[int]:
    """The share of the threads that each model gets: all of them the same but for the rest, and one at least."""
    return [max(1, threads * (place + 1) // models - threads * place // models) for place in range(models)]


def describe(model: str, task: str | None) -> tuple[Manifest, bool]:
    """The manifest of what shall be served, and whether it is a bundle, whose files are not looked at yet.

    Args:
        model: A folder, or an id on the hub.
        task: What the model is for, where its files do not say.

    Raises:
        BundleError: It is a bundle, and damaged.
        UsageError: It is neither a bundle nor a model that can be served as it is.
    """
    folder = Path(model)
    if (folder / MANIFEST_FILE).exists() or (folder.is_dir() and not _is_model(folder)):
        if task is not None:
            raise UsageError(
                f"--task {task}: only for a model that was not exported; {model} is a bundle, which says it"
            )
        if not (folder / MANIFEST_FILE).exists():
            raise UsageError(
                f"{model}: neither a bundle (no {MANIFEST_FILE}) nor a model's folder (no {CONFIG_FILE}); make one "
                "with: python -m deploy export MODEL -o DIR"
            )
        return load_manifest(folder, verify=False, variants=()), True
    from ..folder.describe import describe_folder
    from ..folder.errors import FolderError

    try:
        return describe_folder(model, task), False
    except FolderError as error:
        if folder.is_dir() and any(folder.glob("encoder_*.safetensors")):
            raise UsageError(
                f"{model}: no {MANIFEST_FILE} beside files of a bundle: was it copied completely? Copy or export it"
            ) from error
        raise UsageError(str(error)) from error


def _is_model(folder: Path) -> bool:
    """Whether a folder looks like a model's of Hugging Face or sentence-transformers."""
    return any((folder / name).exists() for name in (CONFIG_FILE, "modules.json", "snapshots"))
