"""Encoder and Head on weights that are made up, without transformers: results, checks of input, files."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import torch_ext
from tests.ops import reference
from torch_ext import Encoder, EncoderSpec, Head, HeadSpec

SPEC = EncoderSpec(
    architecture="bert",
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=56,
    activation="gelu",
    max_positions=20,
    position_offset=0,
    layer_norm_eps=1e-12,
    vocab_size=50,
    type_vocab_size=2,
)
HEAD = HeadSpec(task="fill-mask", hidden_size=32, activation="gelu", norm=True, layer_norm_eps=1e-12, num_outputs=50)
LENGTHS = [3, 20, 1, 7]


def make_weights(spec: EncoderSpec | HeadSpec, generator: torch.Generator) -> dict[str, Tensor]:
    weights = {}
    for name, shape in spec.shapes().items():
        weights[name] = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5)
        if "norm.weight" in name:
            weights[name] += 1
    return weights


def batch(generator: torch.Generator, lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(lengths)
    ids = torch.randint(0, 50, (tokens,), generator=generator)
    return ids, reference.cu_seqlens(lengths), torch.randint(0, 2, (tokens,), generator=generator)


def run_plain(spec: EncoderSpec, weights: dict[str, Tensor], ids: Tensor, bounds: Tensor, types: Tensor) -> Tensor:
    """The encoder in fp64, one text at a time."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    width = spec.hidden_size

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], spec.layer_norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    results = []
    for begin, end in itertools.pairwise(bounds.tolist()):
        rows = torch.arange(end - begin) + spec.position_offset
        x = w["embeddings.word"][ids[begin:end]] + w["embeddings.position"][rows]
        if spec.type_vocab_size:
            x = x + w["embeddings.token_type"][types[begin:end]]
        x = norm(x, "embeddings.norm")
        for index in range(spec.num_layers):
            prefix = f"layers.{index}"
            qkv = linear(x, f"{prefix}.attention.qkv").view(-1, 3, spec.num_heads, width // spec.num_heads)
            q, k, v = qkv.permute(1, 2, 0, 3)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(-1, width)
            x = norm(x + linear(attended, f"{prefix}.attention.out"), f"{prefix}.attention.norm")
            wide = reference.ACTIVATIONS[spec.activation](linear(x, f"{prefix}.ffn.up"))
            x = norm(x + linear(wide, f"{prefix}.ffn.down"), f"{prefix}.ffn.norm")
        results.append(x)
    return torch.cat(results)


def cosine(a: Tensor, b: Tensor) -> float:
    """The smallest cosine of rows."""
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1).min())


SPECS = [
    SPEC,
    dataclasses.replace(SPEC, position_offset=2, type_vocab_size=1, layer_norm_eps=1e-5),
    dataclasses.replace(SPEC, type_vocab_size=0, activation="relu", num_heads=1, num_layers=1),
    dataclasses.replace(SPEC, activation="gelu_tanh", hidden_size=36, intermediate_size=13),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_plain_pytorch(spec: EncoderSpec, generator: torch.Generator) -> None:
    weights = make_weights(spec, generator)
    ids, bounds, types = batch(generator)
    if spec.type_vocab_size < 2:
        types = torch.zeros_like(types)
    expected = run_plain(spec, weights, ids, bounds, types)
    exact = Encoder(spec, weights, "fp32")(ids, bounds, types)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), expected, rtol=1e-4, atol=1e-4)
    rounded = Encoder(spec, weights, "bf16")(ids, bounds, types)
    assert rounded.dtype == torch.bfloat16
    assert cosine(rounded, expected) > 0.999


def test_types_default_to_zero(generator: torch.Generator) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator))
    ids, bounds, types = batch(generator)
    assert torch.equal(encoder(ids, bounds), encoder(ids, bounds, torch.zeros_like(types)))
    assert not torch.equal(encoder(ids, bounds), encoder(ids, bounds, torch.ones_like(types)))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_texts_do_not_see_each_other(generator: torch.Generator, dtype: torch_ext.encoder.Dtype) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator), dtype)
    ids, bounds, _ = batch(generator)
    together = encoder(ids, bounds)
    for begin, end in itertools.pairwise(bounds.tolist()):
        alone = encoder(ids[begin:end], torch.tensor([0, end - begin], dtype=torch.int32))
        # Kernels differ with the number of rows, and so does the order of sums.
        assert cosine(alone, together[begin:end]) > (0.9999 if dtype == "bf16" else 0.9999999)


