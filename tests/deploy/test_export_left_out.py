"""Variants that cannot be had: left out with a warning or a note, or refused, where they were asked for by name."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from deploy.bundle import VARIANTS, load_manifest
from deploy.export import write_onnx
from deploy.export.cli import main
from deploy.export.errors import ExportError
from deploy.export.needs import onnx_missing
from deploy.extras import how_to_install
from deploy.tasks.comparison import Labels, Masks

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--max-texts", "4", "--speed-seconds", "0", "--quiet"]
Capture = pytest.CaptureFixture[str]
ModelMaker = Callable[..., Path]


def test_onnx_variant_that_misses_its_bound(tiny_model: ModelMaker, tmp_path: Path, capsys: Capture) -> None:
    """The others are written, with a warning that --quiet does not hide; nothing of it is left in the bundle."""
    target, bound = tmp_path / "out", ["--bound", "onnx-int8.mean=0.999999"]
    variants = ["--variants", "torch_ext-bf16,onnx-int8"]
    assert main([str(tiny_model()), "-o", str(target), *QUICK, *variants, *bound]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: onnx-int8 is left out of the bundle: onnx-int8 misses its accuracy bound on 4 te")
    manifest = load_manifest(target)
    assert list(manifest.variants) == ["torch_ext-bf16"]
    assert "mean cosine 0.99" in manifest.verification["left_out"]["onnx-int8"]
    assert not [path.name for path in target.iterdir() if "onnx" in path.name]

    # Nothing would be left: an error.
    none = ["--variants", "onnx-int8", "--force", *bound]
    assert main([str(tiny_model()), "-o", str(target), *QUICK, *none]) == 2
    assert capsys.readouterr().err.startswith("error: onnx-int8 misses its accuracy bound")
    assert list(load_manifest(target).variants) == ["torch_ext-bf16"]


def test_model_that_optimum_does_not_write(
    tiny_model: ModelMaker, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: Any, kind: Any, work: Path, *rest: Any) -> None:
        work.mkdir()
        (work / "half").touch()
        raise ExportError("optimum cannot write this model as ONNX: no such operator")

    monkeypatch.setattr(write_onnx, "_export_fp32", fails)
    variants = ["--variants", "torch_ext-bf16,onnx-int8,onnx-fp32"]
    assert main([str(tiny_model()), "-o", str(tmp_path / "out"), *QUICK, *variants]) == 0
    printed = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in printed] == [
        " onnx-int8 is left out of the bundle",
        " onnx-fp32 is left out of the bundle",
    ]
    assert list(load_manifest(tmp_path / "out", verify=True).variants) == ["torch_ext-bf16"]
    assert not (tmp_path / "out" / "onnx.tmp").exists()


def test_without_the_packages_of_onnx(
    tiny_model: ModelMaker, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optimum", None)
    reason = f"ONNX variants need optimum-onnx, which is not installed ({how_to_install('export-onnx')})"
    assert main([str(tiny_model()), "-o", str(tmp_path / "a"), *QUICK, "--variants", "onnx-fp32"]) == 2
    ours = "torch_ext-bf16,torch_ext-int8,torch_ext-fp32"
    assert capsys.readouterr().err == f"error: {reason}, or pass --variants {ours}\n"
    assert not (tmp_path / "a").exists()

    assert main([str(tiny_model()), "-o", str(tmp_path / "b"), *QUICK]) == 0
    assert capsys.readouterr().err == f"note: {reason}; writing {ours.replace(',', ', ')}\n"
    assert list(load_manifest(tmp_path / "b").variants) == ours.split(",")
    assert load_manifest(tmp_path / "b").created_with["onnx"]


def test_transformers_that_optimum_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert onnx_missing() is None
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "5.24.0" if name == "transformers" else version(name)
    )
    assert str(onnx_missing()).startswith("ONNX variants need transformers<4.58")
    assert "and 5.24.0 is installed" in str(onnx_missing())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no tomllib")
def test_only_the_extra_with_onnx_holds_transformers() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    packages = {Requirement(text).name: Requirement(text) for text in extras["export"]}
    assert not {"optimum-onnx", "onnx", "onnxruntime"} & packages.keys()
    assert all(packages["transformers"].specifier.contains(version) for version in ("4.57.0", "5.24.0"))
    both = [Requirement(text) for name in ("export", "serve") for text in extras[name]]
    assert all(item.specifier.contains("0.23.3") for item in both if item.name == "tokenizers")
    assert "optimum-onnx" in {Requirement(text).name for text in extras["export-onnx"]}


# A bound that is wrong in kind


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_error_of_logits_is_relative_to_their_size_but_not_below_1(size: float) -> None:
    """A head that cannot tell its classes apart gives logits that are all near 0: any rounding is large beside them."""
    rng = np.random.default_rng(0)
    right = rng.normal(size=(64, 4)) * size
    right -= right.mean(axis=1, keepdims=True)
    noise = rng.normal(size=(64, 4)) * 0.01
    noise -= noise.mean(axis=1, keepdims=True)
    expected = np.sqrt((noise**2).mean()) / max(1.0, np.sqrt((right**2).mean()))
    for labels in (Labels(64, "softmax"), Masks(64)):
        for text, row in enumerate(right):
            labels.remember(text, row if isinstance(labels, Labels) else row[None])
        got = [(text, row if isinstance(labels, Labels) else row[None]) for text, row in enumerate(right + noise)]
        _, details = labels.measure(got)
        # The best tokens count twice in Masks.
        assert details["logit_error"] == pytest.approx(expected, rel=1e-6 if isinstance(labels, Labels) else 0.2)
    # Numbers that are the answer have a unit of their own.
    numbers = Labels(64, "none")
    for text, row in enumerate(right):
        numbers.remember(text, row)
    _, details = numbers.measure(list(enumerate(right + noise)))
    assert details["logit_error"] == pytest.approx(np.sqrt((noise**2).mean() / (right**2).mean()), rel=1e-6)


def test_albert_classifier_whose_logits_are_near_0(tiny_model: ModelMaker, tmp_path: Path) -> None:
    model = tiny_model("albert", "text-classification")
    names = "torch_ext-bf16,torch_ext-int8"
    assert main([str(model), "-o", str(tmp_path / "out"), *QUICK, "--variants", names]) == 0
    variants = load_manifest(tmp_path / "out").variants
    assert list(variants) == [name for name in VARIANTS if name in names.split(",")]
    assert variants["torch_ext-int8"].accuracy is not None
    assert variants["torch_ext-int8"].accuracy.details["layers_in_bf16"] == 0
