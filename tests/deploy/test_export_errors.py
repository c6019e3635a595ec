"""Whatever goes wrong is told in one line, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.__main__ import main as deploy_main
from deploy.bundle import FORMAT, VARIANTS, load_manifest
from deploy.export import staging
from deploy.export.cli import main
from deploy.export.errors import ExportError, first_line, is_disk_full
from deploy.export.staging import Staging, check_target

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--max-texts", "4", "--speed-seconds", "0", "--quiet", "--variants", "onnx-fp32"]
Capture = pytest.CaptureFixture[str]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def old_bundle(folder: Path, **files: bytes) -> dict[str, bytes]:
    """Makes a folder with a manifest that owns `files`, and returns its contents."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"format": FORMAT, "format_version": 1, "files": {name: {} for name in files}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return contents(folder)


def fails(capsys: Capture, arguments: list[str], message: str, code: int = 2) -> None:
    """Runs the command and checks that it fails with one line that says `message`."""
    capsys.readouterr()
    assert main(arguments) == code
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert printed.out == ""


# The command line


def test_usage(capsys: Capture) -> None:
    assert deploy_main([]) == 2
    assert "commands:" in capsys.readouterr().err
    assert deploy_main(["--help"]) == 0
    assert "export" in capsys.readouterr().out
    assert deploy_main(["exprt"]) == 2
    assert "unknown command 'exprt'; expected one of export, verify" in capsys.readouterr().err
    assert deploy_main(["export", "--help"]) == 0
    assert "--force" in capsys.readouterr().out
    assert deploy_main(["export"]) == 2
    assert "required: MODEL, -o/--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "translation"], "invalid choice: 'translation'"),
        (
            ["--variants", "onnx-int4"],
            "expected names of torch_ext-bf16, torch_ext-int8, torch-export-bf16, onnx-int8, onnx-f",
        ),
        (["--accuracy", "1.5"], "expected a number above 0 and at most 1, got 1.5"),
        (["--accuracy", "0.99", "--variants", "onnx-fp32"], "--accuracy is for torch_ext-int8, and the variants are o"),
        (["--variants", ","], "expected names of"),
        (["--bound", "onnx-int8=0.9"], "expected onnx-int8.mean=0.98, NAME one of mean, min"),
        (["--bound", "onnx-int8.mean=much"], "expected onnx-int8.mean=0.98"),
        (["--bound", "onnx-int8.mean=nan"], "expected onnx-int8.mean=0.98"),
        (["--max-texts", "0"], "expected at least 1, got 0"),
        (["--threads", "-1"], "expected at least 1, got -1"),
    ],
)
def test_options_that_are_wrong(options: list[str], message: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["model", "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_and_simple_errors_take_no_library() -> None:
    code = (
        "import sys; from deploy.__main__ import main;"
        "main(['export', '--help']); main(['export', '/nowhere', '-o', 'x']);"
        "print(sorted({'torch', 'transformers', 'optimum', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.endswith("[]\n")
    assert "error: /nowhere: no such folder" in done.stderr


# What is told before anything is written


def test_models_that_are_none(tmp_path: Path, capsys: Capture) -> None:
    out = ["-o", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    fails(capsys, [str(tmp_path / "empty"), *out], r"not a model folder \(no config.json\)")
    fails(capsys, [str(tmp_path / "missing"), *out], "no such folder")
    fails(capsys, [str(tmp_path / "file"), *out], "found a file")
    assert not (tmp_path / "out").exists()


def test_targets_that_are_taken(tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    model = str(tiny_model())
    (tmp_path / "file").write_bytes(b"mine")
    fails(capsys, [model, "-o", str(tmp_path / "file")], "expected a folder to write, found a file")
    fails(capsys, [model, "-o", str(tmp_path / "file" / "below")], "file is a file, not a folder")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_bytes(b"mine")
    fails(capsys, [model, "-o", str(full)], r"the folder holds notes\.txt and is not a bundle, and only bundles are ")
    assert contents(tmp_path) == {"file": b"mine", "full/notes.txt": b"mine"}
    old_bundle(tmp_path / "full", **{"notes.txt": b"theirs"})
    fails(
        capsys, [model, "-o", str(full)], "a bundle is there already; pass --force to replace it, or choose another f"
    )
    (tmp_path / "loop").symlink_to("loop")
    fails(capsys, [model, "-o", str(tmp_path / "loop")], "the symbolic link leads to itself")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    fails(capsys, [model, "-o", str(tmp_path / "link"), "--force"], "pipe: expected a folder to write, found a file")


def make_thesis(folder: Path) -> None:
    (folder / "thesis.txt").write_bytes(b"years of work")


def make_manifest_of_another_tool(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"name": "an extension", "files": {"thesis.txt": {}}}', encoding="utf-8")
    make_thesis(folder)


def make_damaged_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b'{"format": "torch-ext-bundle"')
    make_thesis(folder)


def make_bundle_with_notes(folder: Path) -> None:
    old_bundle(folder, **{"model.onnx": b"old"})
    make_thesis(folder)


def make_bundle_with_a_folder(folder: Path) -> None:
    old_bundle(folder, **{"model.onnx": b"old"})
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()
    make_thesis(folder / "model.onnx")


def make_folder_with_a_folder(folder: Path) -> None:
    (folder / "lost+found").mkdir()
    make_thesis(folder / "lost+found")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_thesis, r"the folder holds thesis\.txt and is not a bundle, and only bundles are replaced; .*yourself"),
        (make_manifest_of_another_tool, "holds manifest.json, thesis.txt and is not a bundle.* got None"),
        (make_damaged_manifest, "holds manifest.json, thesis.txt and is not a bundle.*expected JSON"),
        (make_folder_with_a_folder, r"holds lost\+found and is not a bundle"),
        (make_bundle_with_notes, r"besides a bundle the folder holds thesis\.txt, which would be lost; move that"),
        (make_bundle_with_a_folder, r"besides a bundle the folder holds model\.onnx, which would be lost"),
    ],
)
def test_force_replaces_bundles_only(
    make: Callable[[Path], None], message: str, tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    make(target)
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to("out")
    for path in (target, tmp_path / "link"):
        fails(capsys, [str(tiny_model()), "-o", str(path), "--force", *QUICK], message)
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_and_links(tmp_path: Path) -> None:
    """A link to a bundle stays and leads to the new one; files that a bundle links to are not its own."""
    elsewhere = tmp_path / "elsewhere.onnx"
    elsewhere.write_bytes(b"mine")
    old_bundle(tmp_path / "real", data=b"old", **{"model.onnx": b"old"})
    (tmp_path / "real" / "model.onnx").unlink()
    (tmp_path / "real" / "model.onnx").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to("real")
    with Staging(check_target(tmp_path / "link", True), True) as stage:
        fill(stage, "new")
        stage.commit("manifest.json")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == new_bundle("new")
    assert elsewhere.read_bytes() == b"mine"
    (tmp_path / "dangling").symlink_to("made")
    assert check_target(tmp_path / "dangling", False) == tmp_path / "made"


def test_the_root_and_an_empty_name(capsys: Capture) -> None:
    for force in (False, True):
        with pytest.raises(ExportError, match="refuses to replace a folder that holds"):
            check_target(Path("/"), force)
    assert main(["model", "-o", ""]) == 2
    assert "argument -o/--output: expected a folder, got an empty string" in capsys.readouterr().err


def test_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one is filled and stays the one that the shell stands in; another is refused."""
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    with Staging(check_target(Path("."), False), False) as stage:
        fill(stage, "new")
        stage.commit("manifest.json")
    assert contents(tmp_path) == new_bundle("new")
    assert tmp_path.stat().st_ino == inode
    with pytest.raises(ExportError, match="refuses to replace a folder that holds"):
        check_target(Path("."), True)


def test_neither_home_nor_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a user of its own; an export needs neither."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    def gone() -> Path:
        raise FileNotFoundError("gone")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setattr(Path, "cwd", gone)
    old_bundle(tmp_path / "out")
    assert check_target(tmp_path / "out", True) == tmp_path / "out"


def test_force_never_replaces_what_is_in_use(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_model(), tmp_path / "above" / "model")
    for folder in (model, model.parent, tmp_path):  # Not even where a manifest owns it all.
        old_bundle(folder)
    before = contents(tmp_path)
    fails(capsys, [str(model), "-o", str(model), "--force"], "refuses to replace a folder that holds")
    fails(capsys, [str(model), "-o", str(model.parent), "--force"], "refuses to replace a folder that holds")
    monkeypatch.chdir(tmp_path / "above")
    fails(capsys, [str(model), "-o", str(tmp_path), "--force"], "refuses to replace a folder that holds")
    monkeypatch.setenv("HOME", str(tmp_path / "above"))
    monkeypatch.chdir(ROOT)
    fails(capsys, [str(tiny_model()), "-o", str(tmp_path / "above"), "--force"], "refuses to replace a folder")
    assert contents(tmp_path) == before


def test_texts_that_are_missing(tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    arguments = [str(tiny_model()), "-o", str(tmp_path / "out")]
    fails(capsys, [*arguments, "--texts", str(tmp_path / "no.txt")], "--texts .*no.txt: no such file")
    (tmp_path / "no.txt").write_bytes(b"\n")
    fails(capsys, [*arguments, "--texts", str(tmp_path / "no.txt"), *QUICK], "no texts in")
    assert not (tmp_path / "out").exists()


# What is told while the export runs; nothing is left


def no_bundle(tmp_path: Path) -> bool:
    """Neither the target nor a hidden folder beside it."""
    return [path.name for path in tmp_path.iterdir() if path.name != "model"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "tokenizer.json").write_text("{", encoding="utf-8"),
            "the tokenizer cannot be loaded",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234567890"), "model.safetensors: .*"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors: .*"),
        (lambda folder: edit(folder, vocab_size=40), "the tokenizer has ids up to .*, the model a vocabulary of 40"),
        (lambda folder: edit(folder, hidden_size=32), "model.safetensors: "),
        (lambda folder: edit(folder, hidden_act="magic"), "model.safetensors: cannot be loaded: .*magic"),
        (lambda folder: poison(folder, "encoder.layer.0.output.dense.weight", 0), "got NaN or infinity in encoder.la"),
        (lambda folder: poison(folder, "embeddings.word_embeddings.weight", 7), "got NaN or infinity in embeddings.w"),
        (lambda folder: narrow(folder), r"expected encoder.layer.0.output.dense.weight \[64, 128\], .*got \[64, 125\]"),
        (lambda folder: sharded(folder), "index.json: no weights for encoder.layer.1.output.dense.bias"),
        (
            lambda folder: whole_numbers(folder),
            "expected encoder.layer.0.output.dense.weight of one of the dtypes F32, F16, BF16, F64, got I8",
        ),
        (lambda folder: unread(folder), "model/config.json: transformers cannot read it: .*id2label"),
        (
            lambda folder: edit(folder, num_hidden_layers=10**7),
            "weights of 10000000 layers.*, got [0-9]+ tensors",
        ),
        (lambda folder: edit(folder, num_attention_heads=0), "model.safetensors: cannot be loaded: .*modulo by zero"),
        (lambda folder: edit(folder, num_attention_heads=-4), "transformers cannot run the model as its config.json"),
        (
            lambda folder: edit(folder, layer_norm_eps="1e-12"),
            "transformers cannot run the model as its config.json .*eps",
        ),
        (
            lambda folder: edit(folder, layer_norm_eps=10**400),
            "transformers cannot run the model as its config.json has it: int too large",
        ),
        (
            lambda folder: edit(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            "expected weights in fp32, fp16 or bf16, got ones that are quantized .'bitsandbytes'.",
        ),
    ],
    ids=[
        "tokenizer",
        "weights",
        "cut",
        "vocabulary",
        "shapes",
        "activation",
        "nan",
        "nan of a rare token",
        "narrow",
        "not in its shard",
        "integers",
        "configuration",
        "ten million layers",
        "no heads",
        "fewer than no heads",
        "eps",
        "huge eps",
        "quantized",
    ],
)
def test_damaged_models(
    change: Callable[[Path], Any], message: str, tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    change(folder)
    fails(capsys, [str(folder), "-o", str(tmp_path / "out"), *QUICK], message)
    assert no_bundle(tmp_path)


def test_a_tokenizer_that_lacks_a_file(tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    """Transformers 4 fails at None in place of its name."""
    folder = shutil.copytree(tiny_model("roberta"), tmp_path / "model")
    for name in ("tokenizer.json", "merges.txt"):
        (folder / name).unlink()
    message = "the tokenizer cannot be loaded: a file of it is missing; copy the model again, or save one there"
    fails(capsys, [str(folder), "-o", str(tmp_path / "out"), *QUICK], message)
    assert no_bundle(tmp_path)


def test_a_tokenizer_without_words(tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    import json

    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    fails(capsys, [str(folder), "-o", str(tmp_path / "out"), *QUICK], "model: the tokenizer fails: WordPiece error: ")
    assert no_bundle(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def edit(folder: Path, **fields: Any) -> None:
    import json

    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def unread(folder: Path) -> None:
    """A configuration that transformers reads for the class of the tokenizer, and fails at."""
    edit(folder, id2label=["a", "b"])
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["tokenizer_class"]
    path.write_text(json.dumps(settings), encoding="utf-8")


def poison(folder: Path, name: str, row: int) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name][row, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def narrow(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (folder / "another.safetensors").write_bytes(b"junk")
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name][:, :-3].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def sharded(folder: Path) -> None:
    """An index that names a weight which its file lacks."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, folder / "model-1.safetensors", {"format": "pt"})


def whole_numbers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("longest", ["512", float("inf"), None, -1])
def test_limits_that_are_none(longest: Any, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """As from a folder, the model's positions are the limit then."""
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "model_max_length": longest}), encoding="utf-8")
    (folder / "sentence_bert_config.json").unlink(missing_ok=True)
    assert main([str(folder), "-o", str(tmp_path / "out"), *QUICK]) == 0
    assert (
        load_manifest(tmp_path / "out").max_tokens
        == json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    )