def test_weights_are_copied(generator: torch.Generator) -> None:
    for dtype in ("bf16", "fp32"):
        weights = make_weights(SPEC, generator)
        encoder = Encoder(SPEC, weights, dtype)
        ids, bounds, _ = batch(generator)
        before = encoder(ids, bounds)
        for tensor in weights.values():
            tensor.zero_()
        assert torch.equal(encoder(ids, bounds), before)


def test_result_may_be_trained_on(generator: torch.Generator) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator), "fp32")
    ids, bounds, _ = batch(generator)
    hidden = encoder(ids, bounds)
    assert torch.is_grad_enabled()
    assert not hidden.requires_grad
    own = torch.nn.Linear(32, 2)
    own(hidden).sum().backward()
    assert own.weight.grad is not None


def test_grad_mode_comes_back_after_errors(generator: torch.Generator) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator))
    with pytest.raises(RuntimeError, match="input_ids from 0 to 49, got 50"):
        encoder(torch.tensor([50]), reference.cu_seqlens([1]))
    assert torch.is_grad_enabled()
    x = torch.ones(2, requires_grad=True)
    assert (x * 2).requires_grad


def test_input_errors(generator: torch.Generator) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator))
    ids, bounds, types = batch(generator)

    def cu(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    for error, match, arguments in (
        (TypeError, "expected input_ids of torch.int64, got torch.int32", (ids.int(), bounds)),
        (TypeError, "expected input_ids of torch.int64, got list", (ids.tolist(), bounds)),
        (TypeError, "expected cu_seqlens of torch.int32, got torch.int64", (ids, bounds.long())),
        (TypeError, "expected token_type_ids of torch.int64", (ids, bounds, types.float())),
        (ValueError, r"input_ids with 1 dimension, got \[1, 31\]: texts are concatenated", (ids[None], bounds)),
        (ValueError, "expected input_ids on the CPU, got meta", (ids.to("meta"), bounds)),
        (ValueError, "at least one text", (ids[:0], cu(0))),
        (ValueError, "at least one text", (ids[:0], cu())),
        (ValueError, "text 0 has no tokens", (ids[:0], cu(0, 0))),
        (ValueError, "got 3 then 3: text 1 has no tokens", (ids, cu(0, 3, 3, 23, 31))),
        (ValueError, "got 9 then 3: text 1 has no tokens", (ids, cu(0, 9, 3, 31))),
        (ValueError, "from 0 to 31 .tokens., got 1 to 31", (ids, cu(1, 31))),
        (ValueError, "from 0 to 31 .tokens., got 0 to 30", (ids, cu(0, 15, 30))),
        (ValueError, "text 1 has 21 tokens, the model takes at most 20: truncate it", (ids, cu(0, 3, 24, 31))),
        (ValueError, r"expected token_type_ids \[31\], got \[30\]", (ids, bounds, types[:30])),
        (RuntimeError, "token_type_ids from 0 to 1, got 2", (ids, bounds, types + 1)),
        (RuntimeError, "input_ids from 0 to 49, got -1", (ids - ids.max() - 1, bounds)),
    ):
        with pytest.raises(error, match=match):
            encoder(*arguments)
    plain = dataclasses.replace(SPEC, type_vocab_size=0)
    encoder = Encoder(plain, make_weights(plain, generator))
    assert torch.equal(encoder(ids, bounds, torch.zeros_like(ids)), encoder(ids, bounds))
    with pytest.raises(ValueError, match="bert has no token types"):
        encoder(ids, bounds, torch.ones_like(ids))


def test_construction_errors(generator: torch.Generator) -> None:
    weights = make_weights(SPEC, generator)
    for match, change in (
        ("missing .'embeddings.word'.", {"embeddings.word": None}),
        ("unexpected .'extra'.", {"extra": torch.ones(1)}),
        (r"expected embeddings.word \[50, 32\], got \[50, 31\]", {"embeddings.word": torch.ones(50, 31)}),
        ("expected embeddings.word of fp32 or bf16", {"embeddings.word": torch.ones(50, 32).half()}),
        ("on meta", {"embeddings.word": torch.ones(50, 32, device="meta")}),
    ):
        changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
        with pytest.raises(ValueError, match=match):
            Encoder(SPEC, changed)
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        Encoder(SPEC, weights, "int8")
    for match, change in (
        ("num_heads=5 does not divide hidden_size=32", {"num_heads": 5}),
        ("num_layers of at least 1", {"num_layers": 0}),
        ("unknown activation 'elu'", {"activation": "elu"}),
        ("vocab_size of type int, got '50'", {"vocab_size": "50"}),
        ("vocab_size of type int, got True", {"vocab_size": True}),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(SPEC, **change)
    with pytest.raises(ValueError, match="unknown task 'regression'"):
        dataclasses.replace(HEAD, task="regression")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("norm", [True, False])
def test_head(generator: torch.Generator, dtype: torch_ext.encoder.Dtype, norm: bool) -> None:
    spec = dataclasses.replace(HEAD, norm=norm, num_outputs=3, task="text-classification", activation="tanh")
    weights = make_weights(spec, generator)
    head = Head(spec, weights, dtype)
    hidden = torch.randn(9, 32, generator=generator)
    rows = torch.tensor([4, 0, 4, 8])
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = torch.tanh(F.linear(hidden.double()[rows], w["head.dense.weight"], w["head.dense.bias"]))
    if norm:
        x = F.layer_norm(x, (32,), w["head.norm.weight"], w["head.norm.bias"], spec.layer_norm_eps)
    expected = F.linear(x, w["head.out.weight"], w["head.out.bias"])
    for kind in (torch.float32, torch.bfloat16):
        for index in (rows, rows.int()):
            actual = head(hidden.to(kind), index)
            assert actual.dtype == torch.float32
            tolerance = 1e-5 if dtype == "fp32" and kind == torch.float32 else 0.06
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    assert head(hidden, rows[:0]).shape == (0, 3)
    for error, match, arguments in (
        (ValueError, r"expected hidden \[T, 32\]", (hidden[:, :31], rows)),
        (TypeError, "fp32 or bf16", (hidden.double(), rows)),
        (TypeError, "rows of int64 or int32", (hidden, rows.float())),
        (ValueError, "rows with 1 dimension", (hidden, rows[None])),
        (ValueError, "rows from 0 to 8, got 9", (hidden, torch.tensor([0, 9]))),
        (ValueError, "rows from 0 to 8, got -1", (hidden, torch.tensor([-1]))),
    ):
        with pytest.raises(error, match=match):
            head(*arguments)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_save_and_load(generator: torch.Generator, tmp_path: Path, dtype: torch_ext.encoder.Dtype) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator), dtype)
    head = Head(HEAD, make_weights(HEAD, generator), dtype)
    path = tmp_path / "encoder.safetensors"
    encoder.save(path, head)
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder.safetensors"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    stored = load_file(path)
    matrix = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert stored["layers.0.attention.qkv.weight"].dtype == matrix
    assert stored["layers.0.attention.qkv.weight"].shape == (96, 32)
    assert stored["layers.0.attention.qkv.bias"].dtype == torch.float32

    again, head_again = Encoder.load(path, dtype), Head.load(str(path), dtype)
    assert again.spec == SPEC
    assert head_again is not None
    assert head_again.spec == HEAD
    ids, bounds, types = batch(generator)
    hidden = encoder(ids, bounds, types)
    assert torch.equal(again(ids, bounds, types), hidden)
    assert torch.equal(head_again(hidden, bounds[:-1]), head(hidden, bounds[:-1]))
    path.write_bytes(b"")  # Nothing of the file is needed any more.
    assert torch.equal(again(ids, bounds, types), hidden)

    encoder.save(path)
    assert Head.load(path, dtype) is None
    if dtype == "fp32":
        assert Encoder.load(path, "bf16").dtype == "bf16"
    else:
        with pytest.raises(ValueError, match="holds bf16 weights, fp32 was asked for"):
            Encoder.load(path, "fp32")


