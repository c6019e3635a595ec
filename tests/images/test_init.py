"""PID 1 of the images (dockerfiles/init.c), as an ordinary process; test_engine.py stops containers."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "dockerfiles" / "init.c"

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not there")


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("init") / "init"
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-o", str(program), str(SOURCE)], check=True)
    return program


def run(init: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([init, *command], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("kill -TERM $$", 143)]
)
def test_it_ends_as_the_program_ends(init: Path, script: str, code: int) -> None:
    assert run(init, "sh", "-c", script).returncode == code


def test_errors_are_told(init: Path) -> None:
    result = run(init)
    assert (result.returncode, result.stderr) == (2, "init: expected a program to run\n")
    result = run(init, "/no/such/program")
    assert result.returncode == 127
    assert "init: cannot run /no/such/program: No such file" in result.stderr


def stopped(init: Path, command: Sequence[str], number: int) -> tuple[int, str]:
    """Sends a signal once the program has printed a line; returns the exit code and what it printed then."""
    process = subprocess.Popen([init, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        process.send_signal(number)
        rest = process.stdout.read()
    return process.wait(60), rest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_without_a_handler_yet_ends_with_0(init: Path, number: int) -> None:
    assert stopped(init, ["sh", "-c", "echo begun; exec sleep 60"], number) == (0, "")


def test_a_handler_gets_the_signal(init: Path) -> None:
    code = "import signal; signal.signal(signal.SIGHUP, lambda *a: exit(5)); print('begun', flush=True); signal.pause()"
    assert stopped(init, [sys.executable, "-c", code], signal.SIGHUP) == (5, "")


def test_the_program_has_the_signal_mask_of_its_parent(init: Path) -> None:
    code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    direct = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run(init, sys.executable, "-c", code).stdout == direct.stdout


def test_processes_without_a_parent_are_collected(init: Path) -> None:
    """The grandchild's parent ends at once; init, which gets it, leaves no zombie."""
    code = (
        "import os, pathlib, time\n"
        "if not (child := os.fork()):\n"
        "    if os.fork(): os._exit(0)\n"
        "    time.sleep(0.1); os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "children = pathlib.Path(f'/proc/{os.getppid()}/task/{os.getppid()}/children')\n"
        "deadline = time.monotonic() + 30\n"
        "while len(children.read_text().split()) > 1 and time.monotonic() < deadline: time.sleep(0.05)\n"
        "print(len(children.read_text().split()))\n"
    )
    assert run(init, sys.executable, "-c", code).stdout == "1\n"
