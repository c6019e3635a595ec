"""A Python that has imported what takes long, and runs programs in forked processes: those begin at once.

For tests that need a process of their own, but whose programs do not depend on what was imported before them.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

# Requests come through the socket argv[1]: JSON, with descriptors of the program's output and of a pipe. A process
# between this one and the program's writes the process id of the program into the pipe, and then its exit code. The
# functions that are called were looked up before the imports, since gevent replaces them.
SERVER = """
import json, os, runpy, signal, socket, sys
from os import _exit, close, dup2, fork, waitpid, write
requests = socket.socket(fileno=int(sys.argv[1]))
receive = socket.recv_fds
for name in sys.argv[2:]:
    __import__(name)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a terminal interrupts is the tests
while True:
    message, descriptors, _, _ = receive(requests, 1 << 20, 3)
    if not message:
        _exit(0)
    if fork() == 0:
        requests.close()
        *streams, status = descriptors
        program = fork()
        if program == 0:
            break
        for stream in streams:
            close(stream)
        write(status, b"%d\\n" % program)
        write(status, b"%d\\n" % os.waitstatus_to_exitcode(waitpid(program, 0)[1]))
        _exit(0)
    for descriptor in descriptors:
        close(descriptor)
    try:
        while waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
signal.signal(signal.SIGINT, signal.default_int_handler)
close(status)
for number, stream in enumerate(streams, 1):
    dup2(stream, number)
    close(stream)
request = json.loads(message)
os.environ.clear()
os.environ.update(request["environ"])
os.chdir(request["folder"])
sys.path[:0] = [path for path in request["environ"].get("PYTHONPATH", "").split(os.pathsep) if path]
option, what, *arguments = request["arguments"]
code = 0
try:
    if option == "-c":
        sys.argv = ["-c", *arguments]
        namespace = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(what, "<string>", "exec"), namespace)
    else:
        sys.argv[1:] = arguments
        runpy.run_module(what, run_name="__main__", alter_sys=True)
except BaseException as error:
    if request["complete"]:
        raise
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        sys.excepthook(*sys.exc_info())
    elif isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
if not request["complete"]:
    sys.stdout.flush()
    sys.stderr.flush()
    _exit(code or 0)
"""


class Program:
    """A running program, with what `subprocess.Popen` offers of it."""

    def __init__(self, status: IO[str], stdout: IO[str], stderr: IO[str]) -> None:
        self._status, self._files = status, (stdout, stderr)
        self._printed = ("", "")
        self.pid = int(status.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, a signal's number below 0.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a program", timeout or 0)
            self.returncode = int(self._status.readline())
            for file in self._files:
                file.seek(0)
            stdout, stderr = (file.read() for file in self._files)
            self._printed = (stdout, stderr)
            for file in (self._status, *self._files):
                file.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed to the end, on standard output and on standard error; for arguments see `wait`."""
        self.wait(timeout)
        return self._printed


class Warm:
    """A Python with its imports done."""

    def __init__(self, *modules: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def close(self) -> None:
        """Ends it; its programs run on."""
        self._socket.close()
        self._process.wait()

    def start(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        merged: bool = False,
        complete: bool = True,
    ) -> Program:
        """Starts a program.

        Args:
            arguments: those of Python: ``-c`` and a program or ``-m`` and a module, then what is in `sys.argv`.
            env: its environment, None for that of the caller. What libraries read when they are loaded, such as
                ``OMP_NUM_THREADS``, they have read.
            cwd: its folder, None for that of the caller.
            merged: whether standard error comes with standard output.
            complete: whether the interpreter ends as usual, which takes half a second with torch; else the process ends
                after the program's last line, without what `atexit` has.
        """
        request = {
            "arguments": arguments,
            "environ": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
            "complete": complete,
        }
        stdout, stderr = (tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2))  # noqa: SIM115
        reading, writing = os.pipe()
        outputs = [stdout.fileno(), (stdout if merged else stderr).fileno()]
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [*outputs, writing])
        finally:
            os.close(writing)
        return Program(os.fdopen(reading, "r", buffering=1), stdout, stderr)

    def run(
        self,
        *arguments: str,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        complete: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end; for arguments see `start`."""
        program = self.start(*arguments, env=env, cwd=cwd, complete=complete)
        try:
            stdout, stderr = program.communicate(timeout)
        finally:
            program.kill()
        return subprocess.CompletedProcess(list(arguments), program.wait(), stdout, stderr)


_pythons: dict[tuple[str, ...], Warm] = {}
_starting = threading.Lock()


def python(*modules: str) -> Warm:
    """The Python of this process that has imported modules; the first call starts it."""
    with _starting:
        if modules not in _pythons:
            _pythons[modules] = Warm(*modules)
            atexit.register(_pythons[modules].close)
        return _pythons[modules]
