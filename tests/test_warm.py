"""Programs in forked processes behave as those of a new Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import warm

PROGRAM = """
import os, sys
print(__name__, sys.argv, os.environ["A"], os.getcwd(), "ast" in sys.modules)
print("error", file=sys.stderr)
sys.exit(3)
"""


def test_it_gets_what_it_is_given(tmp_path: Path) -> None:
    done = warm.python("ast").run("-c", PROGRAM, "x", "y z", env={"A": "1"}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "error\n")
    assert done.stdout == f"__main__ ['-c', 'x', 'y z'] 1 {tmp_path} True\n"
    assert "A" not in os.environ


def test_modules_are_run() -> None:
    done = warm.python("ast").run("-m", "json.tool", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--indent" in done.stdout


def test_ends_are_those_of_a_program() -> None:
    python = warm.python("ast")
    assert python.run("-c", "import atexit; atexit.register(print, 'the end')").stdout == "the end\n"
    merged = python.start("-c", "print('out'); raise ValueError('why')", merged=True)
    output, _ = merged.communicate(60)
    assert merged.returncode == 1
    assert output.startswith("out\nTraceback")
    assert output.endswith("ValueError: why\n")
    assert python.run("-c", "import os; os.abort()").returncode == -6


@pytest.mark.parametrize(
    ("program", "code", "stderr"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(4)", 4, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_an_end_without_that_of_the_interpreter(program: str, code: int, stderr: str) -> None:
    program = f"import atexit; atexit.register(print, 'not called'); print('called'); {program}"
    done = warm.python("ast").run("-c", program, complete=False)
    assert (done.returncode, done.stdout) == (code, "called\n")
    assert done.stderr.endswith(stderr)
    assert bool(done.stderr) == bool(stderr)


def test_programs_run_side_by_side_and_are_ended() -> None:
    python = warm.python("ast")
    waiting = [python.start("-c", "import time; print('here', flush=True); time.sleep(1000)") for _ in range(2)]
    assert python.run("-c", "pass").returncode == 0
    assert [program.poll() for program in waiting] == [None, None]
    with pytest.raises(subprocess.TimeoutExpired):
        waiting[0].wait(0.01)
    waiting[0].send_signal(15)
    waiting[1].kill()
    assert [program.wait(60) for program in waiting] == [-15, -9]
    waiting[0].kill()  # and nothing else of that number


def test_paths_of_the_environment_come_first(tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("print('ours')")
    done = warm.python("ast").run("-c", "import colorsys", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.stdout, done.stderr) == ("ours\n", "")
