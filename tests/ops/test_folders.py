"""Folders of Hugging Face, read without torch: the bits of the transformers path, and one line for what is wrong."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torch_ext
from tests.ops import test_transformers
from tests.ops.test_transformers import HEADS, batch, make
from torch_ext import Encoder, Head, runtime

pytestmark = [
    pytest.mark.needs_transformers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

KINDS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}


@pytest.fixture(autouse=True)
def _transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_transformers, "transformers", pytest.importorskip("transformers"))


def saved(folder: Path, kind: str, name: str, **more: Any) -> nn.Module:
    """Saves a random model and returns it as it is loaded from there."""
    labels = {"ForSequenceClassification": {"num_labels": 3}, "ForTokenClassification": {"num_labels": 5}}
    make(kind, name, **labels.get(kind, {})).save_pretrained(folder, **more)
    prefix = test_transformers.CONFIGS[name][0]
    loaded: nn.Module = getattr(test_transformers.transformers, prefix + kind).from_pretrained(folder)
    return loaded.eval()


def logits(states: runtime.States, task: str | None) -> Any:
    return states.text_logits() if task == "text-classification" else states.token_logits()


def equal(actual: Any, expected: Tensor) -> bool:
    """Whether bits are equal; nearly so where PyTorch's kernels compute what torch has."""
    ours, theirs = torch.from_dlpack(actual), expected.float()
    if torch_ext.isa_report()["isa"] == runtime.isa_report()["isa"]:
        return torch.equal(ours, theirs)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0.1, atol=0.1)


def same_as(model: nn.Module, folder: Path, generator: torch.Generator, head: str | None = "auto") -> runtime.Encoder:
    """The folder's encoder, which computes what the model's does, in both dtypes, with its head."""
    ids, bounds = batch(generator)
    for dtype in ("fp32", "bf16"):
        expected, found = Encoder.from_transformers(model, dtype), runtime.Encoder.from_pretrained(folder, dtype, head)
        assert found.spec == vars(expected.spec)
        hidden, states = expected(ids, bounds), found.encode(ids, bounds)
        assert equal(states.hidden(), hidden)
        again = Encoder.from_pretrained(folder, dtype)
        assert torch.equal(again(ids, bounds), hidden)
        if found.task is not None:
            expected_head = Head.from_transformers(model, dtype)
            assert found.head_spec == vars(expected_head.spec)
            texts = expected_head.spec.task == "text-classification"
            wanted = expected_head.classify(hidden, bounds) if texts else expected_head(hidden)
            assert equal(logits(states, found.task), wanted)
            head_again = Head.from_pretrained(folder, dtype, "auto" if head is None else head)
            assert torch.equal(head_again.classify(hidden, bounds) if texts else head_again(hidden), wanted)
    return found


@pytest.mark.parametrize("name", HEADS)
def test_every_architecture_and_head_gives_the_same_bits(name: str, generator: torch.Generator, tmp_path: Path) -> None:
    for kind, task in KINDS.items():
        encoder = same_as(saved(tmp_path / kind, kind, name), tmp_path / kind, generator)
        assert encoder.task is not None
        assert runtime.Encoder.from_pretrained(tmp_path / kind, head=task).task == encoder.task
    model = saved(tmp_path / "Model", "Model", name)
    assert same_as(model, tmp_path / "Model", generator).task is None
    with pytest.raises(ValueError, match=r"model.safetensors: the file has no .*: is it a plain .* for fill-mask\?"):
        runtime.Encoder.from_pretrained(tmp_path / "Model", head="fill-mask")
    with pytest.raises(ValueError, match="no supported head"):
        Head.from_pretrained(tmp_path / "Model")


def test_a_classifier_of_qwen3(generator: torch.Generator, tmp_path: Path) -> None:
    model = saved(tmp_path, "ForSequenceClassification", "qwen3")
    encoder = same_as(model, tmp_path, generator)
    assert (encoder.task, encoder.outputs) == ("text-classification", 3)
    with pytest.raises(ValueError, match="unknown head 'fill-mask'; known: text-classification, token-classification"):
        runtime.Encoder.from_pretrained(tmp_path, head="fill-mask")


