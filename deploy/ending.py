"""How a program ends that was interrupted, or whose output nobody takes: in one line at most. Standard library only."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

__all__ = ["end", "is_of_output", "open_standard_streams"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def is_of_output(error: BaseException) -> bool:
    """Whether the reader of the output has left (`| head -1`), or what it is written to takes no more."""
    if isinstance(error, BrokenPipeError):
        return True
    return isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename is None


def open_standard_streams() -> None:
    """Opens /dev/null in place of each of the descriptors 0, 1 and 2 that whoever started the process has closed.

    Otherwise the next file or socket gets the number, and what libraries print to it; libuv aborts when it has to close
    a connection of such a number. Python's streams, which are None then, write to nowhere.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # The lowest number that is free, which is this one.
            os.set_inheritable(number, True)
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def end(run: Callable[[], int | None]) -> int:
    """Runs a program, and ends it as the shell's own tools end.

    Args:
        run: The program; returns its exit code, None for 0.

    Returns:
        The exit code: 130 (128 + SIGINT) after Ctrl-C, 141 (128 + SIGPIPE) if the reader of the output has left, 2 if
        the output cannot be written, else what `run` returns.
    """
    try:
        code = int(run() or 0)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        if not is_of_output(error):
            raise
        code = 128 + signal.SIGPIPE
        if not isinstance(error, BrokenPipeError):
            print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
            code = 2
    # Python writes what is left in its buffer as it ends, and would fail once more.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return code
