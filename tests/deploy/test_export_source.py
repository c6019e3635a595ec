"""What a model folder says about itself: task, pooling, limits. Needs no library of models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.bundle import Pooling, Prompts
from deploy.folder import source as sources
from deploy.folder.errors import FolderError
from deploy.folder.hub import find_model
from deploy.folder.source import read_source
from deploy.server.wanted import _is_model
from deploy.tasks import TASKS, TaskError
from tests.ops.test_folders import POINTER

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
    paths = {
        "Transformer": "",
        "Pooling": "1_Pooling",
        "Normalize": "2_Normalize",
        "Dense": "2_Dense",
        "Dropout": "2",
    } | {"LSTM": "3"}
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
        ({"pooling_mode_mean_sqrt_len_tokens": True}, False, "mean_sqrt_len_tokens"),
        ({"pooling_mode_weightedmean_tokens": True}, False, "weightedmean"),
        ({"pooling_mode_lasttoken": True}, True, "lasttoken"),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, True, "mean_sqrt_len_tokens"),
        ({"pooling_mode": "weightedmean"}, False, "weightedmean"),
        ({"pooling_mode": ["lasttoken"]}, False, "lasttoken"),
        ({"pooling_mode": ["max", "cls"]}, False, "max+cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, True, "cls+mean"),
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
        ({"pooling": {"pooling_mode_first_and_last": True}}, "pooling first_and_last is not supported"),
        ({"pooling": {"pooling_mode": 3}}, "pooling 3 is not supported"),
        ({"pooling": {"pooling_mode": ["mean", "min"]}}, r"pooling mean \+ min is not supported"),
        ({"pooling": {"pooling_mode": []}}, r"pooling  is not supported"),
        ({"pooling": {}, "modules": modules(*MODULES, "sentence_transformers.models.LSTM")}, "module LSTM changes"),
        ({"modules": modules(*MODULES)}, "1_Pooling/config.json: missing, though modules.json names it"),
        ({"pooling": {}, "prompts": {"model_type": "Whisper"}}, "a Whisper makes other embeddings"),
    ],
)
def test_what_would_give_other_embeddings_is_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    folder = write(tmp_path, **files)
    with pytest.raises(FolderError, match=message):
        read(folder)
    with pytest.raises(FolderError, match="python -m deploy export with --pooling"):
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
    with pytest.raises(FolderError, match=f"--max-tokens {option}: expected 3 to 512"):
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


@pytest.mark.parametrize("architectures", [None, []])
def test_a_model_that_names_no_architecture_makes_embeddings(tmp_path: Path, architectures: Any) -> None:
    source = read(write(tmp_path, config={**CONFIG, "architectures": architectures}))
    assert (source.task, source.task_source) == ("feature-extraction", "no architecture named")
    assert source.pooling == Pooling("mean", False, "default")


def test_embeddings_that_are_cut(tmp_path: Path) -> None:
    source = read(write(tmp_path, pooling={}, prompts={"truncate_dim": 64}))
    assert source.pooling == Pooling("mean", False, "1_Pooling/config.json", 64)
    for wrong in (0, True, "64"):
        with pytest.raises(FolderError, match="truncate_dim: expected at least 1, got"):
            read(write(tmp_path, pooling={}, prompts={"truncate_dim": wrong}))


@pytest.mark.parametrize("architectures", [["BertForMultipleChoice"], ["BertForPreTraining"]])
def test_task_that_cannot_be_told(tmp_path: Path, architectures: Any) -> None:
    folder = write(tmp_path, config={**CONFIG, "architectures": architectures})
    with pytest.raises(
        FolderError, match=r"cannot tell the task .* pass --task feature-extraction\|text-classification"
    ):
        read(folder)
    assert read(folder, task="fill-mask").task == "fill-mask"


def test_options_of_another_task(tmp_path: Path) -> None:
    with pytest.raises(
        FolderError, match="--pooling and --normalize are for feature-extraction; the task is fill-mask"
    ):
        read(write(tmp_path), task="fill-mask", pooling="mean")


def facts(source: sources.Source) -> dict[str, Any]:
    """What the task reads of a folder."""
    return TASKS[source.task].read(source)


def test_labels(tmp_path: Path) -> None:
    config: dict[str, Any] = {**CONFIG, "architectures": ["BertForSequenceClassification"]}
    found = facts(read(write(tmp_path, config={**config, "id2label": {"1": "b", "0": "a"}})))
    assert (found["labels"], found["problem_type"]) == (("a", "b"), "single_label_classification")
    assert facts(read(write(tmp_path, config=config)))["labels"] == ("LABEL_0", "LABEL_1")
    assert facts(read(write(tmp_path, config={**config, "id2label": {"0": "x"}})))["problem_type"] == "regression"
    told = {**config, "problem_type": "multi_label_classification"}
    assert facts(read(write(tmp_path, config=told)))["problem_type"] == "multi_label_classification"
    source = read(write(tmp_path, config={**config, "id2label": {"0": "a", "2": "b"}}))
    with pytest.raises(TaskError, match="id2label: expected the ids 0 to n-1"):
        facts(source)


def test_prompts_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path, prompts={"prompts": {"query": "query: ", "document": ""}})
    source = read(folder)
    assert any("put them before your texts: query: 'query: '" in note for note in source.notes)
    assert (source.prompts, source.prompt) == (Prompts({"query": "query: ", "document": ""}), "")
    source = read(write(tmp_path, prompts={"prompts": {"query": ""}}))
    assert source.prompts is None
    assert not any("prompt" in note for note in source.notes)


def test_default_prompt_goes_before_every_text(tmp_path: Path) -> None:
    settings = {"prompts": {"query": "query: ", "document": None}, "default_prompt_name": "query"}
    source = read(write(tmp_path, prompts=settings))
    assert (source.prompts, source.prompt) == (Prompts({"query": "query: ", "document": ""}, "query"), "query: ")
    assert any("goes before every text: 'query: ' (query)" in note for note in source.notes)
    # sentence-transformers knows these two names without a text.
    source = read(write(tmp_path, prompts={**settings, "default_prompt_name": "document"}))
    assert (source.prompt, source.prompts) == ("", Prompts({"query": "query: ", "document": ""}, "document"))
    with pytest.raises(FolderError, match=r"default_prompt_name: expected one of the prompts \(query\), got 'title'"):
        read(write(tmp_path, prompts={"prompts": {"query": "q"}, "default_prompt_name": "title"}))
    with pytest.raises(
        FolderError, match=r"default_prompt_name: expected one of the prompts \(query\), got \['query'\]"
    ):
        read(write(tmp_path, prompts={"prompts": {"query": "q"}, "default_prompt_name": ["query"]}))
    for wrong in (["query: "], {"query": 3}):
        with pytest.raises(FolderError, match="prompts: expected an object of strings"):
            read(write(tmp_path, prompts={"prompts": wrong}))
    assert read(write(tmp_path, prompts=settings), task="fill-mask").prompts is None


def test_prompt_that_pooling_leaves_out(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "modules": modules(*MODULES),
        "pooling": {"pooling_mode": "mean", "include_prompt": False},
        "prompts": {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    }
    source = read(write(tmp_path, **files))
    assert source.pooling == Pooling("mean", False, "1_Pooling/config.json", include_prompt=False)
    assert source.prompt == "query: "


def test_chat_template_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"a chat template \(modality_config: message\), and there is none"):
        read(write(tmp_path, settings={"modality_config": {"message": {}}}))


@pytest.mark.parametrize("kind", ["StaticEmbedding", "Router", "BoW"])
def test_modules_that_are_no_model_of_transformers(tmp_path: Path, kind: str) -> None:
    write(tmp_path, modules=[{"path": "", "type": f"sentence_transformers.models.{kind}"}])
    (tmp_path / "config.json").unlink()
    with pytest.raises(FolderError, match=f"modules.json: module {kind} changes the embeddings and is not supported"):
        read(tmp_path)


def test_modules_that_are_code_of_the_model(tmp_path: Path) -> None:
    """They may compute anything, whatever they are called; a Transformer has its weights checked."""
    listed = modules("custom_st.Transformer", MODULES[1])
    assert read(write(tmp_path / "known", modules=listed, pooling={"pooling_mode": "cls"})).pooling is not None
    for kind in ("Pooling", "Normalize"):
        listed = modules(*MODULES, NORMALIZE)
        listed[1 if kind == "Pooling" else 2]["type"] = f"custom_st.{kind}"
        folder = write(tmp_path / kind, modules=listed, pooling={"pooling_mode": "cls"})
        with pytest.raises(FolderError, match=rf"module custom_st.{kind} is code of the model's own, which is not run"):
            read(folder)


def test_an_adapter_without_its_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FolderError, match=r"an adapter of peft, without its model: .*merge_and_unload"):
        read(tmp_path)
    # Whether transformers reads it depends on what is installed.
    (write(tmp_path / "model") / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FolderError, match="an adapter of peft, beside its model: "):
        read(tmp_path / "model")


def test_modules_without_a_pooling(tmp_path: Path) -> None:
    folder = write(tmp_path, modules=modules(MODULES[0]))
    with pytest.raises(FolderError, match=r"no Pooling module, without which there is no embedding; .*--pooling"):
        read(folder)
    assert read(folder, pooling="cls").pooling == Pooling("cls", False, "--pooling")


def test_dropout_is_nothing(tmp_path: Path) -> None:
    listed = modules(*MODULES, "sentence_transformers.models.Dropout", NORMALIZE)
    source = read(write(tmp_path, modules=listed, pooling={"pooling_mode": "cls"}))
    assert source.pooling == Pooling("cls", True, "1_Pooling/config.json")


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_older_names_of_the_settings(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, modules=modules(*MODULES), pooling={"pooling_mode": "mean"})
    settings = {"max_seq_length": 77, "do_lower_case": True}
    (folder / f"sentence_{name}_config.json").write_text(json.dumps(settings), encoding="utf-8")
    source = read(folder)
    assert (source.max_tokens, source.lowercase) == (77, True)


@pytest.mark.parametrize("path", ["..", "../other", "/etc", "1_Pooling/../../other", "link", "a\0b"])
@pytest.mark.parametrize("module", [0, 1])
def test_modules_that_lead_out_of_the_folder(tmp_path: Path, path: str, module: int) -> None:
    other = write(tmp_path / "other", pooling={"pooling_mode": "cls"})
    (other / "config.json").write_text(json.dumps({**CONFIG, "pooling_mode": "cls"}), encoding="utf-8")
    listed = modules(*MODULES)
    listed[module]["path"] = path
    folder = write(tmp_path / "model", modules=listed, pooling={"pooling_mode": "mean"})
    (folder / "link").symlink_to(other)
    with pytest.raises(FolderError, match=r"modules.json: path .* leads out of the model's folder; refused"):
        read(folder)


def test_shards_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for name in ("../other.safetensors", "/etc/passwd", "a/b.safetensors", 3):
        index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}), encoding="utf-8")
        with pytest.raises(FolderError, match="weight_map: expected names of files beside it"):
            read(folder)


SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    ("labels", "config", "prompts", "expected"),
    [
        (1, {}, {}, "sigmoid"),
        (2, {}, {}, "softmax"),
        (2, {"problem_type": "multi_label_classification"}, {}, "sigmoid"),
        (1, {"problem_type": "regression"}, {}, "none"),
        (2, {"problem_type": "regression"}, {}, "none"),
        (1, {"sentence_transformers": {"activation_fn": IDENTITY}}, {}, "none"),
        (1, {"sentence_transformers": {"activation_fn": SIGMOID}, "problem_type": "regression"}, {}, "sigmoid"),
        (1, {"sbert_ce_default_activation_function": IDENTITY}, {}, "none"),
        (1, {"sbert_ce_default_activation_function": None}, {}, "sigmoid"),
        (3, {"sbert_ce_default_activation_function": "torch.nn.Softmax"}, {}, "softmax"),
        (1, {"sentence_transformers": {"activation_fn": "somebody.code.Sigmoid"}}, {}, "sigmoid"),
        (3, {}, {"model_type": "CrossEncoder"}, "none"),
        (1, {"problem_type": "regression"}, {"model_type": "CrossEncoder"}, "sigmoid"),
        (1, {}, {"model_type": "CrossEncoder", "activation_fn": IDENTITY}, "none"),
    ],
)
def test_activation(
    tmp_path: Path, labels: int, config: dict[str, Any], prompts: dict[str, Any], expected: str
) -> None:
    names = {str(index): f"L{index}" for index in range(labels)}
    whole = {**CONFIG, "architectures": ["BertForSequenceClassification"], "id2label": names, **config}
    assert facts(read(write(tmp_path, config=whole, prompts=prompts)))["activation"] == expected


def test_activation_that_is_not_known(tmp_path: Path) -> None:
    config = {
        **CONFIG,
        "architectures": ["BertForSequenceClassification"],
        "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"},
    }
    source = read(write(tmp_path, config=config))
    with pytest.raises(TaskError, match=r"activation.Tanh over its logits, which is not supported \(only Sigmoid"):
        facts(source)


def test_cross_encoders_that_have_modules(tmp_path: Path) -> None:
    """As sentence-transformers 6 saves them."""
    config = {**CONFIG, "architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}}
    settings = {"model_type": "CrossEncoder", "activation_fn": SIGMOID, "prompts": {}, "default_prompt_name": None}
    source = read(write(tmp_path, config=config, modules=modules(MODULES[0]), prompts=settings))
    assert (source.task, source.pooling, facts(source)["activation"]) == ("text-classification", None, "sigmoid")
    for types in (MODULES, [MODULES[0], "sentence_transformers.base.modules.dense.Dense"]):
        folder = write(tmp_path, config=config, modules=modules(*types), prompts=settings, pooling={})
        with pytest.raises(FolderError, match="expected a cross-encoder of a Transformer module alone"):
            read(folder)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"not a model folder \(no config.json\)"):
        read(tmp_path)
    for content, message in (
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ("\0", "expected JSON"),
    ):
        with pytest.raises(FolderError, match=message):
            read(write(tmp_path, config=content))
    with pytest.raises(FolderError, match="clip compares texts with images, which is not served"):
        read(write(tmp_path, config={**CONFIG, "model_type": "clip", "architectures": ["CLIPModel"]}))
    with pytest.raises(FolderError, match=r"unknown architecture None \(no architecture\)"):
        read(write(tmp_path, config={}))
    with pytest.raises(FolderError, match="max_position_embeddings: expected a whole number, got None"):
        read(write(tmp_path, config={**CONFIG, "max_position_embeddings": None}))


def test_folders_without_tokenizer_or_weights(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FolderError, match=r"no tokenizer \(none of tokenizer.json, vocab.txt"):
        read(folder)
    (folder / "vocab.txt").write_text("a", encoding="utf-8")
    assert read(folder).safe_format
    (folder / "model.safetensors").unlink()
    with pytest.raises(FolderError, match=r"no weights \(none of model.safetensors"):
        read(folder)
    (folder / "pytorch_model.bin").write_bytes(b"123")
    source = read(folder)
    assert (source.safe_format, source.weights_bytes) == (False, 3)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "shard.safetensors", "config.json"])
def test_files_that_git_left_as_pointers(tmp_path: Path, name: str) -> None:
    """`git clone` without Git LFS leaves three lines of text in place of large files."""
    folder = write(tmp_path)
    (folder / "model.safetensors").unlink()
    index = json.dumps({"weight_map": {"a": "shard.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    (folder / "shard.safetensors").write_bytes(b"")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors.index.json").unlink()
    (folder / name).write_bytes(POINTER)
    with pytest.raises(FolderError, match=f"{name}: a pointer of Git LFS, not the file itself; run git lfs pull"):
        read(folder)


def test_sharded_weights_are_summed(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    shards = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}), encoding="utf-8")
    (folder / shards[0]).write_bytes(b"12345")
    with pytest.raises(FolderError, match=f"{shards[1]}: missing, though model.safetensors.index.json names it"):
        read(folder)
    (folder / shards[1]).write_bytes(b"12345")
    assert read(folder).weights_bytes == 10
    for content in ("{}", '{"weight_map": []}'):
        index.write_text(content, encoding="utf-8")
        with pytest.raises(FolderError, match="expected weight_map, an object that names files"):
            read(folder)


def test_models_are_found_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "my-model")
    assert find_model(str(folder)) == (folder, "my-model", None)
    assert find_model(f"{folder}/") == (folder, "my-model", None)
    monkeypatch.chdir(tmp_path)
    assert find_model("my-model") == (folder, "my-model", None)
    (tmp_path / "current").symlink_to(folder)
    assert find_model("current/") == (folder, "current", None)
    monkeypatch.chdir(folder)
    assert find_model(".") == (folder, "my-model", None)
    with pytest.raises(FolderError, match="found a file; pass the folder"):
        find_model(str(folder / "config.json"))
    with pytest.raises(FolderError, match="--revision main: only for models on the hub"):
        find_model(str(folder), "main")
    for model in (str(tmp_path / "missing"), "./missing", "../missing", "a/b/c", "", "a b", "-x", "~/missing"):
        with pytest.raises(FolderError, match="no such folder, and not an id on the hub"):
            find_model(model)


def test_what_to_install_where_the_hub_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FolderError, match=r"owner/model: no such folder, .* the extra: make wheel, .*\[serve\]"):
        find_model("owner/model")


def test_models_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    """A snapshot is called as the hub calls the model, and the folder above stands for its main branch."""
    cached = tmp_path / "models--owner--some-model"
    first, second = (write(cached / "snapshots" / name) for name in ("1" * 40, "2" * 40))
    assert find_model(str(first)) == (first, "owner/some-model", first.name)
    assert _is_model(cached)
    with pytest.raises(FolderError, match="the hub's cache of a model with 2 snapshots; pass the folder of one, below"):
        find_model(str(cached))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(second.name, encoding="utf-8")
    assert find_model(str(cached)) == (second, "owner/some-model", second.name)


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


@pytest.mark.parametrize(("model_type", "runs"), [("bert", True), ("modernbert", True), ("funnel", False)])
def test_any_architecture_is_read(model_type: str, runs: bool, tmp_path: Path) -> None:
    source = read(write(tmp_path, config={**CONFIG, "model_type": model_type}))
    assert source.supported_by_torch_ext is runs