def test_save_errors(generator: torch.Generator, tmp_path: Path) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator))
    other = dataclasses.replace(HEAD, hidden_size=16)
    for head in (Head(other, make_weights(other, generator)), Head(HEAD, make_weights(HEAD, generator), "fp32")):
        with pytest.raises(ValueError, match="expected a head of hidden_size=32, bf16"):
            encoder.save(tmp_path / "a.safetensors", head)
    with pytest.raises(OSError, match="missing"):
        encoder.save(tmp_path / "missing" / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_load_errors(generator: torch.Generator, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(FileNotFoundError, match=r"encoder.safetensors"):
        Encoder.load(path)
    encoder = Encoder(SPEC, make_weights(SPEC, generator))
    encoder.save(path)
    good = path.read_bytes()
    for content in (b"", b"not a model", good[: len(good) // 2], good[:-1], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"encoder.safetensors is damaged"):
            Encoder.load(path)

    weights = encoder.weights()
    spec = json.dumps(dataclasses.asdict(SPEC))
    fields = {"format": "torch-ext-encoder", "format_version": "1", "dtype": "bf16", "encoder": spec}

    def fails(match: str, metadata: dict[str, str] | None = None, **tensors: Tensor | None) -> None:
        changed = {name: tensor for name, tensor in {**weights, **tensors}.items() if tensor is not None}
        save_file(changed, path, metadata)
        with pytest.raises(ValueError, match=match):
            Encoder.load(path)

    fails("was not written by torch_ext.Encoder.save")
    fails("was not written by", {"format": "pt"})
    fails("has format version 2, this torch_ext reads 1", {**fields, "format_version": "2"})
    fails("no valid specification", {**fields, "encoder": "{"})
    fails("no valid specification", {**fields, "encoder": "[]"})
    fails("no valid specification", {**fields, "encoder": json.dumps({"hidden_size": 3})})
    fails("no valid specification", {**fields, "encoder": spec.replace("50", '"50"')})
    fails("no valid specification", {name: value for name, value in fields.items() if name != "encoder"})
    fails("missing .'embeddings.word'.", fields, **{"embeddings.word": None})
    fails(r"expected embeddings.word \[50, 32\]", fields, **{"embeddings.word": torch.ones(5, 32)})
    fails("unexpected .'layers.9.x'.", fields, **{"layers.9.x": torch.ones(5)})


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies(generator: torch.Generator, copied: Any) -> None:
    ids, bounds, _ = batch(generator)
    for dtype in ("bf16", "fp32"):
        encoder, head = (
            Encoder(SPEC, make_weights(SPEC, generator), dtype),
            Head(HEAD, make_weights(HEAD, generator), dtype),
        )
        hidden = encoder(ids, bounds)
        assert torch.equal(copied(encoder)(ids, bounds), hidden)
        assert torch.equal(copied(head)(hidden, bounds[:-1]), head(hidden, bounds[:-1]))
        assert "bert" in repr(encoder)
        assert "fill-mask" in repr(head)


def test_loading_needs_torch_and_safetensors_only(generator: torch.Generator, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    Encoder(SPEC, make_weights(SPEC, generator)).save(path, Head(HEAD, make_weights(HEAD, generator)))
    program = (
        "import sys, torch_ext; torch_ext.Encoder.load(sys.argv[1]); torch_ext.Head.load(sys.argv[1]);"
        "print([name for name in ('transformers', 'tokenizers', 'onnxruntime', 'optimum') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.compile
def test_compiled_equals_eager(generator: torch.Generator) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator))
    compiled = torch.compile(lambda *arguments: encoder(*arguments), fullgraph=True)
    ids, bounds, types = batch(generator)
    with torch.no_grad():
        assert cosine(compiled(ids, bounds, types), encoder(ids, bounds, types)) > 0.9999
