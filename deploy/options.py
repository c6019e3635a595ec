"""Types of command-line options that commands share; argparse puts their message behind the option's name."""

from __future__ import annotations

import argparse

__all__ = ["positive", "url_prefix"]


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def url_prefix(text: str) -> str:
    """What all paths begin with, such as `/nlp`; empty: nothing."""
    if text and not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"expected a path such as /nlp, got {text}")
    return text.rstrip("/")