def test_tasks_that_the_weights_do_not_have(tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    model, out = str(tiny_model()), str(tmp_path / "out")
    fails(capsys, [model, "-o", out, "--task", "text-classification", *QUICK], "no weights for classifier.bias")
    fails(capsys, [model, "-o", out, "--task", "fill-mask", *QUICK], "no weights for cls.predictions")
    assert no_bundle(tmp_path)


def test_configuration_that_torch_ext_does_not_run(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    model = str(tiny_model("bert", position_embedding_type="relative_key"))
    arguments = [model, "-o", str(tmp_path / "out"), *QUICK[:-1]]
    message = "torch_ext-bf16: .*position_embedding_type.*leave it out with --variants torch-export-bf16,onnx-int8"
    fails(capsys, [*arguments, "torch_ext-bf16,onnx-fp32"], message)
    assert no_bundle(tmp_path)


@pytest.mark.parametrize(
    ("variant", "bound", "others", "measured"),
    [
        pytest.param("torch_ext-bf16", "min", "onnx-int8", r"min cosine 0\.99\d+ < 0.999999", marks=pytest.mark.long),
        ("torch_ext-int8", "min", "torch_ext-bf16", r"min cosine 0\.99\d+ < 0.999999"),
    ],
)
def test_bounds_that_are_missed(
    variant: str,
    bound: str,
    others: str,
    measured: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    options = [*QUICK[:-1], f"{variant},{others}", "--bound", f"{variant}.{bound}=0.999999"]
    how = " even with all layers in bf16" if variant == "torch_ext-int8" else ""
    target = tmp_path / "out"
    message = (
        f"{variant} misses its accuracy bound on 4 texts{how}: {measured}; leave it out with --variants {others}, or "
        f"change the bound with --bound {variant}.{bound}=VALUE"
    )
    fails(capsys, [str(tiny_model()), "-o", str(target), *options], message)
    assert no_bundle(tmp_path)
    # Without it, and with a bound that it keeps.
    assert main([str(tiny_model()), "-o", str(target), *options, "--variants", others]) == 0
    assert list(load_manifest(target).variants) == [others]


def test_bounds_of_another_task(tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    arguments = [str(tiny_model()), "-o", str(tmp_path / "out"), *QUICK]
    fails(capsys, [*arguments, "--bound", "onnx-fp32.logit_error=1"], r"\(feature-extraction\), one of mean, min")


def test_bounds_of_figures_that_are_not_measured(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regression has no probabilities: said before anything is computed, and the figures that it has are taken."""
    monkeypatch.setattr("deploy.export.pipeline.export", lambda *arguments: pytest.fail("it has begun"))
    regression = tiny_model("bert", "text-classification", num_labels=1, problem_type="regression")
    for name in ("max_prob_diff", "mean_prob_diff"):
        bound = f"onnx-fp32.{name}=0.1"
        message = rf"--bound onnx-fp32.{name}: .*\(text-classification\), one of mean, min, logit_error"
        fails(capsys, [str(regression), "-o", str(tmp_path / "out"), *QUICK, "--bound", bound], message)
    classifier = tiny_model("bert", "text-classification")
    for model, taken in ((regression, "logit_error"), (classifier, "max_prob_diff"), (classifier, "logit_error")):
        with pytest.raises(pytest.fail.Exception, match="it has begun"):
            main([str(model), "-o", str(tmp_path / "out"), *QUICK, "--bound", f"onnx-fp32.{taken}=0.1"])


# A disk that is full


def test_too_little_room_is_told_before(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Staging, "free_bytes", lambda self: 3_000_000)
    arguments = [str(tiny_model()), "-o", str(tmp_path / "out"), *QUICK]
    fails(capsys, arguments, r"about [\d.]+ MB are needed there, 3.0 MB are free; make room")
    assert no_bundle(tmp_path)


def test_too_little_memory_is_told_before(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.export.needs.available_memory_bytes", lambda: 1_000_000)
    monkeypatch.setattr("deploy.export.report.write_manifest", full_disk)
    arguments = [name for name in QUICK if name != "--quiet"]
    assert main([str(tiny_model()), "-o", str(tmp_path / "out"), *arguments]) == 2
    assert "note: about 1.08 GB of memory are needed, 1.0 MB are free\n" in capsys.readouterr().err


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["report.write_manifest", "report.file_entry", "pipeline.shutil.copyfile"])
def test_disk_that_fills_up(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    old = old_bundle(target, old=b"old bundle")
    monkeypatch.setattr(f"deploy.export.{name}", full_disk)
    fails(
        capsys, [str(tiny_model()), "-o", str(target), "--force", *QUICK], "the disk is full .*nothing was left there"
    )
    assert contents(tmp_path) == {f"out/{name}": data for name, data in old.items()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 1 MiB, or None where this process may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("variant", ["onnx-fp32", "torch_ext-fp32", "onnx-int8"])
def test_disk_that_is_really_full(
    variant: str,
    small_disk: Path | None,
    tiny_model: Callable[..., Path],
    tiny_bundle: Callable[..., Path],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every writer (Python, Rust, optimum) reports a full disk in its own way; without mounts one is simulated."""
    monkeypatch.setattr(Staging, "free_bytes", lambda self: 10**12)
    if small_disk is None:
        target = tmp_path / "out"
        monkeypatch.setattr("deploy.export.pipeline.Staging.commit", full_disk)
    else:
        target = small_disk / "out"
        sizes = {path.name: path.stat().st_size for path in tiny_bundle().iterdir()}
        # Half of the file fits; what int8 is made from fits too.
        left = sizes[VARIANTS[variant].file] // 2 + 2 * sizes["tokenizer.json"]
        left += sizes["model.onnx"] if variant == "onnx-int8" else 0
        (small_disk / "filler").write_bytes(bytes((1 << 20) - left))
    arguments = [str(tiny_model("bert")), "-o", str(target), *QUICK[:-1], variant]
    fails(capsys, arguments, "the disk is full .*nothing was left there")
    assert [path.name for path in target.parent.iterdir() if path.name != "filler" and path != small_disk] in (
        [],
        ["small"],
    )


def test_reports_of_a_full_disk() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert is_disk_full(OSError(errno.EDQUOT, "x"))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    wrapped = ValueError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "x")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "x"))
    assert not is_disk_full(ValueError("os error 280"))
    assert first_line(ValueError("\n\n  first \nsecond")) == "first"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 1000))) == 300


