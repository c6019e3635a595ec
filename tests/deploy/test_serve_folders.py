"""Models that nobody exported, served from their folders: the answers of a bundle, and one line for errors."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deploy.bundle import OFFSET_POSITIONS, BundleError, Manifest, Prompts, Variant, load_manifest
from deploy.engines.open import load_engine
from deploy.export.cli import main
from deploy.folder.describe import describe_folder
from deploy.folder.errors import FolderError
from deploy.folder.tokenizer_kinds import KIND_OF_MODEL, KINDS
from deploy.server.service.tokens import TextTokenizer
from deploy.server.variants import Selection
from tests.deploy.conftest import SUFFIXES
from tests.deploy.test_folders import QUICK, change, save_as_transformers_5
from tests.deploy.test_server_bundles import fails, serving
from tests.ops.test_folders import NOMIC_CONFIGS, POINTER, nomic_weights
from torch_ext.encoder.huggingface.folder import read_folder
from torch_ext.encoder.huggingface.table import ARCHITECTURES, find_architecture

TEXTS = [
    "A list of the [MASK] values",
    "it Returns the <mask> of the file, or none if there is no such name",
    "Na\u00efve caf\u00e9 \u4f60\u597d",
    "x",
]

ModelMaker = Callable[..., Path]
WEIGHTS = "model.safetensors"


def transformers_ids(folder: Path, **options: Any) -> list[list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [list(row) for row in tokenizer(TEXTS, truncation=True, **options)["input_ids"]]


def served_ids(manifest: Manifest) -> list[list[int]]:
    return [list(map(int, row)) for row in TextTokenizer.from_manifest(manifest).encode(TEXTS, truncate=True)]


def answers(manifest: Manifest, variant: Variant, exact: bool = False) -> list[Any]:
    """What is answered to those of the texts that suit the task; with the model's own options, if `exact`."""
    engine, _ = load_engine(manifest, variant, 1)
    ids = TextTokenizer.from_manifest(manifest).encode(TEXTS, truncate=True)
    mask = manifest.special_tokens["mask"]
    if manifest.task == "fill-mask" and mask is not None:
        ids = [row for row in ids if mask.id in list(row)]
        assert ids
    options = [engine.task.exact if exact else engine.task.usual] * len(ids)
    return [item.tolist() if hasattr(item, "tolist") else item for item in engine.run(ids, options)]


NOT_COMPARED = {"root", "model", "created_with", "files", "variants", "verification", "machine", "tokenizer_json"}


