"""verify, inspect and profile: what they print of a bundle is true, and what is wrong with it is told in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.__main__ import main
from deploy.bundle import load_manifest
from deploy.server.api import ROUTES
from deploy.tasks import TASKS
from deploy.tools.ops import HOT
from deploy.tools.profile import amdahl
from deploy.tools.requests import usual_request

Capture = pytest.CaptureFixture[str]
BundleMaker = Callable[..., Path]
QUICK = ["--max-texts", "8", "--speed-seconds", "0"]


def test_a_bundle_is_verified(tiny_bundle: BundleMaker, capsys: Capture) -> None:
    """The fp32 variant takes the place of transformers: the figures are those of the export."""
    bundle = tiny_bundle("bert", "feature-extraction")
    assert main(["verify", str(bundle), "--json", "--max-texts", "24", "--speed-seconds", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["reference"] == "torch_ext-fp32"
    assert report["missed"] == []
    assert report["texts"] == 24
    manifest = load_manifest(bundle)
    assert report["files"] == len(manifest.files)
    assert report["variants"].keys() == manifest.variants.keys()
    for name, variant in manifest.variants.items():
        found = report["variants"][name]["accuracy"]
        if name != "torch_ext-fp32":
            assert variant.accuracy is not None
            assert found["mean"] == pytest.approx(variant.accuracy.mean, abs=2e-5)
            assert found["centred_mean"] == pytest.approx(variant.accuracy.details["centred_mean"], abs=2e-4)

    assert (
        main(["verify", str(bundle), "--variants", "torch_ext-bf16", "--max-texts", "8", "--speed-seconds", ".01"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["variant", "cosine", "mean"]
    assert lines[2].startswith("torch_ext-bf16  ")
    assert lines[3].startswith("against torch_ext-fp32 on 8 texts (docstrings")


def test_pairs_and_other_models(tiny_bundle: BundleMaker, tiny_model: BundleMaker, capsys: Capture) -> None:
    bundle = tiny_bundle("bert", "question-answering")
    assert load_manifest(bundle).verification["pairs"] is True
    options = ["--variants", "torch_ext-int8", "--json", *QUICK]
    model = tiny_model("bert", "question-answering")
    assert main(["verify", str(bundle), "--model", str(model), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["reference"] == str(model)
    assert report["variants"]["torch_ext-int8"]["accuracy"]["metric"] == "exact_match"


def test_what_is_wrong_with_a_bundle(tiny_bundle: BundleMaker, tmp_path: Path, capsys: Capture) -> None:
    bundle = shutil.copytree(tiny_bundle("bert", "feature-extraction"), tmp_path / "bundle")
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["variants"]["torch_ext-int8"]["accuracy"]["bound"]["mean"] = 0.9999999
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert main(["verify", str(bundle), "--variants", "torch_ext-int8", *QUICK]) == 2
    assert "missed: torch_ext-int8: mean cosine 0.99" in capsys.readouterr().out
    for arguments, message in (
        (["--variants", "onnx-int4"], "no variant 'onnx-int4' in this bundle"),
        (["--model", str(tmp_path / "none")], "none: no such folder"),
    ):
        assert main(["verify", str(bundle), *QUICK, *arguments]) == 2
        assert message in capsys.readouterr().err
    weights = bundle / "encoder_bf16.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["verify", str(bundle), *QUICK]) == 2
    assert "encoder_bf16.safetensors: expected SHA-256" in capsys.readouterr().err
    for name in ("verify", "inspect", "profile"):
        assert main([name, str(tmp_path / "nothing")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


def test_inspect(tiny_bundle: BundleMaker, tiny_model: BundleMaker, capsys: Capture) -> None:
    bundle = tiny_bundle("bert", "feature-extraction")
    assert main(["inspect", str(bundle)]) == 0
    printed = capsys.readouterr().out
    manifest = load_manifest(bundle)
    for text in ("feature-extraction", "64 dimensions, mean pooling", *manifest.variants, *manifest.files):
        assert text in printed
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    # A folder that was not exported.
    assert main(["inspect", str(tiny_model("bert", "feature-extraction"))]) == 0
    assert "a model's folder, not exported" in capsys.readouterr().out


def test_amdahl() -> None:
    assert amdahl(0.5, 2) == pytest.approx(4 / 3)
    assert amdahl(0, 10) == 1
    assert amdahl(1, 3) == pytest.approx(3)


@pytest.mark.parametrize("task", TASKS)
def test_profile_asks_a_route_of_every_task(tiny_bundle: BundleMaker, task: str) -> None:
    manifest = load_manifest(tiny_bundle("bert", "feature-extraction"))
    path, body = usual_request(replace(manifest, task=task), "a text")
    route = next(route for route in ROUTES if (route.path, route.task) == (path, task))
    assert route.request is not None
    assert "a text" in str(msgspec.json.decode(body, type=route.request))


def test_profile(tiny_bundle: BundleMaker, capsys: Capture) -> None:
    """Whatever the times are: parts add up, and the law is the one of the parts."""
    bundle = tiny_bundle("bert", "feature-extraction")
    options = ["--seconds", "0.02", "--tokens", "20", "--threads", "1"]
    assert main(["profile", str(bundle), "--json", "--no-http", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert abs(report["tokens"] - 20) <= 3
    assert report["baseline"] == "torch_ext-fp32"
    base = report["variants"]["torch_ext-fp32"]
    for name, found in report["variants"].items():
        assert sum(found["ops"].values()) == pytest.approx(1)
        assert HOT in found["ops"], name
        assert found["total_ms"] == pytest.approx(found["tokenize_ms"] + found["model_ms"] + found["answer_ms"])
        hot = {key: item["model_ms"] * item["ops"][HOT] for key, item in (("base", base), ("own", found))}
        expected = amdahl(hot["base"] / base["total_ms"], hot["base"] / hot["own"])
        assert found["speedup"]["predicted"] == pytest.approx(expected)
    assert {"attention", "norms", "embeddings"} <= base["ops"].keys()

    assert main(["profile", str(bundle), "--variants", "torch_ext-bf16", "--workers", "1", *options]) == 0
    printed = capsys.readouterr().out
    for line in ("tokenize", "  products with weights", "pool, answer", "HTTP, client", "Amdahl's law for workers"):
        assert f"\n{line}" in printed


@pytest.mark.parametrize("command", ["inspect", "verify", "profile", "serve", "run", "export"])
@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_folder_that_the_command_runs_in(
    command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["-o", "nowhere"] if command == "export" else []
    assert main([command, name, *more]) == 2
    assert "expected a folder, or an id on the hub, got nothing: is a variable unset?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("verify DIR --threads x", "--threads: expected a whole number from 1, got 'x'"),
        ("serve DIR --max-queue-ms nan", "--max-queue-ms: expected a whole number from 1, got 'nan'"),
        ("serve DIR --keep-alive soon", "--keep-alive: expected seconds from 0, got soon"),
        ("verify DIR --speed-seconds -1", "--speed-seconds: expected seconds from 0, got -1"),
        ("verify DIR --speed-seconds inf", "--speed-seconds: expected seconds from 0, got inf"),
        ("profile DIR --seconds nan", "--seconds: expected seconds from 0, got nan"),
    ],
)
def test_numbers_that_are_none(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify", "profile", "serve", "export"])
def test_what_the_system_says_of_a_folder_is_no_bug(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A volume of another user, say: the folder may not be searched."""
    more = ["-o", str(tmp_path / "out")] if command == "export" else []
    assert main([command, "x" * 5000, *more]) == 2
    told = capsys.readouterr().err
    assert "File name too long" in told
    (tmp_path / "closed").mkdir()
    stat = os.stat

    def closed(path: Any, **how: Any) -> os.stat_result:
        if isinstance(path, str | Path) and Path(path).parent == tmp_path / "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **how)

    monkeypatch.setattr(os, "stat", closed)
    assert main([command, str(tmp_path / "closed"), *more]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'closed'}{os.sep}" in told
    assert "Permission denied" in told
    if command in {"inspect", "profile", "serve"}:  # The others have words of their own.
        assert f"; this process is of user {os.getuid()}, group {os.getgid()}\n" in told


def test_a_damaged_file_is_told_by_profile(tiny_bundle: BundleMaker, tmp_path: Path, capsys: Capture) -> None:
    bundle = shutil.copytree(tiny_bundle("bert", "feature-extraction"), tmp_path / "bundle")
    weights = bundle / "encoder_bf16.safetensors"
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    words = ["profile", str(bundle), "--variants", "torch_ext-bf16", "--seconds", "0", "--no-http"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {bundle}: torch_ext-bf16 cannot be loaded: ")
    assert "damaged" in told


def test_a_bundle_that_is_half_there_is_told_as_such(tiny_bundle: BundleMaker, tmp_path: Path, capsys: Capture) -> None:
    bundle = shutil.copytree(tiny_bundle("bert", "feature-extraction"), tmp_path / "bundle")
    (bundle / "manifest.json").unlink()
    assert main(["serve", str(bundle), "--port", "0"]) == 2
    assert f"{bundle}: no manifest.json beside files of a bundle: was it copied completely?" in capsys.readouterr().err