# Signals


def test_interrupt_in_the_middle(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    old = old_bundle(target, old=b"old bundle")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("deploy.export.report.write_manifest", lambda _: signal.raise_signal(signal.SIGINT))
    message = "stopped by SIGINT; nothing was written to"
    fails(capsys, [str(tiny_model()), "-o", str(target), "--force", *QUICK], message, 128 + signal.SIGINT)
    assert contents(tmp_path) == {f"out/{name}": data for name, data in old.items()}
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# Imports once what takes seconds, and runs an export to every target in a process of its own.
LAUNCHER = """
import os, sys
from transformers import AutoModel, AutoTokenizer
from deploy.export.cli import main
model, texts, *targets = sys.argv[1:]
options = ["--force", "--variants", "torch_ext-fp32", "--texts", texts, "--speed-seconds", "600"]
processes = []
for target in targets:
    process = os.fork()
    if process == 0:
        code = main([model, "-o", target, *options])
        sys.stderr.flush()
        os._exit(code)
    processes.append(process)
print(*processes, flush=True)
print(*(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes))
"""


@contextlib.contextmanager
def exports(model: Path, texts: Path, *targets: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Starts an export to each target; a launcher, and the process of each once it has a model to write."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *map(str, (model, texts, *targets))],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert launcher.stdout is not None
    processes = [int(word) for word in launcher.stdout.readline().split()]
    try:
        deadline = time.monotonic() + 120
        while not all(any(target.parent.glob(".torch-ext-export-*/tokenizer.json")) for target in targets):
            assert launcher.poll() is None, launcher.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield launcher, processes
    finally:
        if launcher.poll() is None:  # It waits for them: their numbers are still theirs.
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        launcher.communicate(timeout=60)


@pytest.mark.long
def test_terminated_and_killed_exports(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    terminated, killed = tmp_path / "terminated" / "out", tmp_path / "killed" / "out"
    old = old_bundle(terminated, old=b"old bundle")
    assert old_bundle(killed, old=b"old bundle") == old
    (tmp_path / "texts.txt").write_text("Return the value.\n", encoding="utf-8")
    with exports(tiny_model(), tmp_path / "texts.txt", terminated, killed) as (launcher, processes):
        for process, number in zip(processes, (signal.SIGTERM, signal.SIGKILL), strict=True):
            os.kill(process, number)
        codes, printed = launcher.communicate(timeout=60)
    assert codes.split() == [str(128 + signal.SIGTERM), str(-signal.SIGKILL)]
    assert f"error: stopped by SIGTERM; nothing was written to {terminated}" in printed
    assert contents(terminated.parent) == {f"out/{name}": data for name, data in old.items()}
    assert len(list(terminated.parent.iterdir())) == 1

    # Nobody can clean up behind SIGKILL, but the target is as it was, and the next export cleans up.
    assert contents(killed) == old
    assert len(list(killed.parent.iterdir())) == 2
    assert main([str(tiny_model()), "-o", str(killed), "--force", *QUICK[:-1], "torch_ext-fp32"]) == 0
    assert [path.name for path in killed.parent.iterdir()] == ["out"]
    assert "old" not in contents(killed)
    load_manifest(killed, verify=True)


# All or nothing


def fill(stage: Staging, text: str) -> None:
    old_bundle(stage.path, data=text.encode())


def new_bundle(text: str) -> dict[str, bytes]:
    """What `fill` makes."""
    manifest = {"format": FORMAT, "format_version": 1, "files": {"data": {}}}
    return {"data": text.encode(), "manifest.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize("way", ["swap", "two renames", "inside"])
def test_replacing(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are swapped in one step where the system can, else renamed twice, and filled where they are mounted."""
    if way == "two renames":
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    if way == "inside":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    target = tmp_path / "out"
    target.mkdir()
    inode = target.stat().st_ino
    for number in range(3):
        with Staging(check_target(target, True), True) as stage:
            fill(stage, f"new {number}")
            assert (stage.path.parent == target) == (way == "inside")
            stage.commit("manifest.json")
        assert contents(target) == new_bundle(f"new {number}")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target.stat().st_ino == inode) == (way == "inside")


def raises_broken(call: Callable[[], None]) -> bool:
    """Whether a call raises what `failing` below does."""
    try:
        call()
    except OSError as error:
        return error.errno == errno.EIO
    return False


@pytest.mark.parametrize("way", ["swap", "two renames", "inside"])
@pytest.mark.parametrize("broken", [1, 2, 3, 4, 5])
def test_failures_while_replacing(way: str, broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rename fails, the old folder is back as it was."""
    target = tmp_path / "out"
    old = old_bundle(target, older=b"old")
    if way == "two renames":
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    if way == "inside":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    rename, calls = os.rename, []

    def failing(first: Any, second: Any) -> None:
        calls.append(second)
        if len(calls) == broken:
            raise OSError(errno.EIO, "broken")
        rename(first, second)

    with Staging(check_target(target, True), True) as stage:
        fill(stage, "new")
        monkeypatch.setattr(os, "rename", failing)
        failed = raises_broken(lambda: stage.commit("manifest.json"))
    expected = {"swap": 1, "two renames": 3, "inside": 4}[way]  # Renames of a commit that succeeds.
    assert failed == (broken <= expected)
    assert contents(tmp_path / "out") == (old if failed else new_bundle("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Killed(BaseException):
    """Stands for SIGKILL: whatever would be cleaned up fails with it, too."""


@pytest.mark.parametrize(
    ("way", "moved"),
    # The first of three renames is one that would do if the target were empty. Five files: three old, two new.
    [*(("two renames", moved) for moved in (1, 2, 3)), *(("inside", moved) for moved in range(6))],
)
def test_killed_while_replacing(way: str, moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next export finds the old bundle, or the new one where the last move was done, and nothing is left over."""
    target = tmp_path / "out"
    old = old_bundle(target, data=b"old", older=b"old")
    neighbour = old_bundle(tmp_path / "out-2")  # Its hidden folders begin with the same letters.
    rename, calls = os.rename, []

    def dying(first: Any, second: Any) -> None:
        calls.append(second)
        if len(calls) > moved:
            raise Killed
        rename(first, second)

    with monkeypatch.context() as patch:
        if way == "two renames":
            patch.setattr(staging, "_exchange", lambda first, second: False)
        else:
            patch.setattr(os.path, "ismount", lambda path: Path(path) == target)
        dead = Staging(check_target(target, True), True)
        with dead:
            fill(dead, "new")
            with patch.context() as killing:
                killing.setattr(os, "rename", dying)
                try:
                    dead.commit("manifest.json")
                except Killed:
                    killing.setattr(shutil, "rmtree", lambda *_, **__: None)
                    dead.__exit__()
                    dead.path = tmp_path / "nothing"
        complete = moved == {"two renames": 3, "inside": 5}[way]
        with pytest.raises(ExportError, match="a bundle is there already"):
            check_target(target, False)
        assert {name: data for name, data in contents(target).items() if not name.startswith(".")} == (
            new_bundle("new") if complete else old
        )
        with Staging(check_target(target, True), True) as stage:
            fill(stage, "newer")
            stage.commit("manifest.json")
    assert contents(target) == new_bundle("newer")
    assert contents(tmp_path / "out-2") == neighbour
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2"]


@pytest.mark.parametrize("way", ["swap", "inside"])
def test_what_appears_in_a_bundle_during_an_export_is_kept(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    old = old_bundle(target, older=b"old")
    if way == "inside":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    with Staging(check_target(target, True), True) as stage:
        fill(stage, "new")
        (target / "theirs").write_bytes(b"theirs")
        with pytest.raises(ExportError, match="besides a bundle the folder holds theirs, which would be lost"):
            stage.commit("manifest.json")
    assert contents(tmp_path) == {f"out/{name}": data for name, data in {**old, "theirs": b"theirs"}.items()}


def test_nothing_is_made_without_commit(tmp_path: Path) -> None:
    target = check_target(tmp_path / "a" / "b" / "out", False)
    with Staging(target, False) as stage:
        fill(stage, "half")
    assert list(tmp_path.iterdir()) == []
    with Staging(target, False) as stage:
        fill(stage, "whole")
        assert not target.exists()
        stage.commit("manifest.json")
    assert contents(target) == new_bundle("whole")


@pytest.mark.parametrize("mounted", [False, True])
def test_what_appears_during_an_export_is_not_overwritten(
    mounted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    with Staging(target, False) as stage:
        fill(stage, "new")
        (target / "theirs").write_bytes(b"theirs")
        with pytest.raises(ExportError, match="something else was written there"):
            stage.commit("manifest.json")
    assert contents(tmp_path) == {"out/theirs": b"theirs"}


def test_exports_at_the_same_time_leave_each_other_alone(tmp_path: Path) -> None:
    target = check_target(tmp_path / "out", False)
    with Staging(target, False) as first:
        fill(first, "first")
        with Staging(target, False) as second:
            fill(second, "second")
            second.commit("manifest.json")
        with pytest.raises(ExportError, match="something else was written there"):
            first.commit("manifest.json")
    assert contents(tmp_path / "out") == new_bundle("second")


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Staging(check_target(tmp_path / "link", False), False) as stage:
        fill(stage, "new")
        stage.commit("manifest.json")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "data").read_bytes() == b"new"


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_a_table_that_nobody_reads(
    error: OSError, tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is there: no message may say that it is not."""

    def no_reader(manifest: object) -> None:
        raise error

    monkeypatch.setattr("deploy.export.report.print_table", no_reader)
    arguments = [str(tiny_model()), "-o", str(tmp_path / "out"), *(word for word in QUICK if word != "--quiet")]
    with pytest.raises(type(error)):
        main(arguments)
    assert "nothing was left" not in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.json").exists()


# What is missing on this machine


@pytest.mark.parametrize(
    ("module", "variant", "message"),
    [
        ("torch", "torch_ext-fp32", r"export needs more packages .*torch_ext-\*\.whl\)\[export\]"),
        ("transformers", "torch_ext-fp32", r"export needs more packages .*torch_ext-\*\.whl\)\[export\]"),
        ("optimum.exporters.onnx", "onnx-fp32", r"ONNX variants need more .*torch_ext-\*\.whl\)\[export-onnx\]"),
        ("torch_ext", "torch_ext-fp32", "or leave it out with --variants onnx-int8,onnx-fp32"),
        ("torch_ext.ops", "torch_ext-fp32", "or leave it out with --variants onnx-int8,onnx-fp32"),
    ],
)
def test_packages_that_are_missing(
    module: str,
    variant: str,
    message: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    fails(capsys, [str(tiny_model()), "-o", str(tmp_path / "out"), *QUICK[:-1], variant], message)
    assert no_bundle(tmp_path)


def test_bugs_are_not_dressed_up(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("deploy.export.pipeline.make_manifest", bug)
    arguments = [str(tiny_model()), "-o", str(tmp_path / "out"), *QUICK]
    fails(capsys, arguments, "unexpected ZeroDivisionError: division by zero; run again with --debug", 1)
    assert main([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert no_bundle(tmp_path)
