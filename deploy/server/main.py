"""`python -m deploy serve`: this process alone, or a supervisor and its workers. Standard library only, as in `cli`."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence

from ..bundle import BundleError
from ..extras import missing
from .cli import parse
from .logs import say, start_logging
from .process import Process, UsageError, port_of
from .serving import serve
from .sockets import FEW_DESCRIPTORS, raise_descriptors

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Serves until a signal.

    Args:
        argv: Arguments after `serve`.

    Returns:
        The exit code, see the parser's epilog.
    """
    arguments = parse(argv)
    if arguments.idle:
        say(f"python -m deploy serve: no effect here: {', '.join(arguments.idle)}", to_errors=True)
    descriptors = raise_descriptors()
    if descriptors < FEW_DESCRIPTORS:
        say(
            f"python -m deploy serve: this process may open {descriptors} files and connections (ulimit -n): more "
            f"clients are disconnected, or wait; expected {FEW_DESCRIPTORS} or more",
            to_errors=True,
        )
    # Nearly all that a start makes stays: a tenth of its imports' time would be spent on looking for what does not.
    gc.disable()
    try:
        if arguments.workers is not None:
            from .workers import supervise

            gc.enable()
            start_logging(arguments.json_output)
            return supervise(arguments, argv, port_of(arguments.port, os.environ))
        return serve(arguments, Process())
    except (UsageError, BundleError) as error:
        say(f"python -m deploy serve: {' '.join(str(error).split())}", to_errors=True)
        return 2
    except ModuleNotFoundError as error:
        say(f"python -m deploy serve: {missing(error, 'serve')}", to_errors=True)
        return 2
    finally:
        gc.enable()
