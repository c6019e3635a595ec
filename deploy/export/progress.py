"""What the user sees of an export: numbered steps with sizes and times, and no noise of libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TextIO

__all__ = ["Progress", "megabytes", "quiet_libraries"]


def megabytes(count: float) -> str:
    """A size for people: `90.4 MB`."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


class Progress:
    """Prints the steps of an export to a stream."""

    def __init__(self, steps: int, stream: TextIO | None = None, silent: bool = False) -> None:
        """Starts the clock.

        Args:
            steps: How many steps there will be.
            stream: Standard error by default.
            silent: Prints nothing.
        """
        self._steps = steps
        self._done = 0
        self._stream = stream if stream is not None else sys.stderr
        self._silent = silent
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line."""
        if not self._silent:
            print(text, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        """Prints a line even if nothing else is printed: the bundle is not what was asked for."""
        print(f"warning: {' '.join(text.split())}", file=self._stream, flush=True)

    @contextlib.contextmanager
    def step(self, title: str, again: bool = False) -> Iterator[list[str]]:
        """Prints the step's title, runs the body, and prints its time with what the body put into the list.

        Args:
            title: What is done.
            again: It is another try of the last step, and has its number.
        """
        self._done += not again
        said: list[str] = []
        start = time.monotonic()
        if not self._silent:
            print(f"[{self._done}/{self._steps}] {title} ...", end="", file=self._stream, flush=True)
        try:
            yield said
        except BaseException:
            self.say("")
            raise
        self.say(f" {', '.join([*said, f'{time.monotonic() - start:.1f} s'])}")

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start


_LOGGERS = ("transformers", "optimum", "onnxruntime", "huggingface_hub", "torch.onnx", "torch", "root")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides warnings and progress bars of libraries, which say nothing that a user of this tool can act upon.

    Errors still pass: they are raised, and log records of that level are printed.
    """
    environment = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update({name: os.environ.get(name, value) for name, value in environment.items()})
    loggers = [logging.getLogger(None if name == "root" else name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
