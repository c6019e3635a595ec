"""`python -m deploy COMMAND`: the command is imported only when it is called."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence

from deploy.ending import end, open_standard_streams
from deploy.extras import is_ours, missing

COMMANDS: Mapping[str, tuple[str, str]] = {
    "export": ("deploy.export.cli", "prepare a model: verified bf16, int8 and fp32 variants in one bundle"),
    "verify": (
        "deploy.tools.verify",
        "compare files, accuracy and speed of a bundle with its manifest, here",
    ),
    "inspect": ("deploy.tools.inspect", "say what a bundle or a model's folder holds"),
    "profile": ("deploy.tools.profile", "say where a request's time goes, and what faster parts would be worth"),
    "key": ("deploy.keys", "make an API key for a server"),
    "serve": ("deploy.server.main", "serve a bundle, or a model's folder as it is, over HTTP"),
    "run": ("deploy.run", "export a model once, into a folder of bundles, then serve it"),
}

EXTRAS: Mapping[str, str] = {"export": "export", "verify": "serve,onnx"}
"""What has the packages of a command; of the others, `serve` has them."""

USAGE = """\
usage: python -m deploy COMMAND ...

Prepare and serve a BERT-family encoder.

commands:
{commands}

examples:
  python -m deploy export sentence-transformers/all-MiniLM-L6-v2 -o bundle
  python -m deploy serve bundle --port 8000
  python -m deploy serve all-MiniLM-L6-v2    # a folder that was not exported

Each command explains itself: python -m deploy COMMAND --help
Exit codes: 0 done, 1 a bug or an unexpected failure, 2 something the caller can put right (the message says what).
"""


def _use_malloc() -> None:
    """Starts this process again with Python's objects in glibc's heap, unless `PYTHONMALLOC` says where to put them.

    After a burst of requests Python's own allocator keeps each MiB in which a single object is left, glibc's only the
    pages: 15 MB and 4 MB were seen. Requests take the same time. The choice is read from the environment as Python
    starts, which takes 20 ms; images have it set.
    """
    if "PYTHONMALLOC" in os.environ or sys.flags.ignore_environment or sys.flags.dev_mode or not sys.executable:
        return
    try:
        glibc = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):  # Another C library, whose heap may be slower.
        return
    if glibc:
        os.environ["PYTHONMALLOC"] = "malloc"
        with contextlib.suppress(OSError):  # Without permission to start it again, this process goes on as it is.
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _leave_on_signals() -> None:
    """Lets SIGTERM and SIGINT end the process at once, with 0, until a server drains on them instead.

    Linux does not deliver a signal to PID 1 of a container unless there is a handler, and a server imports for seconds
    before it has one of its own.
    """

    def leave(number: int, frame: object) -> None:
        os._exit(0)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, leave)


_OF_THE_SYSTEM = (
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.EIO, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE),
)
"""What the system answers to the use of a file, with whatever program: no bug of this one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The command and its arguments; those of the process by default.

    Returns:
        The exit code: 0 for success, 2 for a command line that is wrong, else what the command returns.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = USAGE.format(commands="\n".join(f"  {name:<9}{text}" for name, (_, text) in COMMANDS.items()))
    if arguments and arguments[0] in {"-h", "--help", "help"}:
        print(usage, end="")
        return 0
    if not arguments:
        print(usage, end="", file=sys.stderr)
        return 2
    name, *rest = arguments
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"python -m deploy: unknown command {name!r}; expected one of {known}", file=sys.stderr)
        return 2
    if name in {"serve", "run"}:
        _leave_on_signals()
    try:
        command = importlib.import_module(COMMANDS[name][0])
        return int(command.main(rest) or 0)
    except ModuleNotFoundError as error:
        if is_ours(error):
            raise
        print(f"python -m deploy {name}: {missing(error, EXTRAS.get(name, 'serve'))}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None or error.errno not in _OF_THE_SYSTEM:
            raise
        denied = isinstance(error, PermissionError)
        who = f"; this process is of user {os.getuid()}, group {os.getgid()}" if denied else ""
        path = os.fsdecode(error.filename)
        print(f"python -m deploy {name}: {path}: {error.strerror}{who}", file=sys.stderr)
        return 2
    except SystemExit as leaving:  # argparse leaves this way, for --help too.
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1


if __name__ == "__main__":
    open_standard_streams()
    if sys.argv[1:2] in (["serve"], ["run"]):
        _use_malloc()
    sys.exit(end(main))
