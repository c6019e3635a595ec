"""`python -m deploy run`: an export once, then the server; both replaced by functions that say how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy import run
from deploy.bundle import MANIFEST_FILE

ROOT = Path(__file__).resolve().parents[2]


class Calls:
    """Stands for exporter and server.

    Attributes:
        exports: Model, target and options of each export.
        served: Arguments of the server, each time it was started.
        code: What the exporter returns.
    """

    def __init__(self) -> None:
        self.exports: list[tuple[str, Path, list[str]]] = []
        self.served: list[list[str]] = []
        self.code = 0

    def export(self, model: str, target: Path, options: list[str]) -> int:
        self.exports.append((model, target, options))
        if self.code == 0:
            target.mkdir()
            (target / MANIFEST_FILE).write_text("{}")
        return self.code

    def serve(self, argv: list[str]) -> int:
        self.served.append(list(argv))
        return 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    found = Calls()
    monkeypatch.setattr(run, "_export", found.export)
    monkeypatch.setattr(run, "serve", found.serve)
    monkeypatch.setenv("BUNDLES", str(tmp_path / "bundles"))
    for name in ("MODEL_ID", "REVISION", "EXPORT_ARGS", "HF_TOKEN", "HF_API_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_a_model_is_exported_once(calls: Calls, tmp_path: Path) -> None:
    argv = ["--model-id", "some/model", "--max-batch-tokens", "4096"]
    assert run.main(argv) == 0
    assert run.main(argv) == 0
    ((model, target, options),) = calls.exports
    assert model == "some/model"
    assert target.parent == tmp_path / "bundles"
    assert target.name.startswith("some--model-")
    assert options == ["--variants", run.VARIANTS]
    assert calls.served == [[str(target), *argv]] * 2


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["some/model", "--port", "7"], ["BUNDLE", "--port", "7"]),
        (["--port", "7", "some/model"], ["--port", "7", "BUNDLE"]),
        (["--served-model-name", "some/model", "some/model"], ["--served-model-name", "some/model", "BUNDLE"]),
        (["--model-id=some/model"], ["BUNDLE", "--model-id=some/model"]),
    ],
    ids=["first", "last", "twice", "option"],
)
def test_the_bundle_takes_the_models_place(calls: Calls, argv: list[str], expected: list[str]) -> None:
    assert run.main(argv) == 0
    target = str(calls.exports[0][1])
    assert calls.served == [[target if word == "BUNDLE" else word for word in expected]]


def test_what_holds_for_the_export(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPORT_ARGS", "--variants torch_ext-bf16 --texts 'my texts'")
    argv = ["--model-id", "m", "--revision", "v1", "--pooling", "last-token", "--task", "feature-extraction"]
    assert run.main([*argv, "--hf-api-token", "secret", "--huggingface-hub-cache=/cache"]) == 0
    ((_, target, options),) = calls.exports
    assert options == [
        *("--variants", "torch_ext-bf16", "--texts", "my texts"),
        *("--revision", "v1", "--task", "feature-extraction", "--pooling", "lasttoken"),
    ]
    # The server reads the task in the bundle, and hears of nothing that it would call without effect.
    assert calls.served == [[str(target), "--model-id", "m", "--pooling", "last-token"]]
    assert (os.environ["HF_TOKEN"], os.environ["HF_HUB_CACHE"]) == ("secret", "/cache")


def test_environment_of_tei(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_ID", "some/model")
    monkeypatch.setenv("REVISION", "v2")
    assert run.main([]) == 0
    assert calls.exports[0][0] == "some/model"
    assert calls.exports[0][2][-2:] == ["--revision", "v2"]
    assert calls.served == [[str(calls.exports[0][1])]]


def test_a_bundle_depends_on_what_it_is_made_of(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = {run.bundle_name(str(folder), []), run.bundle_name(str(folder), ["--revision", "a"])}
    (folder / "config.json").write_text('{"a": 1}')
    names.add(run.bundle_name(str(folder), []))
    assert len(names) == 3
    assert not any("/" in name or name.startswith(".") for name in names)


def test_a_bundle_is_served_as_it_is(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text("{}")
    assert run.main([str(tmp_path)]) == 0
    assert calls.exports == []
    assert calls.served == [[str(tmp_path)]]


def test_a_failed_export_ends_it_and_leaves_nothing(calls: Calls, tmp_path: Path) -> None:
    calls.code = 2
    assert run.main(["some/model"]) == 2
    assert calls.served == []
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_all_that_an_export_leaves(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    calls.code = 2
    assert run.main(["other/model"]) == 2
    calls.code = 0
    assert run.main(["some/model"]) == 0
    assert list((tmp_path / "bundles").iterdir()) == [calls.exports[1][1]]


def test_one_process_at_a_time_exports(tmp_path: Path) -> None:
    """A lock file that its holder removes is no lock for those who still wait for it."""
    path = tmp_path / "bundles" / ".lock"
    inside: list[int] = []
    most: list[int] = []

    def hold() -> None:
        for _ in range(50):
            with run._locked(path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(1e-4)
                inside.pop()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(hold) for _ in range(4)]:
            done.result()
    assert (max(most), len(most)) == (1, 200)


def test_a_folder_that_cannot_be_written_to(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BUNDLES", str(tmp_path / "file" / "bundles"))
    assert run.main(["some/model"]) == 2
    assert "name a folder of a volume that this user can write to by BUNDLES" in capsys.readouterr().err
    assert calls.exports == []


def test_a_signal_ends_the_exporter(tmp_path: Path) -> None:
    """The exporter is replaced by a program that says when it runs, and leaves a mark when it is ended."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/bin/sh\ntrap 'touch {tmp_path}/ended; exit 143' TERM\ntouch {tmp_path}/begun\nsleep 60 & wait\n"
    )
    fake.chmod(0o755)
    code = f"import sys; sys.executable = {str(fake)!r}; from deploy.run import main; sys.exit(main(['some/model']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "BUNDLES": str(tmp_path / "bundles")}
    )
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "ended", "python"]
