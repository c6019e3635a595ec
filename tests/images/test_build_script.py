"""dockerfiles/build.sh with uv replaced by a script that writes down how it was called."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "dockerfiles" / "build.sh"


@pytest.fixture
def fake_uv(tmp_path: Path) -> Path:
    """A folder with a ``uv`` that prints its arguments, one a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    uv = folder / "uv"
    uv.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    uv.chmod(0o755)
    return folder


def run(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    search = os.environ["PATH"] if path is None else f"{path}:{os.environ['PATH']}"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_", "WHEELHOUSE"))}
    return subprocess.run(
        ["sh", str(SCRIPT), *arguments],
        env={**clean, "PATH": search, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def install(arch: str, *arguments: str, path: Path, **environment: str) -> list[str]:
    result = run("install", arch, *arguments, path=path, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def test_amd64_asks_for_a_cpu_build_of_torch(fake_uv: Path) -> None:
    arguments = install("amd64", "--target", "a b", "torch", "numpy", path=fake_uv)
    assert arguments[:2] == ["pip", "install"]
    assert option(arguments, "--python-platform") == "x86_64-manylinux_2_28"
    assert option(arguments, "--torch-backend") == "cpu"
    assert arguments[-4:] == ["--target", "a b", "torch==2.13.0", "numpy"]


def test_arm64_takes_the_last_torch_of_the_index_that_needs_no_cuda(fake_uv: Path) -> None:
    arguments = install("arm64", "torch", path=fake_uv)
    assert option(arguments, "--python-platform") == "aarch64-manylinux_2_28"
    assert "--torch-backend" not in arguments
    assert arguments[-1] == "torch==2.10.0"


def test_another_torch_can_be_asked_for(fake_uv: Path) -> None:
    assert install("arm64", "torch==2.9.9", path=fake_uv)[-1] == "torch==2.9.9"


def test_wheelhouse_comes_before_the_index(fake_uv: Path, tmp_path: Path) -> None:
    wheelhouse = tmp_path / "wheels"
    wheelhouse.mkdir()
    arguments = install("amd64", "torch", path=fake_uv, WHEELHOUSE=str(wheelhouse))
    assert option(arguments, "--find-links") == str(wheelhouse)
    assert option(arguments, "--torch-backend") == "cpu"
    (wheelhouse / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    assert "--torch-backend" not in install("amd64", "torch", path=fake_uv, WHEELHOUSE=str(wheelhouse))


def test_index_can_be_replaced_or_left_out(fake_uv: Path) -> None:
    url = "http://127.0.0.1:1/simple"
    assert option(install("arm64", "x", path=fake_uv, PIP_INDEX_URL=url), "--default-index") == url
    arguments = install("arm64", "x", path=fake_uv, PIP_INDEX_URL=url, PIP_NO_INDEX="1")
    assert "--no-index" in arguments
    assert url not in arguments


@pytest.mark.parametrize(("arch", "message"), [("riscv64", "expected amd64 or arm64"), ("", "DOCKER_BUILDKIT=1")])
def test_unknown_architectures_are_refused(fake_uv: Path, arch: str, message: str) -> None:
    result = run("install", arch, "x", path=fake_uv)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stdout == ""


def test_unknown_step_is_refused() -> None:
    result = run("frobnicate")
    assert result.returncode == 1
    assert "unknown step frobnicate" in result.stderr


def test_libraries_are_stripped(tmp_path: Path) -> None:
    """Of what only debuggers read; what is no library stays as it is."""
    source, library, other = tmp_path / "a.c", tmp_path / "pack" / "a.so", tmp_path / "pack" / "a.txt"
    library.parent.mkdir()
    source.write_text("int answer(void) { return 42; }\n")
    other.write_text("text")
    subprocess.run(["gcc", "-g3", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    before = library.stat().st_size
    done = run("strip", "amd64", "amd64", str(library.parent))
    assert done.returncode == 0, done.stderr
    assert library.stat().st_size < before
    assert ctypes.CDLL(str(library)).answer() == 42
    assert other.read_text() == "text"
    done = run("strip", "amd64", "amd64", str(tmp_path / "renamed"))
    assert done.returncode != 0
    assert "renamed" in done.stderr


def test_requirements_are_those_of_the_project() -> None:
    result = run("requirements", str(ROOT / "pyproject.toml"), "torch", "serve", "onnx")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    metadata = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{line}"' in metadata for line in lines)
    names = {re.split(r"[\[<>=]", line)[0] for line in lines}
    assert {"torch", "safetensors", "uvicorn", "onnxruntime", "tokenizers"} <= names


def test_extras_of_the_project_are_spelled_out() -> None:
    lines = run("requirements", str(ROOT / "pyproject.toml"), "serve", "export").stdout.splitlines()
    assert len(lines) == len(set(lines))
    names = [re.split(r"[\[<>=]", line)[0] for line in lines]
    assert {"torch", "safetensors", "transformers", "uvicorn"} <= set(names)
    assert "torch-ext" not in names


def test_what_programs_do_not_read_is_removed(tmp_path: Path) -> None:
    kept = ("a/a.py", "torch/lib/libtorch.so", "torch/bin/torch_shm_manager")
    gone = ("bin/a", "a/tests/x", "torch/include/a.h", "torch/lib/a.a")
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert run("prune", str(tmp_path)).returncode == 0
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(kept)
    assert "no folder" in run("prune", str(tmp_path / "other")).stderr


def test_init_is_a_static_program(tmp_path: Path) -> None:
    result = run("init", "amd64", "amd64", str(ROOT / "dockerfiles" / "init.c"), str(tmp_path / "app" / "init"))
    assert result.returncode == 0, result.stderr
    headers = subprocess.run(
        ["readelf", "--program-headers", str(tmp_path / "app" / "init")], capture_output=True, text=True, check=True
    ).stdout
    assert "INTERP" not in headers


def test_the_wheel_itself_needs_no_package() -> None:
    assert run("requirements", str(ROOT / "pyproject.toml"), "dependencies").stdout.split() == []


def test_serving_needs_neither_torch_nor_transformers_nor_optimum() -> None:
    result = run("requirements", str(ROOT / "pyproject.toml"), "dependencies", "serve")
    names = result.stdout.lower()
    assert "uvicorn" in names
    assert "torch" not in names
    assert "onnxruntime" not in names
    assert "numpy" not in names
    assert "transformers" not in names
    assert "optimum" not in names
