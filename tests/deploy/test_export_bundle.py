"""The manifest: what is written is what is read, and everything that is wrong is told by name."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy import bundle
from deploy.bundle import BundleError, load_manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle with one variant whose files hold a few bytes."""
    root = tmp_path / "bundle"
    root.mkdir()
    for name in ("tokenizer.json", "config.json", "model.onnx", "model_int8.onnx"):
        (root / name).write_bytes(name.encode() * 3)
    files = {path.name: bundle.file_entry(path) for path in root.iterdir()}

    def variant(name: str) -> bundle.Variant:
        kind = bundle.VARIANTS[name]
        return bundle.Variant(
            name,
            kind.file,
            kind.engine,
            kind.dtype,
            files[kind.file].bytes,
            bundle.Accuracy("cosine", 0.999, 0.99, 8, {"mean": 0.985}, {"length_error": 0.0}),
            bundle.Speed(12.5, 2, "some CPU", 32) if name == "onnx-int8" else None,
            quantization={"kept_bf16": ["layers.0.ffn.up"], "layers": []} if name == "onnx-int8" else {},
            kernels="onnxruntime-1.32.0, u8 by s8" if name == "onnx-int8" else "onnxruntime-1.32.0",
        )

    bundle.write_manifest(
        bundle.Manifest(
            root=root,
            model=bundle.ModelInfo("a model", None, "BertModel"),
            created_with={"torch": "2.13.0"},
            task="feature-extraction",
            hidden_size=8,
            max_tokens=128,
            pooling=bundle.Pooling("mean", True, "default"),
            labels=None,
            problem_type=None,
            special_tokens={"pad": bundle.SpecialToken(0, "[PAD]"), "mask": None, "cls": None, "sep": None},
            files=files,
            variants={name: variant(name) for name in ("onnx-int8", "onnx-fp32")},
            verification={"texts": 8},
            machine=bundle.Machine("some CPU", "x86_64", ("avx2", "fma")),
        )
    )
    return root


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_what_is_written_is_read(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert manifest.to_json() == json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest.tokenizer_path == folder / "tokenizer.json"
    assert manifest.variant("onnx-int8").speed == bundle.Speed(12.5, 2, "some CPU", 32)
    assert manifest.variant("onnx-fp32").speed is None
    assert manifest.variant("onnx-int8").quantization["kept_bf16"] == ["layers.0.ffn.up"]
    assert manifest.variant("onnx-fp32").quantization == {}
    assert manifest.path("model.onnx").is_file()
    assert str(manifest.machine) == "some CPU (x86_64: avx2 fma)"
    assert manifest.variant("onnx-int8").kernels == "onnxruntime-1.32.0, u8 by s8"


def test_fields_of_a_later_minor_change_are_ignored(folder: Path) -> None:
    change(folder, lambda value: value.update(later={"a": 1}))
    change(folder, lambda value: value["variants"]["onnx-fp32"].update(later=[1]))
    assert load_manifest(folder).task == "feature-extraction"


def test_bundles_of_before_are_read(folder: Path) -> None:
    """Without variants that exist today, and without fields that are optional."""
    change(folder, lambda value: value["variants"]["onnx-int8"].pop("quantization"))
    change(folder, lambda value: value["variants"]["onnx-fp32"].pop("extra_files"))
    change(folder, lambda value: value["variants"]["onnx-fp32"].pop("kernels"))
    change(folder, lambda value: value.pop("machine"))
    manifest = load_manifest(folder)
    assert list(manifest.variants) == ["onnx-int8", "onnx-fp32"]
    assert manifest.variant("onnx-int8").quantization == {}
    assert (manifest.machine, manifest.variant("onnx-fp32").kernels) == (None, None)
    assert manifest.to_json() == json.loads((folder / "manifest.json").read_text(encoding="utf-8")) | {
        "variants": manifest.to_json()["variants"]
    }
    with pytest.raises(BundleError, match="no variant 'torch_ext-int8' in this bundle; choose one of onnx-int8, onnx-"):
        manifest.variant("torch_ext-int8")
    with pytest.raises(BundleError, match=r"no variant 'int8' in this bundle; choose one of onnx-int8, onnx-fp32$"):
        manifest.variant("int8")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(format="zip"), "expected format 'torch-ext-bundle', got 'zip'"),
        (lambda v: v.update(format_version=2), "expected format_version 1, got 2"),
        (lambda v: v.update(format_version="1"), "format_version: expected an integer, got a string"),
        (lambda v: v.update(task="translation"), "task: expected one of feature-extraction"),
        (lambda v: v.pop("hidden_size"), "hidden_size: expected an integer, got nothing"),
        (lambda v: v.update(hidden_size=True), "hidden_size: expected an integer, got true or false"),
        (lambda v: v["limits"].update(max_tokens=0), r"limits.max_tokens: expected at least 1, got 0"),
        (lambda v: v.update(pooling=None), "pooling: expected an object"),
        (lambda v: v["pooling"].update(mode="last"), "pooling.mode: expected one of mean, cls, max, .*, got 'last'"),
        (lambda v: v["special_tokens"].update(pad=None), "special_tokens.pad: expected a token"),
        (lambda v: v.update(task="fill-mask"), "special_tokens.mask: expected a token"),
        (lambda v: v.update(task="text-classification"), "labels: expected an array"),
        (lambda v: v.update(task="text-classification", labels=[]), "labels: expected at least one"),
        (lambda v: v.update(variants={}), "variants: expected at least one variant"),
        (lambda v: v["variants"]["onnx-fp32"].update(engine="exec"), "engine: expected one of torch_ext"),
        (lambda v: v["variants"]["onnx-fp32"].update(file="other.onnx"), "not listed in files"),
        (lambda v: v["variants"]["onnx-fp32"]["accuracy"].update(mean=None), "accuracy.mean: expected an integer or"),
        (lambda v: v["machine"].pop("cpu"), "machine.cpu: expected a string, got nothing"),
        (lambda v: v["machine"].update(instruction_sets="avx2"), "instruction_sets: expected an array, got a string"),
        (lambda v: v.update(machine="a fast one"), "machine: expected an object, got a string"),
        (lambda v: v["variants"]["onnx-fp32"].update(kernels=3), "kernels: expected a string, got an integer"),
        (lambda v: v["files"].pop("tokenizer.json"), "expected an entry for tokenizer.json"),
        (lambda v: v["files"]["model.onnx"].update(sha256="F" * 64), "sha256: expected 64 hexadecimal digits"),
        (lambda v: v["files"]["model.onnx"].update(bytes=-1), "bytes: expected at least 0, got -1"),
    ],
)
def test_wrong_fields_are_named(folder: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    change(folder, edit)
    with pytest.raises(BundleError, match=message):
        load_manifest(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "a\0b", "a\nb", "manifest.json", "ü"]
)
def test_file_names_that_lead_elsewhere_are_refused(folder: Path, name: str) -> None:
    def rename(value: dict[str, Any]) -> None:
        value["files"][name] = value["files"].pop("model.onnx")
        value["variants"]["onnx-fp32"]["file"] = name

    change(folder, rename)
    with pytest.raises(BundleError, match="expected the plain name of a file"):
        load_manifest(folder)

    def restore(value: dict[str, Any]) -> None:
        value["files"]["model.onnx"] = value["files"].pop(name)
        value["variants"]["onnx-fp32"].update(file="model.onnx", extra_files=[name])

    change(folder, restore)
    with pytest.raises(BundleError, match="expected the plain name of a file"):
        load_manifest(folder)


