"""What all tests share: a seed that is printed and can be set, and no network."""

from __future__ import annotations

import os
import random

import pytest

# Models and tokenizers come from installed packages; a test that needs the hub is wrong.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests start servers, exports and load generators side by side: an idle OpenMP thread that spins takes their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SEED_VARIABLE = "TORCH_EXT_TEST_SEED"
SEED = int(os.environ.get(SEED_VARIABLE, "20240229"))


def pytest_report_header() -> str:
    return f"seed: {SEED} (set {SEED_VARIABLE} for another)"


@pytest.fixture
def seed() -> int:
    """The seed of this run; Python's generator starts from it."""
    random.seed(SEED)
    return SEED
