"""`python -m deploy serve`: this process alone, or a supervisor and its workers. Standard library only, as in `cli`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

from ..bundle import BundleError
from ..extras import missing
from .cli import parse
from .logs import start_logging
from .process import Process, UsageError, port_of
from .serving import serve

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
        print(f"python -m deploy serve: no effect here: {', '.join(arguments.idle)}", file=sys.stderr)
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
        print(f"python -m deploy serve: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"python -m deploy serve: {missing(error, 'serve')}", file=sys.stderr)
        return 2
    finally:
        gc.enable()