def test_heads_are_chosen(generator: torch.Generator, tmp_path: Path) -> None:
    saved(tmp_path, "ForMaskedLM", "bert")
    assert runtime.Encoder.from_pretrained(tmp_path, head=None).task is None
    assert runtime.Encoder.from_pretrained(tmp_path, head="fill-mask").task == "fill-mask"
    with pytest.raises(ValueError, match="unknown head 'regression'; known: text-classification, token-class"):
        runtime.Encoder.from_pretrained(tmp_path, head="regression")
    with pytest.raises(ValueError, match=r"expected dtype bf16 or fp32 for a folder.*int8 takes a file"):
        runtime.Encoder.from_pretrained(tmp_path, "int8")  # type: ignore[arg-type]
    int8 = Encoder.from_pretrained(tmp_path, "int8", "layers.0")
    assert "layers.0.ffn.up" in int8.kept_bf16


@pytest.mark.parametrize("name", ["megatron-bert", "xlm-roberta-xl", "qwen3", "gemma3", "gemma3, causal"])
def test_norms_first_give_the_same_bits(name: str, generator: torch.Generator, tmp_path: Path) -> None:
    same_as(saved(tmp_path, "Model", name), tmp_path, generator)


@pytest.mark.parametrize(
    ("name", "field"),
    [("bert", "num_hidden_layers"), ("distilbert", "n_layers"), ("megatron-bert", "num_hidden_layers")],
)
def test_layers_that_the_configuration_does_not_count_are_left_out(
    name: str, field: str, generator: torch.Generator, tmp_path: Path
) -> None:
    """As transformers does: somebody uses the first layers of a model."""
    model = saved(tmp_path, "Model", name)
    configured(**{field: getattr(model.config, field) - 1})(tmp_path)
    fewer = type(model).from_pretrained(tmp_path).eval()
    ids, bounds = batch(generator)
    with pytest.warns(UserWarning, match=r"layers: \d in config.json, \d in the weights; the last ones are left out"):
        found = Encoder.from_pretrained(tmp_path)
    assert torch.equal(found(ids, bounds), Encoder.from_transformers(fewer)(ids, bounds))
    with pytest.warns(UserWarning, match="the last ones are left out"):
        assert runtime.Encoder.from_pretrained(tmp_path).spec["num_layers"] == found.spec.num_layers
    assert not torch.equal(found(ids, bounds), Encoder.from_transformers(model)(ids, bounds))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForSequenceClassification"])
def test_shards_of_other_dtypes(kind: str, dtype: torch.dtype, generator: torch.Generator, tmp_path: Path) -> None:
    kinds = () if kind == "ForMaskedLM" else ("deberta",)
    for name in ("bert", "modernbert, biases, one theta", *kinds):
        folder = tmp_path / name
        make(kind, name).to(dtype).save_pretrained(folder, max_shard_size="40KB")
        assert len([*folder.glob("*.safetensors")]) > 1
        prefix = test_transformers.CONFIGS[name][0]
        model = getattr(test_transformers.transformers, prefix + kind).from_pretrained(folder).eval()
        same_as(model, folder, generator)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = change(weights) or weights
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")


