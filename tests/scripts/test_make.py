"""What `make` and the scripts behind it say on a machine that lacks something, in a folder with a space in its name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torch_ext._library import TORCH

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what `make` needs, without an environment."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "torch_ext").mkdir()
    shutil.copy(ROOT / "torch_ext" / "__init__.py", folder / "torch_ext")
    return folder


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without the variables of a `make` that runs these tests.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_bare_make_lists_every_target(checkout: Path) -> None:
    result = make(checkout)
    assert result.returncode == 0, result.stderr
    text = (checkout / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^\.PHONY: (\S+)$", text, re.MULTILINE)
    assert {"demo", "test", "lint", "wheel", "wheel-aarch64"} <= set(targets)
    for target in targets:
        assert re.search(rf"^  {target} +\S", result.stdout, re.MULTILINE), target
    for variable in re.findall(r"^#   (\w+)=", text, re.MULTILINE):
        assert re.search(rf"^  {variable}=", result.stdout, re.MULTILINE), variable
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("target", ["demo", "test"])
def test_python_without_venv(checkout: Path, tmp_path: Path, target: str) -> None:
    python = executable(
        tmp_path / "python3",
        f'case "$*" in *ensurepip*|*virtualenv*) exit 1;; esac; exec "{sys.executable}" "$@"',
    )
    result = make(checkout, target, PYTHON=str(python), CXX="sh")
    assert result.returncode != 0
    assert "apt-get install python3-venv" in result.stderr
    # One line of ours, and make's own.
    assert len(result.stderr.splitlines()) == 2, result.stderr


def test_python_without_headers(checkout: Path, tmp_path: Path) -> None:
    python = executable(tmp_path / "python3", f'case "$*" in *Python.h*) exit 1;; esac; exec "{sys.executable}" "$@"')
    result = make(checkout, "test", PYTHON=str(python), CXX="sh")
    assert result.returncode != 0
    assert "apt-get install python3-dev" in result.stderr
    assert not (checkout / ".venv").exists()


def test_python_that_is_too_old(checkout: Path, tmp_path: Path) -> None:
    python = executable(tmp_path / "python3", 'test "$1" = --version && echo Python 3.9.2 && exit; exit 1')
    result = make(checkout, "demo", PYTHON=str(python), CXX="sh")
    assert "Python 3.9.2 is too old: choose Python 3.10 or newer" in result.stderr
    assert result.returncode != 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler no-such-compiler: install one"),
        ({"PYTHON": "no-such-python"}, "no no-such-python: install Python 3.10 or newer"),
    ],
)
def test_missing_tools(checkout: Path, variables: dict[str, str], message: str) -> None:
    result = make(checkout, "demo", **{"PYTHON": sys.executable, "CXX": "sh", **variables})
    assert result.returncode != 0
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 2, result.stderr
    assert not (checkout / ".venv").exists()


def test_cross_compiler_is_asked_for(checkout: Path) -> None:
    # For an architecture that this machine certainly has no compiler for.
    result = subprocess.run(
        ["bash", "scripts/wheel.sh", "riscv128", "dist"],
        cwd=checkout,
        env={name: value for name, value in os.environ.items() if name != "CXX"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert "no cross compiler riscv128-linux-gnu-g++: install one" in result.stderr


def counting_emulator(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "scripts/counting_emulator.sh", "icount"],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_counting_emulator_says_what_its_build_lacks(checkout: Path) -> None:
    result = counting_emulator(checkout, CC="no-such-compiler")
    assert result.returncode == 1
    assert result.stderr == "error: no no-such-compiler: install it (Debian, Ubuntu: apt-get install gcc)\n"
    assert not (checkout / "icount").exists()


def test_counting_emulator_needs_plugins_of_version_4(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    executable(tools / "pkg-config", "exit 0")
    sources = tmp_path / "qemu"
    sources.mkdir()
    (sources / "VERSION").write_text("8.2.2\n")
    path = f"{tools}:{os.environ['PATH']}"
    result = counting_emulator(checkout, CC="sh", QEMU_SOURCE=str(sources), PATH=path)
    assert result.returncode == 1
    assert "QEMU 8.2.2 is too old: expected 9.2 or newer" in result.stderr


def test_a_counting_emulator_that_is_there_stays(checkout: Path) -> None:
    (checkout / "icount").mkdir()
    executable(checkout / "icount" / "qemu-aarch64", "exit 0")
    result = counting_emulator(checkout, CC="no-such-compiler")
    assert (result.returncode, result.stderr) == (0, "")


def test_e2e_asks_for_a_browser(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    bash, dirname = shutil.which("bash"), shutil.which("dirname")
    assert bash is not None
    assert dirname is not None
    (tools / "dirname").symlink_to(dirname)
    result = subprocess.run(
        [bash, "scripts/e2e.sh"],
        cwd=checkout,
        env={"PATH": str(tools), "BUNDLE": "."},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == "error: no Chromium: install it (Debian, Ubuntu: apt-get install chromium)\n"


def test_serve_without_a_bundle(checkout: Path) -> None:
    """A name without a folder would be one of the hub."""
    for stamp in ("venv", ".demo", ".built"):
        (checkout / ".venv").mkdir(exist_ok=True)
        (checkout / ".venv" / stamp).touch()
    result = make(checkout, "serve", BUNDLE="bundles/none")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error: no folder bundles/none: make it by make bundle, or name another by BUNDLE=...\n"
    )


def test_packages_ask_for_the_torch_that_errors_name() -> None:
    for name in ("pyproject.toml", "setup.py"):
        assert f'"{TORCH}' in (ROOT / name).read_text(encoding="utf-8"), name
