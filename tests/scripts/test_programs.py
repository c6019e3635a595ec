"""What every program of the checkout does for a newcomer: --help, an interrupt, an output that nobody reads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

import deploy.__main__
from deploy.extras import missing, python_command

ROOT = Path(__file__).resolve().parents[2]

# Started by other programs, with arguments of theirs: no person calls them.
PARTS = ("benchmarks/instructions_target.py", "benchmarks/peers/", "tests/clients/clients.py")
SCRIPTS = [
    path
    for folder in ("benchmarks", "scripts", "tests/clients", "tests/deploy")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")
    and not path.relative_to(ROOT).as_posix().startswith(PARTS)
]
MODULES = [
    "deploy", *(f"deploy {name}" for name in ("export", "serve", "run", "verify", "inspect", "profile", "key")),
    "loadtest", *(f"loadtest {name}" for name in ("run", "knee", "report", "compare", "self-check", "worker")),
    "torch_ext.doctor",
]  # fmt: skip


def start(command: list[str], cwd: Path = ROOT, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env=environment, text=True, stdout=stdout, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_scripts_explain_themselves(script: Path, tmp_path: Path) -> None:
    if script.name == "plain_server.py":
        pytest.importorskip("flask")
    process = start([str(script), "--help"], tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("usage: ")
    assert not list(tmp_path.iterdir()), "--help has written something"


@pytest.mark.parametrize("words", ["{0}", "{0} --variants x", "--model {0}"])
def test_a_benchmark_checks_its_folders_first(words: str, tmp_path: Path) -> None:
    process = start(["benchmarks/serving.py", *words.format(tmp_path).split()])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"got {tmp_path}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", MODULES)
def test_modules_explain_themselves(name: str) -> None:
    process = start(["-m", *name.split(), "--help"])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    # Every option of these has a word on what it does.
    for option in re.findall(r"^  (--?\S.*)$", out, re.MULTILINE):
        assert re.search(r"\S {2,}\S", option) or re.search(
            rf"^  {re.escape(option)}\n {{10,}}\S", out, re.MULTILINE
        ), f"{name}: no help for {option}"


PRINTERS = ["deploy --help", "deploy key", "loadtest compare RUN RUN", "torch_ext.doctor"]


def command_of(words: str) -> list[str]:
    if "RUN" not in words:
        return ["-m", *words.split()]
    # The command alone, without two files of a run.
    return ["-c", "import sys; from deploy.ending import end\nsys.exit(end(lambda: print('noise ' * 4000)))"]


@pytest.mark.parametrize("words", PRINTERS)
def test_a_reader_that_leaves(words: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        process = start(command_of(words), stdout=write)
        err = process.communicate(timeout=60)[1]
    finally:
        os.close(write)
    assert process.returncode == 128 + signal.SIGPIPE, err
    assert "Error" not in err


CLOSED = """
import os, sys
for number in {closed}:
    os.close(number)
os.execv(sys.executable, [sys.executable, "-c", {look!r}])
"""
LOOK = """
import os, sys
from deploy.ending import open_standard_streams
open_standard_streams()
places = [os.readlink(f"/proc/self/fd/{{number}}") for number in (0, 1, 2)]
with open("/dev/zero", "rb") as file:
    print("printed", places, file.fileno(), flush=True)
    sys.stderr.write("told")
    sys.stdin.read()
    wrong = [number for number in {closed} if places[number] != os.devnull]
    os._exit(len(wrong) + 10 * (file.fileno() < 3))
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_streams_that_are_closed_lead_nowhere(closed: tuple[int, ...]) -> None:
    """Else a socket takes their number: libuv aborts when it closes one, and what is printed goes there."""
    look = LOOK.format(closed=closed)
    command = [sys.executable, "-c", CLOSED.format(closed=closed, look=look)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("printed") == (1 not in closed)
    assert (done.stderr == "told") == (2 not in closed)


@pytest.mark.parametrize("words", PRINTERS)
def test_an_output_that_takes_no_more(words: str) -> None:
    with open("/dev/full", "w") as full:
        process = start(command_of(words), stdout=full)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 2, err
    assert "No space left on device" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words", ["deploy verify FOLDER", "loadtest run --host http://127.0.0.1:1 --slo FOLDER/manifest.json"]
)
def test_ctrl_c(words: str, tmp_path: Path) -> None:
    fifo = tmp_path / "manifest.json"
    os.mkfifo(fifo)
    process = start(["-m", *words.replace("FOLDER", str(tmp_path)).split()])
    writer = None
    try:
        end_s = time.monotonic() + 60
        while writer is None and time.monotonic() < end_s and process.poll() is None:
            try:
                writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # Nobody reads it yet.
                time.sleep(0.01)
        # Until it reads, which a signal ends; after the last look for signals before that, it would end nothing.
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.communicate()
        if writer is not None:
            os.close(writer)
    assert process.returncode == 128 + signal.SIGINT, err
    assert err == "stopped by SIGINT\n"


@pytest.mark.parametrize(
    ("command", "extra"), [("export", "export"), ("verify", "serve,onnx"), ("profile", "serve"), ("serve", "serve")]
)
def test_a_missing_package(
    command: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(name: str) -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr("importlib.import_module", fails)
    monkeypatch.setattr(deploy.__main__, "_leave_on_signals", lambda: None)
    monkeypatch.setattr(deploy.extras, "_ROOT", Path("/no/such/checkout"))
    assert deploy.__main__.main([command, "DIR"]) == 2
    assert capsys.readouterr().err == (
        f"python -m deploy {command}: the package numpy is missing; install the extra: make wheel, then pip install "
        f'"$(echo dist/torch_ext-*.whl)[{extra}]"\n'
    )


def test_a_package_that_the_environment_of_make_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.extras, "_ROOT", tmp_path)
    error = ModuleNotFoundError(name="msgspec")
    (tmp_path / ".venv").mkdir()
    assert missing(error, "serve").endswith('[serve]"'), "half made"
    (tmp_path / ".venv" / ".demo").touch()
    assert missing(error, "serve").endswith("or run .venv/bin/python in place of python: make has set it up")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert missing(error, "serve").endswith('[serve]"')


def test_the_python_that_runs_is_named_as_a_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkout" / ".venv" / "bin"
    folder.mkdir(parents=True)
    python = folder / "python"
    python.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", "/no/such/folder")
    monkeypatch.chdir(tmp_path / "checkout")
    assert python_command() == ".venv/bin/python"
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(folder))
    assert python_command() == "python"
    monkeypatch.setenv("PATH", "/no/such/folder")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert python_command() == str(python)


def test_a_missing_package_where_there_is_none(tmp_path: Path) -> None:
    process = start(["-S", "-m", "deploy", "profile", str(tmp_path)])  # -S: without site-packages.
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 2, err
    assert re.match(r"python -m deploy profile: the package \w+ is missing; install the extra: ", err), err


def test_a_process_that_may_not_start_again_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.delenv("PYTHONMALLOC", raising=False)
    monkeypatch.setattr(os, "execv", refused)
    deploy.__main__._use_malloc()
    monkeypatch.delenv("PYTHONMALLOC", raising=False)