@pytest.mark.parametrize("task", SUFFIXES)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_answers_are_those_of_a_bundle(model_type: str, task: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = tiny_model(model_type, task)
    variants = "torch_ext-bf16,torch_ext-fp32"
    options = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", variants]
    assert main([str(folder), "-o", str(tmp_path / "bundle"), *options]) == 0
    exported, described = load_manifest(tmp_path / "bundle"), describe_folder(str(folder), None)
    for field in fields(Manifest):
        if field.name not in NOT_COMPARED:
            assert getattr(described, field.name) == getattr(exported, field.name), field.name
    assert described.model.architecture == exported.model.architecture
    assert served_ids(described) == served_ids(exported)
    for name in variants.split(","):
        for exact in (False, True):
            found = answers(described, described.variant(name), exact)
            assert found == answers(exported, exported.variant(name), exact)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra", "deberta"])
def test_the_tokenizer_is_that_of_transformers(model_type: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Whatever `tokenizer_config.json` changes in what `tokenizer.json` says."""
    for number, settings in enumerate((
        {},
        {"do_lower_case": False},
        {"strip_accents": False, "tokenize_chinese_chars": False},
        {"add_prefix_space": True, "model_max_length": 9},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"added_tokens_decoder": {"500": {"content": "list of", "special": False, "normalized": False}}},
        None,
    )):  # fmt: skip
        folder = shutil.copytree(tiny_model(model_type, vocab_size=600), tmp_path / str(number))
        if settings is None:
            for name in ("tokenizer_config.json", "special_tokens_map.json"):
                (folder / name).unlink()
        else:
            change(folder / "tokenizer_config.json", **settings)
        manifest = describe_folder(str(folder), None)
        assert served_ids(manifest) == transformers_ids(folder, max_length=manifest.max_tokens), settings
        assert manifest.max_tokens == (9 if settings and "model_max_length" in settings else manifest.max_tokens)


def test_proteins(tmp_path: Path) -> None:
    """ESM has a slow tokenizer only, which splits texts at every token of its vocabulary."""
    letters = [*"LAGVSERTIDPKQNFYMHWCXBUZO.-"]
    vocabulary = ["<cls>", "<pad>", "<eos>", "<unk>", *letters, "<null_1>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    theirs = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"))
    theirs.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.EsmConfig(
        vocab_size=len(vocabulary),
        position_embedding_type="rotary",
        max_position_embeddings=40,
        pad_token_id=1,
        **sizes,
    )
    transformers.EsmModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    texts = ["MKTAYIAKQR", "M K <mask> T", "", "mk T\u4f60M<eos>K", "MKT" * 40, "<null_1>-. x"]
    for name in ("tokenizer_config.json", None):
        manifest = describe_folder(str(tmp_path), None)
        served = TextTokenizer.from_manifest(manifest)
        found = [row.tolist() for row in served.encode(texts, truncate=True)]
        assert found == theirs(texts, truncation=True, max_length=manifest.max_tokens)["input_ids"]
        if name is not None:
            (tmp_path / name).unlink()
            (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    assert len(answers(manifest, manifest.variant("torch_ext-fp32"))) == len(TEXTS)


def test_the_class_of_a_tokenizer_that_no_file_names() -> None:
    known = transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES
    for model_type in ARCHITECTURES:
        names = {name.removesuffix("Fast").removesuffix("Tokenizer") for name in known.get(model_type) or () if name}
        if names & KINDS.keys():
            assert {KIND_OF_MODEL[model_type]} == names, model_type


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra", "deberta"])
@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False, "add_prefix_space": True}])
def test_a_slow_tokenizer_is_that_of_transformers(
    model_type: str, settings: dict[str, bool], tiny_model: ModelMaker, tmp_path: Path
) -> None:
    """Without `tokenizer.json`: `vocab.txt`, or `vocab.json` and `merges.txt`, and whatever settings there are."""
    folder = shutil.copytree(tiny_model(model_type, vocab_size=600), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", **settings)
    manifest = describe_folder(str(folder), None)
    assert served_ids(manifest) == transformers_ids(folder, max_length=manifest.max_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    pair = TextTokenizer.from_manifest(manifest).backend.encode(TEXTS[0], TEXTS[1])
    expected = theirs(TEXTS[0], TEXTS[1])
    assert pair.ids == list(expected["input_ids"])
    if manifest.token_types:
        assert pair.type_ids == list(expected["token_type_ids"])
    if not settings:
        (folder / "tokenizer_config.json").unlink()
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        assert served_ids(describe_folder(str(folder), None)) == served_ids(manifest)


@pytest.mark.parametrize(
    ("stages", "kept"),
    [([("Tanh", 32, True)], None), ([("Identity", 96, False), ("Identity", 48, True)], None), ([], 16), ([], 999)],
)
def test_what_comes_after_the_pooling(
    stages: list[tuple[str, int, bool]], kept: int | None, tiny_model: ModelMaker, tmp_path: Path
) -> None:
    """Dense modules, and embeddings that are cut, beside the same in torch."""
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    manifest = describe_folder(str(folder), None)
    expected = torch.tensor(answers(manifest, manifest.variant("torch_ext-fp32"), exact=True))
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"}]
    change(folder / "1_Pooling" / "config.json", pooling_mode="mean")
    for place, (activation, outputs, bias) in enumerate(stages):
        name = f"{place + 2}_Dense"
        modules.append({"path": name, "type": "Dense"})
        torch.manual_seed(place)
        linear = torch.nn.Linear(expected.shape[1], outputs, bias)
        expected = getattr(torch.nn, activation)()(linear(expected)).detach()
        kind = f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}.{activation}"
        change(folder / name / "config.json", out_features=outputs, activation_function=kind)
        save_file({f"linear.{key}": value for key, value in linear.state_dict().items()}, folder / name / WEIGHTS)
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    change(folder / "config_sentence_transformers.json", truncate_dim=kept)
    manifest = describe_folder(str(folder), None)
    assert manifest.width == min(stages[-1][1] if stages else 64, kept or 64)
    found = answers(manifest, manifest.variant("torch_ext-fp32"), exact=True)
    torch.testing.assert_close(torch.tensor(found), expected[:, :kept], rtol=1e-4, atol=1e-5)


def test_weights_of_linear_stages_are_checked(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    place = tmp_path / "dense"
    place.mkdir()
    for weight, message in (
        (torch.zeros(8, 63), r"expected linear.weight \[outputs, 64\], got \[8, 63\]"),
        (torch.full((8, 64), torch.nan), "expected finite weights of Dense modules, got NaN or infinity in head.out"),
    ):
        save_file({"linear.weight": weight}, place / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            read_folder(folder, None, stages=[(place, "tanh")])
    save_file({"linear.weight": torch.zeros(8, 64)}, place / WEIGHTS)
    for name, size in (("out_features", 8), ("in_features", 64)):
        change(place / "config.json", out_features=8, in_features=64, bias=False)
        read_folder(folder, None, stages=[(place, "tanh")])
        change(place / "config.json", **{name: 10**14})
        with pytest.raises(ValueError, match=rf"expected {name}={size}, as {WEIGHTS} has it, got 100000000000000$"):
            read_folder(folder, None, stages=[(place, "tanh")])
    change(place / "config.json", in_features=64, bias=True)
    with pytest.raises(ValueError, match=rf"expected bias=False, as {WEIGHTS} has it, got True$"):
        read_folder(folder, None, stages=[(place, "tanh")])
    with pytest.raises(ValueError, match="expected 1 or 2 linear stages behind the pooling, got 3"):
        read_folder(folder, None, stages=[(place, "tanh")] * 3)


def test_files_of_sentence_transformers(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    change(folder / "1_Pooling" / "config.json", pooling_mode="cls")
    change(folder / "sentence_bert_config.json", max_seq_length=14, do_lower_case=True)
    change(folder / "tokenizer_config.json", truncation_side="left")
    change(folder / "config_sentence_transformers.json", prompts={"query": "find: "}, default_prompt_name="query")
    manifest = describe_folder(str(folder), None)
    assert (manifest.max_tokens, manifest.truncation_side) == (14, "left")
    assert manifest.prompts == Prompts({"query": "find: "}, "query")
    assert manifest.pooling is not None
    assert manifest.pooling.mode == "cls"
    tokenizer = TextTokenizer.from_manifest(manifest)
    expected = tokenizer.encode(["FIND: a VALUE"], truncate=True, prompt="")[0]
    assert list(tokenizer.encode(["a value"], truncate=True)[0]) == list(expected)


def test_folders_of_transformers_5(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("bert", "fill-mask", vocab_size=600), tmp_path / "model")
    save_as_transformers_5(folder)
    manifest = describe_folder(str(folder), None)
    served = TextTokenizer.from_manifest(manifest)
    ids = served.encode(["[Q] the value [MASK]"], truncate=True)[0]
    assert [served.token(int(index)) for index in ids] == ["[CLS]", "[Q]", "the", "value", "[MASK]", "[SEP]"]
    assert manifest.special_tokens["mask"] is not None
    answers(manifest, manifest.variant("torch_ext-bf16"))


def test_modernbert_is_served(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
        config = transformers.ModernBertConfig(vocab_size=700, max_position_embeddings=64, **sizes, **ids)
        transformers.ModernBertModel(config).save_pretrained(folder)
    manifest = describe_folder(str(folder), None)
    assert manifest.max_tokens == 64
    assert len(answers(manifest, manifest.variant("torch_ext-bf16"))[0]) == 48


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma3Text", "DebertaV2", "T5"])
def test_other_architectures_are_served(kind: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    more = {
        "Qwen3": {"num_key_value_heads": 2, "head_dim": 16},
        "Gemma3Text": {"num_key_value_heads": 1, "head_dim": 16, "use_bidirectional_attention": True},
        "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
        "T5": {},
    }[kind]
    if kind == "T5":
        config = transformers.T5Config(vocab_size=700, d_model=48, d_kv=12, num_heads=4, num_layers=2, d_ff=64)
        transformers.T5EncoderModel(config).save_pretrained(folder)
    else:
        config = getattr(transformers, f"{kind}Config")(vocab_size=700, max_position_embeddings=64, **sizes, **more)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    manifest = describe_folder(str(folder), "feature-extraction")
    assert manifest.max_tokens == (512 if kind == "T5" else 64)
    assert len(answers(manifest, manifest.variant("torch_ext-bf16"))[0]) == 48


def test_a_classifier_of_qwen3_reads_the_last_token_before_padding(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    pad = {"id": "[PAD]", "type_id": 0}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": pad}],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"] + [{"SpecialToken": pad}],
        "special_tokens": {"[PAD]": {"id": "[PAD]", "ids": [0], "tokens": ["[PAD]"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", model_max_length=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        more = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0}
        torch.manual_seed(0)
        config = transformers.Qwen3Config(vocab_size=700, num_labels=3, initializer_range=0.15, **sizes, **more)
        model = transformers.Qwen3ForSequenceClassification(config).eval()
        model.save_pretrained(folder)
    manifest = describe_folder(str(folder), None)
    found = answers(manifest, manifest.variant("torch_ext-fp32"), exact=True)
    with torch.inference_mode():
        rows = transformers_ids(folder)
        assert max(map(len, rows)) == 8
        assert all(row[-1] == 0 for row in rows)
        expected = torch.cat([model(torch.tensor([row])).logits for row in rows])
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_nomic_is_served_though_its_configuration_has_other_names(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    weights = nomic_weights(torch.Generator().manual_seed(1))
    weights["embeddings.word_embeddings.weight"] = torch.randn(700, 48)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**NOMIC_CONFIGS[1], "vocab_size": 700}), encoding="utf-8")
    manifest = describe_folder(str(folder), "feature-extraction")
    assert (manifest.max_tokens, manifest.hidden_size) == (64, 48)
    assert len(answers(manifest, manifest.variant("torch_ext-bf16"))[0]) == 48


@pytest.mark.parametrize(("padding_bytes", "expected"), [(0, "torch_ext-fp32"), (21 << 20, "torch_ext-bf16")])
def test_the_variant_is_not_measured(padding_bytes: int, expected: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    """A small model, whose bf16 nobody has compared with anything, is served in fp32."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "unused": torch.zeros(padding_bytes // 4)}, folder / "model.safetensors")
    manifest = describe_folder(str(folder), None)
    selection = Selection(manifest, "auto", 1, None)
    assert selection.names == [expected]
    assert str(selection.decide()) == "not measured"
    selection = Selection(manifest, "torch_ext-bf16", 1, None)
    assert str(selection.decide()) == "by --variant"


def test_a_folder_is_served_without_torch(tiny_model: ModelMaker) -> None:
    folder = tiny_model()
    blocked = ("torch", "transformers", "safetensors", "huggingface_hub", "optimum", "onnxruntime")
    with serving(folder, "--threads", 1, blocked=blocked) as server:
        info = server("GET", "/info").json
        assert (info["variant"], info["chosen_by"], info["task"]) == ("torch_ext-fp32", "default", "feature-extraction")
        assert info["candidates"] == [{"variant": "torch_ext-fp32", "texts_per_s": None, "mean": None, "min": None}]
        found = server("POST", "/v1/embeddings", {"input": TEXTS[2:], "model": folder.name}).json
    manifest = describe_folder(str(folder), None)
    assert info["max_input_length"] == manifest.max_tokens
    rows = answers(manifest, manifest.variant("torch_ext-fp32"), exact=True)[2:]
    for item, row in zip(found["data"], rows, strict=True):
        assert item["embedding"] == pytest.approx(row, rel=1e-6)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_sentencepiece(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()
    (folder / "spm.model").write_bytes(b"")


def without_separator(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8")
    (folder / "vocab.txt").write_text(vocabulary.replace("[SEP]", "[sep]"), encoding="utf-8")


def with_dense(folder: Path) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Dense": "Dense", "4_Dense": "Dense"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    change(folder / "1_Pooling" / "config.json", pooling_mode="mean")


def with_a_token_beyond_the_vocabulary(folder: Path) -> None:
    processor = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["post_processor"]
    processor["special_tokens"]["[CLS]"]["ids"] = [10**6]
    change(folder / "tokenizer.json", post_processor=processor)


def with_an_empty_vocabulary(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    change(folder / "tokenizer.json", model={**model, "vocab": {}})


WRONG: dict[str, tuple[Callable[[Path], object], str | None, str]] = {
    "no weights": (without("model.safetensors"), None, "no weights"),
    "a pickle": (pickled, None, "pytorch_model.bin: a pickle, which can run code, and is not opened"),
    "linear stages": (with_dense, None, r"3 linear stages behind the pooling \(Dense\) are not served from a folder"),
    "no fast tokenizer": (with_sentencepiece, None, "no tokenizer.json, only files of a slow tokenizer"),
    "slow tokenizer without a token": (
        without_separator,
        None,
        r"vocab.txt: expected the special token '\[SEP\]' in the vocabulary",
    ),
    "tokenizer is no JSON": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        None,
        "tokenizer.json: expected JSON",
    ),
    "tokenizer in Git LFS": (
        lambda folder: (folder / "tokenizer.json").write_bytes(POINTER),
        None,
        "tokenizer.json: a pointer of Git LFS, not the file itself; run git lfs pull",
    ),
    "other architecture": (
        lambda folder: change(folder / "config.json", model_type="gpt2"),
        None,
        "unknown architecture 'gpt2'.*: python -m deploy export it, .* torch or ONNX Runtime; .*: bert, (?!.*clip)",
    ),
    "no task": (
        lambda folder: change(folder / "config.json", architectures=["BertForNextSentencePrediction"]),
        None,
        "cannot tell the task from BertForNextSentencePrediction; pass --task",
    ),
    "small vocabulary": (lambda folder: change(folder / "config.json", vocab_size=9), None, "do not belong together"),
    "other side": (
        lambda folder: change(folder / "tokenizer_config.json", truncation_side="top"),
        None,
        "truncation_side: expected one of right, left, got 'top'",
    ),
    "labels without end": (
        lambda folder: change(folder / "config.json", num_labels=10**9),
        None,
        "num_labels: expected at most 1000000, got 1000000000",
    ),
    "a file that is too large": (
        lambda folder: os.truncate(folder / "config.json", 1 << 30),
        None,
        "config.json: expected JSON of at most 256 MiB",
    ),
    "an id around texts that has no embedding": (with_a_token_beyond_the_vocabulary, None, "has ids up to 1000000"),
    "no token for unknown words": (with_an_empty_vocabulary, None, r"no '\[UNK\]' in its vocabulary"),
    "size of the vocabulary in words": (
        lambda folder: change(folder / "config.json", vocab_size="many"),
        None,
        "vocab_size: expected a whole number, got 'many'",
    ),
    "architectures that are no array": (
        lambda folder: change(folder / "config.json", architectures="BertModel"),
        None,
        "architectures: expected an array of names, got 'BertModel'",
    ),
    "quantized by compressed-tensors, as of old": (
        lambda folder: change(folder / "config.json", compression_config={"quant_method": "compressed-tensors"}),
        None,
        r"got ones that are quantized \('compressed-tensors'\)",
    ),
    "an unknown kind of problem": (
        lambda folder: change(folder / "config.json", problem_type="ranking"),
        "text-classification",
        "problem_type: expected one of .*, got 'ranking'",
    ),
    "labels with gaps": (
        lambda folder: change(folder / "config.json", id2label={"0": "a", "2": "b"}),
        "text-classification",
        "id2label: expected the ids 0 to n-1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    edit, task, match = WRONG[name]
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    edit(folder)
    with pytest.raises(FolderError, match=match) as caught:
        describe_folder(str(folder), task)
    assert "\n" not in str(caught.value)


def test_errors_are_one_line(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    refusal = fails(folder, "--variant", "onnx-int8")
    assert "no variant 'onnx-int8' of a model that was not exported; choose one of torch_ext-" in refusal
    assert "or export it: python -m deploy export MODEL -o DIR" in refusal
    assert "neither a bundle (no manifest.json) nor a model's folder (no config.json)" in fails(tmp_path)
    assert "--task feature-extraction: only for a model that was not exported" in fails(
        tmp_path, "--task", "feature-extraction"
    )
    # Found while the engine is opened, beside the imports.
    assert "the file has no cls.predictions" in fails(folder, "--task", "fill-mask")
    config = (folder / "config.json").read_text(encoding="utf-8")
    for settings in ({"hidden_act": "mish"}, {"is_decoder": True}):
        change(folder / "config.json", **settings)
        message = fails(folder)
        assert "model.safetensors: unsupported " in message
        assert message.rstrip().endswith(
            "; python -m deploy export it, which writes variants for torch or ONNX Runtime"
        )
        (folder / "config.json").write_text(config, encoding="utf-8")
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    change(folder / "tokenizer.json", added_tokens=[{"id": "x"}])
    assert "tokenizer.json: not a usable tokenizer" in fails(folder)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-8])
    assert "model.safetensors is damaged" in fails(folder)


def test_a_model_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch, tiny_model: ModelMaker) -> None:
    """What the cache of huggingface_hub has is served; nothing else can be had here."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    folder = tiny_model()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: str(folder))
    assert describe_folder("owner/name", None).model.name == "owner/name"
    monkeypatch.undo()
    with pytest.raises(FolderError, match="owner/name: no such folder, and the hub cannot be reached"):
        describe_folder("owner/name", None)


def test_positions_begin_where_the_encoder_has_them() -> None:
    texts = set(ARCHITECTURES) - {"clip", "siglip", "siglip2"}  # a part of theirs is for texts
    counted = {name for name in texts if find_architecture(SimpleNamespace(model_type=name)).padding_index}
    # ESM's usual positions are rotary, which nothing counts; its tables of others begin behind the padding, too.
    assert counted == (OFFSET_POSITIONS & texts) - {"esm"}


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("cleans", [False, True])
def test_sequences_of_fillings_lose_spaces_as_in_transformers(
    model_type: str, cleans: bool, tiny_model: ModelMaker, tmp_path: Path
) -> None:
    """As transformers 5 has it, which leaves those of BPE alone."""
    folder = shutil.copytree(tiny_model(model_type, "fill-mask"), tmp_path / "model")
    change(folder / "tokenizer_config.json", clean_up_tokenization_spaces=cleans)
    assert main([str(folder), "-o", str(tmp_path / "out"), *QUICK]) == 0
    mask = "[MASK]" if model_type == "bert" else "<mask>"
    text = f"it isn't the {mask} , or 's ! value"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    clean = cleans and model_type == "bert"
    for served in (folder, tmp_path / "out"):
        with serving(served, "--threads", 1) as server:
            found = server("POST", "/", {"inputs": text, "parameters": {"top_k": 2}}).json
        for item in found:
            ids = [
                item["token"] if token == tokenizer.mask_token_id else token for token in tokenizer(text)["input_ids"]
            ]
            right = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=clean)
            assert item["sequence"] == right
            assert ("isn't" in right) == (clean or model_type == "roberta")


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize("labels", [2, 4])
def test_labels_are_as_many_as_logits(task: str, labels: int, tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("bert", task, num_labels=3), tmp_path / "model")
    change(folder / "config.json", id2label={str(number): f"B-{number}" for number in range(labels)})
    manifest = describe_folder(str(folder), None)
    with pytest.raises(
        BundleError, match=rf"config.json: expected a label for each logit of the .* \(3\), got {labels}$"
    ):
        load_engine(manifest, manifest.variant("torch_ext-fp32"), 1)


def test_added_tokens_with_a_long_number_are_left_out(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    change(folder / "tokenizer_config.json", added_tokens_decoder={"9" * 5000: {"content": "zz"}})
    assert describe_folder(str(folder), None).tokenizer_json == describe_folder(str(tiny_model()), None).tokenizer_json


def test_quantities_in_config_are_checked(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(FolderError, match="hidden_size: expected at least 1, got None"):
        describe_folder(str(folder), None)
