"""Types of command-line options that commands share; argparse puts their message behind the option's name."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

__all__ = ["bundle_folder", "model_folder", "model_name", "origin", "positive", "seconds", "url_prefix"]


def positive(text: str) -> int:
    """A whole number from 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def seconds(text: str) -> float:
    """A time from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds from 0, got {text}")
    return value


def model_name(text: str) -> str:
    """A folder, or an id on the hub; an empty one would be the folder that the command runs in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a folder, or an id on the hub, got nothing: is a variable unset?")
    return text


def model_folder(text: str) -> Path:
    """A folder with a model of transformers."""
    return _folder_with(text, "config.json", "of a model")


def bundle_folder(text: str) -> Path:
    """A folder that export wrote."""
    return _folder_with(text, "manifest.json", "of a bundle (python -m deploy export MODEL -o DIR)")


def _folder_with(text: str, name: str, kind: str) -> Path:
    if not (Path(text) / name).is_file():
        raise argparse.ArgumentTypeError(f"expected the folder {kind}, which has {name}, got {text}")
    return Path(text)


def url_prefix(text: str) -> str:
    """What all paths begin with, such as `/nlp`; empty: nothing."""
    if text and not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"expected a path such as /nlp, got {text}")
    return text.rstrip("/")


def origin(text: str) -> str:
    """An origin as browsers send it, or `*`; one that they never send would allow nobody."""
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", text):
        raise argparse.ArgumentTypeError(f"expected * or an origin such as https://app.example.com, got {text[:80]!r}")
    return text
