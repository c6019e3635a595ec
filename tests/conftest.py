"""What all tests share: a seed that is printed and can be set, no network, and how they are spread over processes."""

from __future__ import annotations

import fcntl
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Models and tokenizers come from installed packages; a test that needs the hub is wrong.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests start servers, exports and load generators side by side: an idle OpenMP thread that spins takes their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Workers of pytest-xdist share the cores. Tests of several threads ask for them.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

SEED_VARIABLE = "TORCH_EXT_TEST_SEED"
SEED = int(os.environ.get(SEED_VARIABLE, "20240229"))

# What takes long begins first, in this order.
LONGEST = (
    "csrc/test_kernels.py",
    "deploy/test_export.py",
    "ops/test_transformers.py",
    "loadtest/test_locust.py",
    "deploy/test_server_bundles.py",
    "deploy/test_workers.py",
    "ops/test_isa.py",
    "ops/test_runtime.py",
    "benchmarks/test_encoder_benchmark.py",
    "deploy/test_export_errors.py",
    "deploy/test_load_test.py",
    "ops/test_registration.py",
    "ops/test_accelerate.py",
)
# Files, and tests of files, that need not run in one process: their fixtures are cheap, or shared by `shared_folder`.
DIVISIBLE = ("ops/test_transformers.py::", "loadtest/test_locust.py::", "ops/test_isa.py::test_whole_suite_under")
# Tests of one file that stay together, by their names: what one of them computes, the others use.
TOGETHER = {"csrc/test_kernels.py": ("under_emulation[max", "under_emulation", "clang", "gcc")}


def pytest_report_header() -> str:
    return f"seed: {SEED} (set {SEED_VARIABLE} for another)"


def pytest_configure() -> None:
    # A shell's background jobs ignore it, and so would everything that tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _place(path: str) -> int:
    return next((place for place, name in enumerate(LONGEST) if path.endswith(f"tests/{name}")), len(LONGEST))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _place(item.path.as_posix()))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of ``-n auto``: one more than cores, because tests wait for servers and load generators."""
    return min(8, len(os.sched_getaffinity(0)) + 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile``: files in the order of `LONGEST`, the divisible ones test by test."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, test = nodeid.partition("::")
            if any(part in nodeid for part in DIVISIBLE):
                return nodeid
            parts = next((parts for name, parts in TOGETHER.items() if path.endswith(name)), ())
            return path + next((part for part in parts if part in test), "")

    config.option.loadscopereorder = False  # the order is that of `pytest_collection_modifyitems`
    return Scheduling(config, log)


@pytest.fixture
def seed() -> int:
    """The seed of this run; Python's generator starts from it."""
    random.seed(SEED)
    return SEED


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Folders that are made once for all processes of a run: `shared_folder(name, make)`.

    `make` gets a path that does not exist yet, and is called by the process that comes first; others wait.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = base / f"shared-{name}", base / f"shared-{name}.done"
        with (base / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return get