def test_legacy_names_and_what_is_beside_them(generator: torch.Generator, tmp_path: Path) -> None:
    model = saved(tmp_path, "ForMaskedLM", "bert")

    def legacy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in weights.items()
        }
        renamed["bert.embeddings.position_ids"] = torch.arange(40)[None]
        renamed["bert.pooler.dense.weight"] = torch.zeros(48, 48)
        renamed["cls.seq_relationship.weight"] = torch.zeros(2, 48)
        return renamed

    edit(tmp_path, legacy)
    same_as(model, tmp_path, generator)
    # A decoder of its own; transformers 4 overlooks it where the configuration says that there is none, 5 does not. The
    # head has one bias, under two names; 5 takes zeros where the decoder's is missing.
    own = {"weight": torch.ones(100, 48)}
    if test_transformers.is_5():
        own["bias"] = load_file(tmp_path / "model.safetensors")["cls.predictions.bias"]
    edit(tmp_path, lambda weights: {**weights, **{f"cls.predictions.decoder.{name}": own[name] for name in own}})
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")
    same_as(type(model).from_pretrained(tmp_path).eval(), tmp_path, generator)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_a_prefix_or_none(name: str, generator: torch.Generator, tmp_path: Path) -> None:
    model = saved(tmp_path, "ForMaskedLM", name)
    base = f"{model.base_model_prefix}."
    bare = getattr(test_transformers.transformers, test_transformers.CONFIGS[name][0] + "Model")
    same_as(bare.from_pretrained(tmp_path).eval(), tmp_path, generator, None)
    edit(tmp_path, lambda weights: {key.removeprefix(base): tensor for key, tensor in weights.items()})
    same_as(model, tmp_path, generator)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "electra", "mpnet", "modernbert", "albert", "rembert"]
)
def test_a_configuration_with_little_in_it(name: str, generator: torch.Generator, tmp_path: Path) -> None:
    """The values that transformers adds are added here, too."""
    make("Model", name, **({"local_attention": 128} if name == "modernbert" else {})).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    sizes = ("hidden_size", "dim", "n_layers", "n_heads", "hidden_dim", "num_hidden_layers", "num_attention_heads")
    kept = ("model_type", *sizes, "intermediate_size", "vocab_size", "max_position_embeddings", "type_vocab_size")
    more = (
        "embedding_size",
        "input_embedding_size",
        "output_embedding_size",
        *(["pad_token_id"] if name == "modernbert" else []),
    )
    few = {key: config[key] for key in (*kept, *more) if key in config}
    (tmp_path / "config.json").write_text(json.dumps(few), encoding="utf-8")
    bare = getattr(test_transformers.transformers, test_transformers.CONFIGS[name][0] + "Model")
    same_as(bare.from_pretrained(tmp_path).eval(), tmp_path, generator)


