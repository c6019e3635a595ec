"""The OpenAPI document, as it was when somebody last looked at it: a change of the API shows in a diff.

`snapshots/openapi.json` is the document of an embedding model, and `snapshots/TASK.diff` what is other for other tasks.
Where the change is wanted: TORCH_EXT_RENEW=1 make test ARGS=tests/deploy/test_openapi.py
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from deploy.bundle.fields import TASKS
from tests.deploy.server_harness import make_manifest, running

FOLDER = Path(__file__).parent / "snapshots"
FIRST = "feature-extraction"
COMMAND = "TORCH_EXT_RENEW=1 make test ARGS=tests/deploy/test_openapi.py"


def lines_of(folder: Path, task: str) -> list[str]:
    """The document of a server for a task, as lines."""
    with running(make_manifest(folder, task)) as server:
        document: dict[str, Any] = server("GET", "/openapi.json").json
    document["components"]["schemas"] = dict(sorted(document["components"]["schemas"].items()))
    document["x-limits"]["memory"]["limit"] = "..."  # Of this machine.
    return json.dumps(document, indent=1, ensure_ascii=False).splitlines()


def difference(one: list[str], other: list[str]) -> list[str]:
    """What is other, without the numbers of lines, which change with everything before them."""
    found = list(difflib.unified_diff(one, other, n=1, lineterm=""))[2:]
    return ["@@" if line.startswith("@@") else line for line in found]


@pytest.mark.parametrize("task", TASKS)
def test_the_document_is_the_one_that_was_looked_at(task: str, tmp_path: Path) -> None:
    path = FOLDER / ("openapi.json" if task == FIRST else f"{task}.diff")
    found = lines_of(tmp_path, task)
    if task != FIRST:
        found = difference(lines_of(tmp_path, FIRST), found)
    if os.environ.get("TORCH_EXT_RENEW"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(found) + "\n", encoding="utf-8")
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    changes = list(difflib.unified_diff(known, found, path.name, "the server", lineterm="", n=4))
    if changes:
        pytest.fail("\n".join([*changes[:200], "", f"If this is wanted: {COMMAND}"]), pytrace=False)
