"""A few hundred of the cases of fuzz.py: no request makes the server fail, hang, or answer what is no HTTP."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.bundle.fields import TASKS
from tests.deploy.fuzz import body, check_body, check_bytes, connection, serving


@pytest.mark.parametrize("task", TASKS)
def test_bodies(task: str, tiny_model: Callable[..., Path], seed: int, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(seed)
    with serving(tiny_model("bert", task), task) as (server, rows):
        found = Counter(check_body(server.port, *body(rng, rows)) for _ in range(120))
    assert found[200] > 5  # Not all of them are nonsense.
    assert found[400] + found[422] > 20
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_connections(tiny_model: Callable[..., Path], seed: int, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(seed)
    with serving(tiny_model("bert", "fill-mask"), "fill-mask") as (server, rows):
        found = Counter(status for _ in range(80) for status in check_bytes(server.port, connection(rng, rows)))
    assert found.keys() >= {200, 400}
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