def plain_gte(w: dict[str, Tensor], ids: Tensor, config: dict[str, Any]) -> Tensor:
    """GTE's own code, which is on the hub, in fp64 and in short, for one text."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    size, factor = width // heads, (config["rope_scaling"] or {"factor": 1.0})["factor"]

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], config["layer_norm_eps"])

    frequencies = (config["rope_theta"] * factor) ** (-torch.arange(0, size, 2).double() / size) / factor ** (2 / size)
    angles = (torch.arange(len(ids))[:, None] * frequencies).repeat(1, 2)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1)
        return x * angles.cos() + turned * angles.sin()

    x = w["embeddings.word_embeddings.weight"][ids]
    if config["type_vocab_size"]:
        x = x + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        q, k, v = linear(x, f"{layer}.attention.qkv_proj").view(len(ids), 3, heads, size).permute(1, 2, 0, 3)
        scores = rotate(q) @ rotate(k).transpose(1, 2) * size**-0.5
        attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = norm(x + linear(attended, f"{layer}.attention.o_proj"), f"{layer}.attn_ln")
        up, gate = linear(x, f"{layer}.mlp.up_gate_proj").chunk(2, -1)
        narrow = linear(up * nn.functional.gelu(gate), f"{layer}.mlp.down_proj")
        x = norm(x + narrow, f"{layer}.mlp_ln")
    return x


@pytest.mark.parametrize("types", [0, 2])
@pytest.mark.parametrize("scaling", [None, {"type": "ntk", "factor": 2.0}], ids=str)
def test_gte(types: int, scaling: dict[str, Any] | None, generator: torch.Generator, tmp_path: Path) -> None:
    config = {"model_type": "new", "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    config |= {"intermediate_size": 80, "vocab_size": 100, "max_position_embeddings": 64, "rope_theta": 500.0}
    config |= {"rope_scaling": scaling, "layer_norm_eps": 1e-12, "type_vocab_size": types}
    config |= {"position_embedding_type": "rope", "layer_norm_type": "layer_norm", "logn_attention_scale": False}
    shapes = {"embeddings.word_embeddings.weight": (100, 48), "embeddings.LayerNorm": (48,)}
    if types:
        shapes["embeddings.token_type_embeddings.weight"] = (types, 48)
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        shapes |= {f"{layer}.attention.qkv_proj": (144, 48), f"{layer}.attention.o_proj": (48, 48)}
        shapes |= {f"{layer}.mlp.up_gate_proj.weight": (160, 48), f"{layer}.mlp.down_proj": (48, 80)}
        shapes |= {f"{layer}.attn_ln": (48,), f"{layer}.mlp_ln": (48,)}
    weights = {}
    for name, shape in shapes.items():
        parts = {name: shape} if name.endswith(".weight") else {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        for part, sizes in parts.items():
            weights[part] = torch.randn(sizes, generator=generator) * (0.2 if len(sizes) == 2 else 0.5)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({f"new.{name}": tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    ids, bounds = batch(generator)
    wide = {name: tensor.double() for name, tensor in weights.items()}
    texts = itertools.pairwise(bounds.tolist())
    expected = torch.cat([plain_gte(wide, ids[begin:end], config) for begin, end in texts])
    exact = Encoder.from_pretrained(tmp_path, "fp32")
    torch.testing.assert_close(exact(ids, bounds).double(), expected, rtol=1e-4, atol=1e-4)
    for dtype, bound in (("bf16", 0.9995), ("int8", 0.99)):
        hidden = Encoder.from_pretrained(tmp_path, dtype)(ids, bounds)
        assert float(torch.cosine_similarity(hidden.double(), expected, -1).min()) > bound
    states = runtime.Encoder.from_pretrained(tmp_path).encode(ids, bounds)
    assert equal(states.hidden(), Encoder.from_pretrained(tmp_path)(ids, bounds))


def test_eurobert(generator: torch.Generator, tmp_path: Path) -> None:
    """Llama that sees all tokens; transformers has it from version 5 on."""
    transformers = test_transformers.transformers
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=100, intermediate_size=80, rope_theta=1000.0, pad_token_id=0, **sizes)
    model = transformers.LlamaModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    configured(model_type="eurobert", architectures=["EuroBertModel"])(tmp_path)
    ids, bounds = batch(generator)
    hidden = []
    for begin, end in itertools.pairwise(bounds.tolist()):
        mask = torch.zeros(1, 1, end - begin, end - begin)
        with torch.inference_mode():
            hidden.append(model(ids[None, begin:end], attention_mask=mask).last_hidden_state[0])
    expected = torch.cat(hidden)
    exact = Encoder.from_pretrained(tmp_path, "fp32")
    torch.testing.assert_close(exact(ids, bounds), expected, rtol=1e-4, atol=1e-4)
    rounded = Encoder.from_pretrained(tmp_path)(ids, bounds)
    assert float(torch.cosine_similarity(rounded.double(), expected.double(), -1).min()) > 0.9995
    states = runtime.Encoder.from_pretrained(tmp_path).encode(ids, bounds)
    assert equal(states.hidden(), rounded)


def test_neither_torch_nor_numpy_is_imported(tmp_path: Path) -> None:
    saved(tmp_path, "ForSequenceClassification", "roberta")
    program = (
        "import sys; from torch_ext.runtime import Encoder; encoder = Encoder.from_pretrained(sys.argv[1]); "
        "logits = encoder.encode([5, 6, 7], [0, 3]).text_logits().tolist(); "
        "print(encoder.task, len(logits[0]), *{'torch', 'numpy', 'transformers', 'safetensors'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert (done.stdout, done.stderr) == ("text-classification 3\n", "")


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_transformers, "transformers", pytest.importorskip("transformers"))
        make("ForMaskedLM", "bert").save_pretrained(folder)
    return folder


def sharded(folder: Path) -> Path:
    """Puts the weights into two files with an index, which it returns."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return index


def place(index: Path, file: Any) -> None:
    """Has an index name a file for one of the weights."""
    value = json.loads(index.read_text(encoding="utf-8"))
    value["weight_map"]["bert.embeddings.LayerNorm.bias"] = file
    index.write_text(json.dumps(value), encoding="utf-8")


def put(name: str, value: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], object]:
    """Sets the last element of a weight, whose dtype changes."""

    def change(weights: dict[str, Tensor]) -> None:
        weights[name] = weights[name].to(dtype)
        weights[name].view(-1)[-1] = value

    return lambda folder: edit(folder, change)


