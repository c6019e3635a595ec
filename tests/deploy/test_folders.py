"""Model folders as users have them: saved by other versions, with prompts, cut on the left, with shards."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from deploy.bundle import Manifest, Prompts, load_manifest
from deploy.export.cli import main
from deploy.export.pipeline import STAGES, step_count
from deploy.export.reference import older_config, older_tokenizer_config
from deploy.folder.describe import describe_folder
from deploy.folder.errors import FolderError
from deploy.server.errors import ApiError
from deploy.server.service.tokens import TextTokenizer

QUICK = ["--max-texts", "12", "--speed-seconds", "0", "--quiet", "--variants", "torch_ext-fp32"]
TEXTS = ["a list of the values", "it returns the name of the file, or none if there is no such name", "x"]
PROMPT = "find the value: "

ModelMaker = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file, which may be missing."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**value, **fields}), encoding="utf-8")


def export(folder: Path, target: Path) -> Manifest:
    before = contents(folder)
    assert main([str(folder), "-o", str(target), *QUICK]) == 0
    assert contents(folder) == before, "the export changed the model's folder"
    manifest = load_manifest(target)
    assert {path.name for path in target.iterdir()} == {*manifest.files, "manifest.json"}
    return manifest


def test_prompt_before_texts_that_are_cut_on_the_left(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    change(folder / "1_Pooling" / "config.json", pooling_mode="mean")
    change(folder / "sentence_roberta_config.json", max_seq_length=14)
    change(folder / "tokenizer_config.json", truncation_side="left")
    prompts = {"query": PROMPT, "document": ""}
    change(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="query")
    manifest = export(folder, tmp_path / "out")
    assert (manifest.max_tokens, manifest.truncation_side) == (14, "left")
    assert manifest.prompts == Prompts(prompts, "query")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def expected(prompt: str) -> list[list[int]]:
        texts = [prompt + text for text in TEXTS]
        return [list(row) for row in tokenizer(texts, truncation=True, max_length=14)["input_ids"]]

    served = TextTokenizer.from_manifest(manifest)
    found = [row.tolist() for row in served.encode(TEXTS, truncate=True)]
    assert found == expected(PROMPT)
    assert sorted(map(len, found))[-1] == 14
    assert [row.tolist() for row in served.encode(TEXTS, truncate=True, prompt="")] == expected("")
    assert served.encode([TEXTS[2]], truncate=True)[0].tolist() != expected("")[2]
    # Who sends ids has made them of all that the model shall read.
    assert served.check_ids(0, expected("")[2]).tolist() == expected("")[2]
    with pytest.raises(ApiError, match="input 8: expected at most 14 tokens"):
        served.encode(TEXTS, truncate=False, first=7)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_texts_are_cut_as_transformers_cuts_them(tiny_model: ModelMaker, model_type: str, side: str) -> None:
    folder = tiny_model(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, truncation_side=side)
    for limit in (3, 4, 9, 40):
        served = TextTokenizer(folder / "tokenizer.json", limit, side)
        expected = tokenizer(TEXTS, truncation=True, max_length=limit)["input_ids"]
        assert [row.tolist() for row in served.encode(TEXTS, truncate=True)] == [list(row) for row in expected]


def save_as_transformers_5(folder: Path) -> None:
    """Makes a folder of transformers 4 one that transformers 5 could have saved."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[Q]", "[D]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("special_tokens_map.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    names = ("cls_token", "mask_token", "pad_token", "sep_token", "unk_token")
    settings = {name: f"[{name.removesuffix('_token').upper()}]" for name in names}
    settings |= {"backend": "tokenizers", "model_max_length": 66, "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "extra_special_tokens": ["[Q]", "[D]"]}), encoding="utf-8"
    )


def test_folder_of_transformers_5(tiny_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(tiny_model("bert", "fill-mask", vocab_size=600), tmp_path / "model")
    save_as_transformers_5(folder)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask of the process was set"))
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "file").write_bytes(b"")
    manifest = export(folder, tmp_path / "out")
    served = TextTokenizer.from_manifest(manifest)
    ids = served.encode(["[Q] the value [MASK]"], truncate=True)[0]
    assert [served.token(index) for index in ids.tolist()] == ["[CLS]", "[Q]", "the", "value", "[MASK]", "[SEP]"]
    assert manifest.special_tokens["mask"] is not None
    # Everybody may read it whom the umask lets.
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "probe").stat().st_mode
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "probe" / "file").stat().st_mode}