def test_files_are_compared_with_the_manifest(folder: Path) -> None:
    file = folder / "model.onnx"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=rf"model.onnx: expected {len(whole)} bytes, got {len(whole) - 1}"):
        load_manifest(folder, verify=False)
    file.write_bytes(whole[:-1] + b"?")
    load_manifest(folder, verify=False)
    with pytest.raises(BundleError, match=r"model.onnx: expected SHA-256 [0-9a-f]{64}, got"):
        load_manifest(folder)
    # Whoever runs the other variant need not have this file, nor read it.
    load_manifest(folder, variants=["onnx-int8"])
    file.unlink()
    load_manifest(folder, variants=["onnx-int8"])
    with pytest.raises(BundleError, match="listed in the manifest but missing"):
        load_manifest(folder, verify=False)
    file.mkdir()
    with pytest.raises(BundleError, match="expected a regular file"):
        load_manifest(folder, verify=False)


def test_what_is_no_bundle(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder; make one with: python -m deploy export"):
        load_manifest(tmp_path / "missing")
    with pytest.raises(BundleError, match="found a file"):
        load_manifest(folder / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"not a bundle \(no manifest.json\)"):
        load_manifest(tmp_path / "empty")
    for content, message in (
        (b"{", "expected JSON in UTF-8"),
        (b"\xff", "expected JSON in UTF-8"),
        (b"[" * 100_000, "expected JSON in UTF-8"),
        (b"[]", "expected a JSON object, got an array"),
        (b"{}", "expected format 'torch-ext-bundle', got None"),
        (b" " * (17 << 20), "expected at most 16777216 bytes"),
    ):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(BundleError, match=message):
            load_manifest(folder)


def test_unknown_variant_and_file(folder: Path) -> None:
    manifest = load_manifest(folder)
    with pytest.raises(
        BundleError, match="no variant 'torch_ext-fp32' in this bundle; choose one of onnx-int8, onnx-fp32"
    ):
        manifest.variant("torch_ext-fp32")
    with pytest.raises(BundleError, match="no file"):
        manifest.path("../secret")


def test_a_manifest_that_would_not_be_read_is_not_written(folder: Path) -> None:
    manifest = load_manifest(folder)
    before = (folder / "manifest.json").read_bytes()
    broken = copy.deepcopy(manifest)
    object.__setattr__(broken, "hidden_size", 0)
    with pytest.raises(BundleError, match="hidden_size"):
        bundle.write_manifest(broken)
    object.__setattr__(broken, "hidden_size", float("nan"))
    with pytest.raises(BundleError, match="finite"):
        bundle.write_manifest(broken)
    assert (folder / "manifest.json").read_bytes() == before


def test_files_that_a_manifest_owns(folder: Path) -> None:
    """Also of a bundle that cannot be loaded: one that is damaged, or of another version."""
    owned = {"manifest.json", "tokenizer.json", "config.json", "model.onnx", "model_int8.onnx"}
    (folder / "notes.txt").write_bytes(b"mine")
    assert bundle.owned_files(folder) == owned
    (folder / "model.onnx").unlink()
    change(folder, lambda value: value.update(format_version=7, variants=[]))
    assert bundle.owned_files(folder) == owned
    change(folder, lambda value: value["files"].update({"../notes.txt": {}}))
    with pytest.raises(BundleError, match="expected the plain name of a file"):
        bundle.owned_files(folder)
    for content in ('{"files": {"notes.txt": {}}}', '{"format": "torch-ext-bundle"}', '["notes.txt"]', "{"):
        (folder / "manifest.json").write_text(content, encoding="utf-8")
        with pytest.raises(BundleError, match=r"manifest\.json"):
            bundle.owned_files(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(BundleError, match="not a bundle"):
        bundle.owned_files(folder)


def test_reading_needs_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules); import deploy.bundle, deploy.texts, deploy.__main__; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'deploy'}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_prompts_activation_and_truncation(folder: Path) -> None:
    plain = load_manifest(folder)
    assert (plain.prompts, plain.activation, plain.truncation_side) == (None, None, "right")
    assert not {"prompts", "activation"} & plain.to_json().keys()
    prompts = {"default": "query", "texts": {"query": "query: ", "document": ""}}
    change(folder, lambda value: value.update(prompts=prompts))
    change(folder, lambda value: value["limits"].update(truncation_side="left"))
    manifest = load_manifest(folder)
    assert manifest.prompts is not None
    assert (manifest.prompts.default_text, manifest.truncation_side) == ("query: ", "left")
    assert manifest.to_json() == json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert bundle.Prompts({"query": "query: "}).default_text == ""
    classifier = {"task": "text-classification", "labels": ["a"], "problem_type": "regression", "activation": "sigmoid"}
    change(folder, lambda value: value.update(classifier))
    assert load_manifest(folder).to_json()["activation"] == "sigmoid"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"prompts": {"texts": {"query": 1}}}, "prompts.texts.query: expected a string, got an integer"),
        ({"prompts": {"texts": {"a": "b"}, "default": "c"}}, "prompts.default: expected one of a, got 'c'"),
        (
            {"prompts": {"texts": {}, "default": "c"}},
            "prompts.default: expected one of the texts, and there are none, got 'c'",
        ),
        ({"limits": {"max_tokens": 8, "truncation_side": "middle"}}, "truncation_side: expected one of right, left"),
        (
            {"task": "text-classification", "labels": ["a"], "problem_type": "regression", "activation": "tanh"},
            "activation: expected one of sigmoid, softmax, none, got 'tanh'",
        ),
    ],
)
def test_wrong_fields_of_later_are_named(folder: Path, edit: dict[str, Any], message: str) -> None:
    change(folder, lambda value: value.update(edit))
    with pytest.raises(BundleError, match=message):
        load_manifest(folder)