def configured(**fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")

    return change


def header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    value = json.loads(data[8 : 8 + size])
    change(value)
    text = json.dumps(value).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def cut(folder: Path, size: int) -> None:
    os.truncate(folder / "model.safetensors", size)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"a" + b"\nsize 90868376\n"
NORM = "bert.embeddings.LayerNorm.weight"
DAMAGED = "model.safetensors is damaged, or is not a safetensors file: "
WRONG: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no folder": (shutil.rmtree, FileNotFoundError, "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "not a model folder"),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ValueError,
        "config.json: expected J",
    ),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ValueError,
        "expected a JSON object",
    ),
    "other architecture": (
        configured(model_type="gpt2"),
        ValueError,
        "unsupported architecture 'gpt2'; supported: bert",
    ),
    "a decoder": (configured(is_decoder=True), ValueError, "expected is_decoder=False, got True"),
    "size of another kind": (
        configured(hidden_size="48"),
        ValueError,
        "expected hidden_size to be a whole number, got",
    ),
    "a number that no float holds": (
        configured(layer_norm_eps=10**400),
        ValueError,
        "expected layer_norm_eps to be a number, got 1000000",
    ),
    "other width": (configured(hidden_size=52), ValueError, r"expected embeddings.* \[100, 52\].*got \[100, 48\]"),
    "more positions": (
        configured(max_position_embeddings=9999),
        ValueError,
        "expected embeddings.position_embeddings.weight with max_position_embeddings=9999 rows, .*, got",
    ),
    "more types": (
        configured(type_vocab_size=3),
        ValueError,
        "expected embeddings.token_type_embeddings.weight with type_vocab_size=3 rows, as config.json has it, got 2",
    ),
    "more words": (
        configured(vocab_size=101),
        ValueError,
        "expected embeddings.word_embeddings.weight with vocab_size=101 rows, as config.json has it, got 100",
    ),
    "weights in Git LFS": (
        lambda folder: (folder / "model.safetensors").write_bytes(POINTER),
        ValueError,
        "model.safetensors: a pointer of Git LFS, not the file itself; run git lfs pull",
    ),
    "configuration in Git LFS": (
        lambda folder: (folder / "config.json").write_bytes(POINTER),
        ValueError,
        "config.json: a pointer of Git LFS",
    ),
    "index in Git LFS": (lambda folder: sharded(folder).write_bytes(POINTER), ValueError, "a pointer of Git LFS"),
    "more layers": (configured(num_hidden_layers=4), ValueError, r"has no encoder.layer.3.*: is it a plain bert enco"),
    "layers without a number": (
        lambda folder: edit(folder, lambda w: {**w, "bert.encoder.layer.2x.weight": torch.ones(1)}),
        ValueError,
        "has weights that a plain bert encoder has not",
    ),
    "no heads": (configured(num_attention_heads=0), ValueError, "expected num_heads of at least 1, got 0"),
    "no layers": (configured(num_hidden_layers=-1), ValueError, "expected num_layers of at least 1, got -1"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "no weights"),
    "a pickle": (
        pickled,
        ValueError,
        r"pytorch_model.bin: expected weights in model.safetensors: this file is a pickle",
    ),
    "missing weight": (
        lambda folder: edit(folder, lambda w: {k: v for k, v in w.items() if k != NORM}),
        ValueError,
        "has no embeddings.LayerNorm.weight",
    ),
    "half a head": (
        lambda folder: edit(folder, lambda w: {k: v for k, v in w.items() if "transform.dense.w" not in k}),
        ValueError,
        "has no cls.predictions.transform.dense.weight: is it a plain bert model for fill-mask",
    ),
    "other shape": (
        lambda folder: edit(folder, lambda w: {**w, NORM: torch.ones(47)}),
        ValueError,
        r"expected embeddings.LayerNorm.weight \[48\], as config.json has it, got \[47\]",
    ),
    "other dimensions": (
        lambda folder: edit(folder, lambda w: {**w, NORM: torch.ones(48, 1)}),
        ValueError,
        r"expected embeddings.LayerNorm.weight with 1 dimensions, got \[48, 1\]",
    ),
    "integers": (put(NORM, 1, torch.int32), ValueError, "of one of the dtypes F32, F16, BF16, got I32"),
    "NaN": (
        put(NORM, float("nan")),
        ValueError,
        "expected finite weights, got NaN or infinity in embeddings.LayerNorm",
    ),
    "infinity, fp16": (put(NORM, float("-inf"), torch.float16), ValueError, "expected finite weights"),
    "NaN, bf16": (put(NORM, float("nan"), torch.bfloat16), ValueError, "expected finite weights"),
    "NaN in the word table": (
        put("bert.embeddings.word_embeddings.weight", float("inf")),
        ValueError,
        "infinity in embeddings.word_embeddings.weight",
    ),
    "no tensors": (lambda folder: cut(folder, 0), ValueError, DAMAGED + "it has 0 bytes"),
    "cut in the header": (lambda folder: cut(folder, 100), ValueError, DAMAGED + "its header of"),
    "cut in a weight": (lambda folder: cut(folder, 60_000), ValueError, DAMAGED + ".* ends at byte"),
    "header is no JSON": (
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{]"),
        ValueError,
        DAMAGED + "its header: expected JSON",
    ),
    "header says little": (
        lambda folder: header(folder, lambda h: h[NORM].pop("shape")),
        ValueError,
        "does not describe",
    ),
    "header says other bytes": (
        lambda folder: header(folder, lambda h: h[NORM].update(shape=[49])),
        ValueError,
        r"takes 196 bytes, its place has 192",
    ),
    "header says a name": (lambda folder: header(folder, lambda h: h.update(x=1)), ValueError, "does not describe x"),
    "overlap": (
        lambda folder: header(folder, lambda h: h.update(x={"dtype": "U8", "shape": [8], "data_offsets": [0, 8]})),
        ValueError,
        "its tensors leave a gap or overlap at byte",
    ),
    "missing shard": (
        lambda folder: sharded(folder).with_name("model-2.safetensors").unlink(),
        FileNotFoundError,
        "model-2.safetensors: missing, though model.safetensors.index.json names it",
    ),
    "shard elsewhere": (lambda folder: place(sharded(folder), "../x.safetensors"), ValueError, "got '../x.*; refused"),
    "shard is a number": (lambda folder: place(sharded(folder), 1), ValueError, "got 1; refused"),
    "not in its shard": (
        lambda folder: place(sharded(folder), "model-2.safetensors"),
        ValueError,
        "model-2.safetensors: no bert.embeddings.LayerNorm.bias, which model.safetensors.index.json says is there",
    ),
    "index without a map": (lambda folder: sharded(folder).write_text("{}"), ValueError, "expected weight_map"),
    "index is no JSON": (lambda folder: sharded(folder).write_text("x"), ValueError, "index.json: expected JSON"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str, folder: Path, tmp_path: Path) -> None:
    change, kind, match = WRONG[name]
    copied = shutil.copytree(folder, tmp_path / "model")
    change(copied)
    for read in (runtime.Encoder.from_pretrained, lambda path: runtime.Encoder.from_pretrained(path, "fp32")):
        with pytest.raises(kind, match=match) as caught:
            read(copied)
        assert "\n" not in str(caught.value)
        assert str(copied) in str(caught.value)