def test_settings_of_transformers_5_in_the_words_of_4() -> None:
    old = {"tokenizer_class": "BertTokenizer", "extra_special_tokens": {"image_token": "<i>"}, "pad_token": "[PAD]"}
    assert older_tokenizer_config(old) == old
    new = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["[Q]", "[D]"]}
    assert older_tokenizer_config(new) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["[Q]", "[D]"],
        "model_input_names": ["input_ids", "attention_mask"],
    }
    both = older_tokenizer_config({"extra_special_tokens": ["[Q]", "[D]"], "additional_special_tokens": ["[D]"]})
    assert both == {"additional_special_tokens": ["[D]", "[Q]"]}

    assert older_config({"model_type": "bert"}) == {"model_type": "bert"}
    one = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert older_config(one) == {"rope_theta": 500.0}
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}
    assert older_config(scaled) == {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    by_kind = {
        "full_attention": {"rope_type": "default", "rope_theta": 8000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    assert older_config({"rope_parameters": by_kind}) == {"global_rope_theta": 8000.0, "local_rope_theta": 100.0}


def test_added_tokens_that_the_model_has_no_embedding_for(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Texts that hold one fail in transformers; without the tokens they are what they were before."""
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    before = tokenizer(["zzz", "a list"])["input_ids"]
    tokenizer.add_tokens(["zzz"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[Q]"]})
    tokenizer.save_pretrained(folder)
    for manifest in (export(folder, tmp_path / "out"), describe_folder(str(folder), None)):
        served = TextTokenizer.from_manifest(manifest)
        assert [row.tolist() for row in served.encode(["zzz", "a list"], truncate=True)] == before
    tokenizer.add_special_tokens({"mask_token": "[OTHER MASK]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(FolderError, match="do not belong together"):
        describe_folder(str(folder), None)
    assert main([str(folder), "-o", str(tmp_path / "none"), *QUICK]) == 2


def test_scores_of_a_classifier_with_one_label(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("bert", "text-classification", num_labels=1), tmp_path / "model")
    assert export(folder, tmp_path / "plain").activation == "sigmoid"
    named = {"activation_fn": "torch.nn.modules.activation.Tanh"}
    change(folder / "config.json", sentence_transformers=named)
    assert main([str(folder), "-o", str(tmp_path / "tanh"), *QUICK]) == 2
    assert not (tmp_path / "tanh").exists()


def test_stages_of_an_export() -> None:
    names = [stage.name for stage in STAGES]
    assert names == ["load", "reference", "write_torch_ext", "write_program", "write_onnx", "verify", "describe"]
    assert step_count(["torch_ext-fp32"]) == 5
    assert step_count(["onnx-fp32", "onnx-int8"]) == 6
    assert step_count(["torch_ext-bf16", "torch_ext-int8", "onnx-int8", "onnx-fp32", "torch_ext-fp32"]) == 12


MODULE = "sentence_bert_config.json"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tokenizer_args", {"model_max_length": 9, "truncation_side": "left", "do_lower_case": False}),
        ("processor_kwargs", {"do_lower_case": False, "use_fast": True, "revision": "main"}),
    ],
)
def test_settings_of_the_tokenizer_in_files_of_sentence_transformers(
    name: str, settings: dict[str, Any], tiny_model: ModelMaker, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    change(folder / MODULE, **{"max_seq_length": 30, name: settings})
    manifest = export(folder, tmp_path / "out")
    longest = settings.get("model_max_length", 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **settings)
    texts = ["The Value of the LIST", *TEXTS]
    expected = [list(row) for row in tokenizer(texts, truncation=True, max_length=longest)["input_ids"]]
    for each in (manifest, describe_folder(str(folder), None)):
        assert (each.max_tokens, each.truncation_side) == (longest, settings.get("truncation_side", "right"))
        served = TextTokenizer.from_manifest(each)
        assert [row.tolist() for row in served.encode(texts, truncate=True)] == expected


def test_length_of_a_call_of_the_tokenizer(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    calls = {"text": {"max_length": 8, "truncation": True}, "common": {"padding": True}, "image": {"do_resize": True}}
    change(folder / MODULE, max_seq_length=30, processing_kwargs=calls)
    assert describe_folder(str(folder), None).max_tokens == 8


def test_what_changes_nothing_in_files_of_sentence_transformers(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(
        folder / MODULE,
        model_args={"torch_dtype": "bfloat16", "add_pooling_layer": False},
        config_args={"hidden_act": config["hidden_act"], "trust_remote_code": True},
        transformer_task="feature-extraction",
        modality_config={"text": {"method": "forward", "method_output_name": ["last_hidden_state"]}},
        module_output_name="token_embeddings",
    )
    given, plain = describe_folder(str(folder), None), describe_folder(str(tiny_model()), None)
    assert (given.tokenizer_json, given.max_tokens) == (plain.tokenizer_json, plain.max_tokens)


HIDDEN = {"text": {"method": "forward", "method_output_name": ["hidden_states", 1]}}
POOLED = {"text": {"method": "forward", "method_output_name": "pooler_output"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config_args": {"hidden_act": "relu"}}, "config_args: hidden_act='relu' goes over config.json"),
        ({"config_kwargs": {"is_causal": False}}, "config_args: is_causal=False goes over config.json"),
        ({"config_args": [1]}, "config_args: expected an object, got"),
        ({"tokenizer_args": {"subfolder": "other"}}, "tokenizer_args: subfolder is not supported"),
        ({"processing_kwargs": {"text": {"add_special_tokens": False}}}, "add_special_tokens=False is not supported"),
        ({"processing_kwargs": {"common": {"truncation": False}}}, "truncation=False is not supported"),
        (
            {"modality_config": HIDDEN},
            "expected texts to give token_embeddings of last_hidden_state, got .*hidden_states",
        ),
        (
            {"modality_config": POOLED, "module_output_name": "sentence_embedding"},
            "got 'sentence_embedding' of 'pooler",
        ),
        (
            {"modality_config": {}, "transformer_task": "retrieval"},
            "transformer_task: expected one of .*, got 'retrieval'",
        ),
    ],
)
def test_files_of_sentence_transformers_that_ask_for_other_answers(
    settings: dict[str, Any], message: str, tiny_model: ModelMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    change(folder / MODULE, **settings)
    with pytest.raises(FolderError, match=message) as caught:
        describe_folder(str(folder), None)
    assert "\n" not in str(caught.value)
    assert main([str(folder), "-o", str(tmp_path / "out"), *QUICK]) == 2
    assert str(caught.value) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_side_that_the_file_of_the_tokenizer_cuts_on(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    truncation = {"direction": "Left", "max_length": 11, "strategy": "LongestFirst", "stride": 0}
    change(folder / "tokenizer.json", truncation=truncation)
    for settings, side in (({}, "left"), ({"truncation_side": "right"}, "right")):
        change(folder / "tokenizer_config.json", **settings)
        assert describe_folder(str(folder), None).truncation_side == side
        assert export(folder, tmp_path / side).truncation_side == side
