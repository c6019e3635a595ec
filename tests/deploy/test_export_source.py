"""What a model folder says about itself: task, pooling, limits. Needs no library of models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.bundle import Pooling
from deploy.export import source as sources
from deploy.export.errors import ExportError
from deploy.export.source import MODEL_TYPES, find_model, read_source

CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "pad_token_id": 0,
}
MODULES = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
NORMALIZE = "sentence_transformers.models.Normalize"


def write(folder: Path, **files: Any) -> Path:
    """Writes files given as `config`, `modules`, `pooling`, `settings`, ..., and empty weights and tokenizer."""
    names = {
        "config": "config.json",
        "modules": "modules.json",
        "pooling": "1_Pooling/config.json",
        "settings": "sentence_bert_config.json",
        "prompts": "config_sentence_transformers.json",
    }
    for name, value in {"config": CONFIG, **files}.items():
        path = folder / names[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(b"")
    return folder


def modules(*types: str) -> list[dict[str, Any]]:
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    return [
        {"idx": index, "name": str(index), "path": paths[kind.rpartition(".")[2]], "type": kind}
        for index, kind in enumerate(types)
    ]


def read(folder: Path, **options: Any) -> sources.Source:
    return read_source(folder, "name", None, **options)


@pytest.mark.parametrize(
    ("pooling", "normalize", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, True, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, False, "cls"),
        ({"pooling_mode_max_tokens": True}, True, "max"),
        ({"pooling_mode": "cls"}, False, "cls"),
        ({"pooling_mode": ["max"], "embedding_dimension": 8}, True, "max"),
        ({"word_embedding_dimension": 8}, False, "mean"),
    ],
)
def test_pooling_is_read(tmp_path: Path, pooling: dict[str, Any], normalize: bool, mode: str) -> None:
    types = [*MODULES, NORMALIZE] if normalize else MODULES
    folder = write(tmp_path, modules=modules(*types), pooling=pooling)
    source = read(folder)
    assert source.task == "feature-extraction"
    assert source.pooling == Pooling(mode, normalize, "1_Pooling/config.json")


def test_pooling_without_modules_file(tmp_path: Path) -> None:
    folder = write(tmp_path, pooling={"pooling_mode": "cls"})
    assert read(folder).pooling == Pooling("cls", False, "1_Pooling/config.json")
    (folder / "2_Normalize").mkdir()
    assert read(folder).pooling == Pooling("cls", True, "1_Pooling/config.json")


def test_pooling_of_models_without_the_files_is_stated(tmp_path: Path) -> None:
    source = read(write(tmp_path))
    assert source.pooling == Pooling("mean", False, "default")
    assert "mean pooling without normalization" in source.notes[0]
    source = read(tmp_path, pooling="cls", normalize=True)
    assert source.pooling == Pooling("cls", True, "--pooling and --normalize")
    assert not source.notes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pooling": {"pooling_mode_lasttoken": True}}, "pooling lasttoken is not supported"),
        ({"pooling": {"pooling_mode": ["mean", "max"]}}, r"pooling mean \+ max is not supported"),
        ({"pooling": {}, "modules": modules(*MODULES, "sentence_transformers.models.Dense")}, "module Dense changes"),
        ({"modules": modules(*MODULES)}, "1_Pooling/config.json: missing, though modules.json names it"),
    ],
)
def test_what_would_give_other_embeddings_is_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    folder = write(tmp_path, **files)
    with pytest.raises(ExportError, match=message):
        read(folder)
    with pytest.raises(ExportError, match="pass --pooling"):
        read(folder, normalize=True)
    pooling = read(folder, pooling="mean").pooling
    assert pooling is not None
    assert (pooling.mode, pooling.source) == ("mean", "--pooling")


def test_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    listed = modules(*MODULES, NORMALIZE)
    listed[0]["path"] = "0_Transformer"
    write(tmp_path, modules=listed, pooling={"pooling_mode_mean_tokens": True})
    write(tmp_path / "0_Transformer", settings={"max_seq_length": 77, "do_lower_case": True})
    (tmp_path / "config.json").unlink()
    source = read(tmp_path)
    assert source.folder == tmp_path / "0_Transformer"
    assert (source.max_tokens, source.lowercase) == (77, True)


@pytest.mark.parametrize(
    ("config", "settings", "option", "expected"),
    [
        ({}, {"max_seq_length": 256}, None, (256, 512)),
        ({}, {"max_seq_length": 256}, 128, (128, 512)),
        ({}, {"max_seq_length": 256}, 512, (512, 512)),
        ({}, {"max_seq_length": 4096}, None, (512, 512)),
        ({}, {"max_seq_length": None}, None, (None, 512)),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {}, None, (None, 512)),
    ],
)
def test_longest_input(
    tmp_path: Path,
    config: dict[str, Any],
    settings: dict[str, Any],
    option: int | None,
    expected: tuple[int | None, int],
) -> None:
    source = read(write(tmp_path, config={**CONFIG, **config}, settings=settings), max_tokens=option)
    assert (source.max_tokens, source.max_positions) == expected


@pytest.mark.parametrize("option", [0, 2, 513, -1])
def test_longest_input_that_does_not_fit(tmp_path: Path, option: int) -> None:
    with pytest.raises(ExportError, match=f"--max-tokens {option}: expected 3 to 512"):
        read(write(tmp_path), max_tokens=option)


@pytest.mark.parametrize(
    ("architectures", "task"),
    [
        (["BertModel"], "feature-extraction"),
        (["BertForSequenceClassification"], "text-classification"),
        (["BertForMaskedLM"], "fill-mask"),
    ],
)
def test_task_is_read(tmp_path: Path, architectures: list[str], task: str) -> None:
    source = read(write(tmp_path, config={**CONFIG, "architectures": architectures}))
    assert (source.task, source.task_source, source.architecture) == (task, architectures[0], architectures[0])
    assert (source.pooling is None) == (task != "feature-extraction")
    other = "fill-mask" if task != "fill-mask" else "text-classification"
    assert read(tmp_path, task=other).task_source == "--task"


def test_sentence_files_decide_before_the_architecture(tmp_path: Path) -> None:
    config = {**CONFIG, "architectures": ["BertForMaskedLM"]}
    folder = write(tmp_path, config=config, modules=modules(*MODULES), pooling={"pooling_mode": "mean"})
    assert read(folder).task == "feature-extraction"


@pytest.mark.parametrize("architectures", [None, [], ["BertForTokenClassification"], ["BertForPreTraining"]])
def test_task_that_cannot_be_told(tmp_path: Path, architectures: Any) -> None:
    folder = write(tmp_path, config={**CONFIG, "architectures": architectures})
    with pytest.raises(
        ExportError, match=r"cannot tell the task .* pass --task feature-extraction\|text-classification"
    ):
        read(folder)
    assert read(folder, task="fill-mask").task == "fill-mask"


def test_options_of_another_task(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="--pooling and --normalize are for feature-extraction; the task is fill-mask"
    ):
        read(write(tmp_path), task="fill-mask", pooling="mean")


def test_labels(tmp_path: Path) -> None:
    config: dict[str, Any] = {**CONFIG, "architectures": ["BertForSequenceClassification"]}
    source = read(write(tmp_path, config={**config, "id2label": {"1": "b", "0": "a"}}))
    assert (source.labels(), source.problem_type()) == (("a", "b"), "single_label_classification")
    assert read(write(tmp_path, config=config)).labels() == ("LABEL_0", "LABEL_1")
    assert read(write(tmp_path, config={**config, "id2label": {"0": "x"}})).problem_type() == "regression"
    told = {**config, "problem_type": "multi_label_classification"}
    assert read(write(tmp_path, config=told)).problem_type() == "multi_label_classification"
    source = read(write(tmp_path, config={**config, "id2label": {"0": "a", "2": "b"}}))
    with pytest.raises(ExportError, match="id2label: expected the ids 0 to n-1"):
        source.labels()


def test_prompts_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path, prompts={"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"})
    assert any('"query": "query: "' in note and "default: query" in note for note in read(folder).notes)
    assert not any("prompt" in note for note in read(write(tmp_path, prompts={"prompts": {"query": ""}})).notes)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"not a model folder \(no config.json\)"):
        read(tmp_path)
    for content, message in (
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ("\0", "expected JSON"),
    ):
        with pytest.raises(ExportError, match=message):
            read(write(tmp_path, config=content))
    with pytest.raises(
        ExportError, match=r"unknown architecture 'gpt2' \(GPT2Model\); supported model types: bert, roberta"
    ):
        read(write(tmp_path, config={**CONFIG, "model_type": "gpt2", "architectures": ["GPT2Model"]}))
    with pytest.raises(ExportError, match=r"unknown architecture None \(no architecture\)"):
        read(write(tmp_path, config={}))
    with pytest.raises(ExportError, match="max_position_embeddings: expected a whole number, got None"):
        read(write(tmp_path, config={**CONFIG, "max_position_embeddings": None}))


def test_folders_without_tokenizer_or_weights(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"no tokenizer \(none of tokenizer.json, vocab.txt"):
        read(folder)
    (folder / "vocab.txt").write_text("a", encoding="utf-8")
    assert read(folder).safe_format
    (folder / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"no weights \(none of model.safetensors"):
        read(folder)
    (folder / "pytorch_model.bin").write_bytes(b"123")
    source = read(folder)
    assert (source.safe_format, source.weights_bytes) == (False, 3)


def test_sharded_weights_are_summed(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    for part in (1, 2):
        (folder / f"model-0000{part}-of-00002.safetensors").write_bytes(b"12345")
    assert read(folder).weights_bytes == 10


def test_models_are_found_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "my-model")
    assert find_model(str(folder)) == (folder, "my-model", None)
    assert find_model(f"{folder}/") == (folder, "my-model", None)
    monkeypatch.chdir(tmp_path)
    assert find_model("my-model") == (folder, "my-model", None)
    with pytest.raises(ExportError, match="found a file; pass the folder"):
        find_model(str(folder / "config.json"))
    with pytest.raises(ExportError, match="--revision main: only for models on the hub"):
        find_model(str(folder), "main")
    for model in (str(tmp_path / "missing"), "./missing", "../missing", "a/b/c", "", "a b", "-x", "~/missing"):
        with pytest.raises(ExportError, match="no such folder, and not an id on the hub"):
            find_model(model)


def test_hub_that_is_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = f"""
import os, sys
os.environ.update({{"HF_HUB_OFFLINE": "1", "HF_HOME": {str(tmp_path)!r}}})
from deploy.export.cli import main
sys.exit(main(["someone/some-model", "-o", {str(tmp_path / "out")!r}]))
"""
    done = run(code)
    assert done.returncode == 2
    assert done.stderr.startswith("error: someone/some-model: no such folder, and the hub cannot be reached")
    assert "HF_HUB_OFFLINE=1 is set" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_hub_that_does_not_answer(tmp_path: Path) -> None:
    code = f"""
import os, sys
os.environ.pop("HF_HUB_OFFLINE", None)
# Nothing listens on the discard port of this machine.
os.environ.update({{"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*", "HF_HOME": {str(tmp_path)!r}}})
from deploy.export.cli import main
sys.exit(main(["someone/some-model", "-o", {str(tmp_path / "out")!r}]))
"""
    done = run(code)
    assert done.returncode == 2
    assert done.stderr.startswith("error: someone/some-model: no such folder, and the hub cannot be reached")
    assert "HF_HUB_OFFLINE is not set" in done.stderr
    assert not (tmp_path / "out").exists()


def test_models_of_the_hub_that_are_here_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--some-model"
    write(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    folder, name, revision = find_model("someone/some-model")
    assert (folder.name, name, revision) == (commit, "someone/some-model", commit)
    assert read_source(folder, name, revision).revision == commit


def run(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)


def test_supported_models_are_those_of_torch_ext() -> None:
    from torch_ext.encoder import ARCHITECTURES

    supported = {name for name, runs in MODEL_TYPES.items() if runs}
    # What cannot be exported at all, torch_ext may know nevertheless.
    assert supported == set(ARCHITECTURES) & MODEL_TYPES.keys()