def test_large_numbers_are_finite(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    for value, dtype in ((3.0e38, torch.float32), (-3.3e38, torch.bfloat16), (-65504.0, torch.float16)):
        put(NORM, value, dtype)(copied)
        runtime.Encoder.from_pretrained(copied)


# ---- NomicBERT, which only transformers 5 has ------------------------------------------------------------------------

NOMIC_CONFIG = {"model_type": "nomic_bert", "vocab_size": 100, "type_vocab_size": 2}
# As transformers 5 writes it, and as the model's own code has it.
NOMIC_CONFIGS: list[dict[str, Any]] = [
    {
        **NOMIC_CONFIG,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    {
        **NOMIC_CONFIG,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 80,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-12,
        "activation_function": "swiglu",
        "rotary_emb_base": 500,
        "rotary_emb_fraction": 1.0,
        "prenorm": False,
    },
]


def nomic_weights(generator: torch.Generator) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (100, 48),
        "embeddings.token_type_embeddings.weight": (2, 48),
        "emb_ln.weight": (48,),
        "emb_ln.bias": (48,),
    }
    for layer in ("encoder.layers.0.", "encoder.layers.1."):
        shapes |= {f"{layer}attn.Wqkv.weight": (144, 48), f"{layer}attn.out_proj.weight": (48, 48)}
        shapes |= {f"{layer}mlp.{name}.weight": (80, 48) for name in ("fc11", "fc12")}
        shapes |= {f"{layer}mlp.fc2.weight": (48, 80)}
        shapes |= {f"{layer}norm{number}.{kind}": (48,) for number in (1, 2) for kind in ("weight", "bias")}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def nomic_reference(weights: dict[str, Tensor], ids: Tensor, types: Tensor) -> Tensor:
    """The last hidden state of one text, in fp64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    tokens, heads, size = len(ids), 4, 12

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(x, (48,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    angles = torch.arange(tokens).double()[:, None] * 500.0 ** (-torch.arange(0, size, 2).double() / size)
    cosines, sines = (torch.cat((part, part), -1)[:, None] for part in (angles.cos(), angles.sin()))

    def rotated(x: Tensor) -> Tensor:
        return x * cosines + torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1) * sines

    hidden = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][types]
    hidden = norm(hidden, "emb_ln")
    for layer in ("encoder.layers.0.", "encoder.layers.1."):
        qkv = (hidden @ w[f"{layer}attn.Wqkv.weight"].T).view(tokens, 3, heads, size)
        q, k, v = rotated(qkv[:, 0]), rotated(qkv[:, 1]), qkv[:, 2]
        shares = (torch.einsum("qhd,khd->hqk", q, k) / size**0.5).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", shares, v).reshape(tokens, 48) @ w[f"{layer}attn.out_proj.weight"].T
        hidden = norm(hidden + attended, f"{layer}norm1")
        gate = torch.nn.functional.silu(hidden @ w[f"{layer}mlp.fc12.weight"].T)
        wide = gate * (hidden @ w[f"{layer}mlp.fc11.weight"].T)
        hidden = norm(hidden + wide @ w[f"{layer}mlp.fc2.weight"].T, f"{layer}norm2")
    return hidden


def nomic_in_memory(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that transformers 5 gives the weights of a model that it has loaded."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if "Wqkv" in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("encoder.", "").replace("attn.Wqkv", f"self_attn.{part}_proj")] = third.clone()
            continue
        for old, new in (
            *(("encoder.layers", "layers"), ("emb_ln", "embeddings.LayerNorm"), ("attn.out_proj", "self_attn.o_proj")),
            *(("fc11", "up_proj"), ("fc12", "gate_proj"), ("fc2", "down_proj")),
            *(("norm1", "post_attention_layernorm"), ("norm2", "post_mlp_layernorm")),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("config", NOMIC_CONFIGS, ids=["transformers 5", "own code"])
def test_nomic(config: dict[str, Any], generator: torch.Generator, tmp_path: Path) -> None:
    weights = nomic_weights(generator)
    ids, bounds = batch(generator)
    types = torch.randint(0, 2, ids.shape, generator=generator)
    expected = torch.cat(
        [nomic_reference(weights, *(x[a:b] for x in (ids, types))) for a, b in itertools.pairwise(bounds.tolist())]
    )
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = {}
    for names, stored in (("file", weights), ("memory", nomic_in_memory(weights))):
        for prefix in ("", "nomic_bert."):
            save_file({f"{prefix}{name}": tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
            encoder = runtime.Encoder.from_pretrained(tmp_path, "fp32")
            found[names, prefix] = torch.from_dlpack(encoder.encode(ids, bounds, types).hidden())
    for hidden in found.values():
        assert torch.equal(hidden, found["file", ""])
    torch.testing.assert_close(found["file", ""].double(), expected, rtol=1e-4, atol=1e-4)
    rounded = runtime.Encoder.from_pretrained(tmp_path).encode(ids, bounds, types).hidden()
    assert test_transformers.cosines(torch.from_dlpack(rounded), expected).min() > 0.9995
    for option in ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0}}, {"rotary_scaling_factor": 2}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **option}), encoding="utf-8")
        with pytest.raises(ValueError, match="unsupported configuration: expected ro"):
            runtime.Encoder.from_pretrained(tmp_path)
