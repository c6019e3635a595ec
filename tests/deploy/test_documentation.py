"""The Python of docs/extension.md and docs/runtime.md runs as it is printed, with a small model in place of theirs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.export.cli import main

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """Where the names in the pages lead to a small model."""
    (tmp_path / "sentence-transformers").mkdir()
    for name in ("folder", "all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        shutil.copytree(tiny_model(), tmp_path / name)
    return tmp_path


def test_runtime(folder: Path) -> None:
    options = ["--variants", "torch_ext-bf16", "--max-texts", "8", "--speed-seconds", "0", "--quiet"]
    assert main([str(folder / "folder"), "-o", str(folder / "bundle"), *options]) == 0
    run("\n".join(blocks("runtime.md")), folder)


def test_extension(folder: Path) -> None:
    first, *others = blocks("extension.md")
    fresh, call = first.split("torch_ext.optimize(")
    run(f"{fresh}torch_ext.optimize({call}", folder)
    for other in others:  # Each starts from a fresh model.
        run(fresh + other, folder)
