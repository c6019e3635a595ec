"""What the images' entry point sets for a container, on machines made of files."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torch_ext.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "dockerfiles" / "entrypoint.py"


@pytest.fixture(scope="module")
def entrypoint() -> Any:
    spec = importlib.util.spec_from_file_location("entrypoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine(
    root: Path, *, quota: str = "max 100000", pages: str = "always [madvise] never", page: int = 4096
) -> Machine:
    """A container with 8 CPUs."""
    files = {
        "proc/self/cgroup": "0::/",
        "proc/self/mountinfo": "30 29 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw",
        "sys/fs/cgroup/cpu.max": quota,
        "sys/kernel/mm/transparent_hugepage/enabled": pages,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return Machine(root, environ={}, affinity=8, architecture="aarch64", page_bytes=page)


def test_threads_follow_the_quota(entrypoint: Any, tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    line = entrypoint.settle(machine(tmp_path, quota="150000 100000"), environ, has_torch=False)
    assert line == "threads=1 (quota of 1.5, 8 CPUs), huge pages=madvise, allocator=glibc"
    assert environ == {"OMP_NUM_THREADS": "1"}


def test_the_exporter_gets_huge_pages_and_a_larger_cache(entrypoint: Any, tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    line = entrypoint.settle(machine(tmp_path), environ, has_torch=True)
    assert environ == {"OMP_NUM_THREADS": "8", "THP_MEM_ALLOC_ENABLE": "1", "LRU_CACHE_CAPACITY": "1024"}
    assert line == (
        "threads=8 (no quota, 8 CPUs), huge pages=madvise THP_MEM_ALLOC_ENABLE=1, LRU_CACHE_CAPACITY=1024, "
        "allocator=glibc"
    )


def test_what_the_user_set_stays(entrypoint: Any, tmp_path: Path) -> None:
    given = {"OMP_NUM_THREADS": "3", "THP_MEM_ALLOC_ENABLE": "0", "LRU_CACHE_CAPACITY": "7"}
    environ = dict(given)
    line = entrypoint.settle(machine(tmp_path), environ, has_torch=True)
    assert environ == given
    assert line.startswith("threads=3 ")
    assert "LRU_CACHE_CAPACITY=7" in line


@pytest.mark.parametrize("pages", ["[always] madvise never", "always madvise [never]"])
def test_huge_pages_are_asked_for_only_where_it_helps(entrypoint: Any, tmp_path: Path, pages: str) -> None:
    environ: dict[str, str] = {}
    entrypoint.settle(machine(tmp_path, pages=pages), environ, has_torch=True)
    assert "THP_MEM_ALLOC_ENABLE" not in environ


def test_allocators_that_cannot_run_are_dropped(entrypoint: Any, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libjemalloc.so.2").touch()
    (tmp_path / "lib" / "libtcmalloc.so.4").touch()
    given = "/lib/libjemalloc.so.2:/lib/libtcmalloc.so.4:/lib/missing.so"
    environ = {"LD_PRELOAD": given}
    line = entrypoint.settle(machine(tmp_path), environ, has_torch=False)
    assert environ["LD_PRELOAD"] == "/lib/libjemalloc.so.2:/lib/libtcmalloc.so.4"
    assert line.endswith("allocator=/lib/libjemalloc.so.2:/lib/libtcmalloc.so.4 (/lib/missing.so is not there)")
    environ = {"LD_PRELOAD": "/lib/libjemalloc.so.2"}
    line = entrypoint.settle(machine(tmp_path, page=65536), environ, has_torch=False)
    assert "LD_PRELOAD" not in environ
    assert "glibc (/lib/libjemalloc.so.2 aborts on pages of 64 KiB unless built for them)" in line


def test_it_runs_the_command_in_its_own_process() -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: python -m deploy COMMAND")
    assert result.stderr.startswith("entry point: threads=")
    assert len(result.stderr.splitlines()) == 1
