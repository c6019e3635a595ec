"""Encoder and Head on weights that are made up, without transformers: results, checks of input, files."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import torch_ext
from tests import warm
from tests.ops import reference
from torch_ext import Encoder, EncoderSpec, Head, HeadSpec
from torch_ext.encoder.positions import relative_buckets

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


def run_plain(
    spec: EncoderSpec,
    weights: dict[str, Tensor],
    ids: Tensor,
    bounds: Tensor,
    types: Tensor,
    attended: Tensor | None = None,
) -> Tensor:
    """The encoder in fp64, one text at a time, with whole matrices of scores."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, kv_heads, size = spec.num_heads, spec.kv_heads, spec.size_of_heads

    def norm(x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in w:
            return x
        if spec.rms_norm or name.endswith(("query_norm", "key_norm")):
            return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], spec.layer_norm_eps)
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], spec.layer_norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def rotate(x: Tensor, theta: float) -> Tensor:
        turns = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(0, size, 2) / size)
        pairs = torch.complex(*x.unflatten(-1, (2, size // 2)).unbind(-2))
        turns = turns.double() * spec.rotary_factor
        turned = pairs * torch.polar(torch.ones_like(turns), turns)
        return torch.cat((turned.real, turned.imag), -1)

    def attention(x: Tensor, index: int, keys: int) -> Tensor:
        local = spec.window > 0 and index % spec.global_every != spec.global_first
        qkv = linear(x, f"layers.{index}.attention.qkv").view(len(x), -1, size).transpose(0, 1)
        q, k, v = qkv.split([heads, kv_heads, kv_heads])
        q, k = norm(q, f"layers.{index}.attention.query_norm"), norm(k, f"layers.{index}.attention.key_norm")
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
        if spec.rotary_theta:
            theta = spec.rotary_theta_local if local and spec.rotary_theta_local else spec.rotary_theta
            q, k = rotate(q, theta), rotate(k, theta)
        scores = q @ k.transpose(1, 2) * (spec.attention_scale or size**-0.5)
        distance = torch.arange(len(x)) - torch.arange(len(x))[:, None]
        rows = position_rows(-distance, spec.position_span, spec.position_reach)
        for kind, x_of, transposed in (("keys", q, False), ("queries", k, True)):
            table = w.get(f"layers.{index}.attention.position_{kind}")
            if table is not None:
                products = x_of @ table.view(-1, heads, size).permute(1, 2, 0)  # [heads, tokens, rows]
                chosen = (rows.T if transposed else rows).expand(heads, -1, -1)
                more = products.gather(2, chosen)
                scores += (more.transpose(1, 2) if transposed else more) * size**-0.5
        kinds = 1 + spec.content_to_position + spec.position_to_content
        scores *= kinds**-0.5
        if spec.relative_attention_buckets:
            buckets = spec.relative_attention_buckets, spec.relative_attention_max_distance
            scores += w["relative_attention_bias"][relative_buckets(distance, *buckets)].permute(2, 0, 1)
        if local:
            scores[:, distance.abs() > spec.window] = -torch.inf
        if spec.causal:
            scores[:, distance > 0] = -torch.inf
        scores[:, :, keys:] = -torch.inf
        # A row without a key is NaN.
        context = (scores.softmax(-1).nan_to_num() @ v).transpose(0, 1).flatten(1)
        return linear(context, f"layers.{index}.attention.out")

    def feed_forward(x: Tensor, index: int, keys: int) -> Tensor:
        wide, factor = linear(x, f"layers.{index}.ffn.up"), torch.ones(())
        if spec.gated_ffn:
            wide, factor = wide.chunk(2, -1)
        return linear(reference.ACTIVATIONS[spec.activation](wide) * factor, f"layers.{index}.ffn.down")

    results = []
    counts = bounds.diff() if attended is None else attended
    for (begin, end), keys in zip(itertools.pairwise(bounds.tolist()), counts.tolist(), strict=True):
        x = w["embeddings.word"][ids[begin:end]] * spec.embedding_scale
        if spec.dropped_id >= 0:
            kept = ids[begin:end] != spec.dropped_id
            x = x * kept.unsqueeze(1) * (len(kept) / max(int(kept.sum()), 1))
        if spec.absolute_positions:
            # With all tokens counted: 0, 1, 2 ... As transformers does it: padding has the row before the first one's.
            counted = ids[begin:end] != spec.padding_id
            x = x + w["embeddings.position"][(counted.cumsum(0) * counted - 1) + spec.position_offset]
        if spec.type_vocab_size:
            x = x + w["embeddings.token_type"][types[begin:end]]
        x = norm(x, "embeddings.norm")
        if spec.embedding_size:
            x = linear(x, "embeddings.projection")
        for index in range(spec.num_layers):
            for part, name in ((attention, "attention"), (feed_forward, "ffn")):
                if spec.norm_first:
                    added = part(norm(x, f"layers.{index}.{name}.norm"), index, keys)
                    x = x + norm(added, f"layers.{index}.{name}.post_norm")
                else:
                    x = norm(x + part(x, index, keys), f"layers.{index}.{name}.norm")
        results.append(norm(x, "final_norm") if spec.norm_first else x)
    return torch.cat(results)


def position_rows(distances: Tensor, span: int, reach: int) -> Tensor:
    """Rows of a table of relative positions by the position of the query minus that of the key."""
    size, middle = distances.abs(), max(span // 2, 1)
    if reach:
        ratio = (size.clamp_min(1).float() / middle).log() / torch.tensor((reach - 1) / middle).log()
        size = torch.where(size <= middle, size, (ratio * (middle - 1)).ceil().long() + middle)
    return (span + distances.sign() * size).clamp(0, max(2 * span - 1, 0))


def cosine(a: Tensor, b: Tensor) -> float:
    """The smallest cosine of rows."""
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1).min())


SPECS = [
    SPEC,
    dataclasses.replace(SPEC, position_offset=2, type_vocab_size=1, layer_norm_eps=1e-5),
    dataclasses.replace(SPEC, type_vocab_size=0, activation="relu", num_heads=1, num_layers=1),
    dataclasses.replace(SPEC, activation="gelu_tanh", hidden_size=36, intermediate_size=13),
    dataclasses.replace(SPEC, embedding_size=20),
    dataclasses.replace(SPEC, relative_attention_buckets=8, relative_attention_max_distance=6, position_offset=2),
    dataclasses.replace(SPEC, position_offset=2, padding_id=1),
    dataclasses.replace(SPEC, norm_first=True, activation="relu"),
    dataclasses.replace(SPEC, gated_ffn=True, activation="silu"),
    dataclasses.replace(SPEC, rotary_theta=50.0, absolute_positions=False),
    dataclasses.replace(SPEC, window=3, global_every=2, num_layers=3),
    dataclasses.replace(
        SPEC,
        type_vocab_size=0,
        num_layers=5,
        embedding_size=40,
        absolute_positions=False,
        rotary_theta=1000.0,
        rotary_theta_local=20.0,
        window=4,
        global_every=3,
        norm_first=True,
        norm_first_attention=False,
        gated_ffn=True,
    ),
    dataclasses.replace(SPEC, position_span=6, content_to_position=True, position_to_content=True),
    dataclasses.replace(
        SPEC,
        position_span=8,
        position_reach=16,
        content_to_position=True,
        absolute_positions=False,
        window=5,
        global_every=2,
    ),
    dataclasses.replace(SPEC, position_span=3, position_to_content=True, relative_attention_buckets=8),
    dataclasses.replace(SPEC, norm_first=True, embedding_norm=False, position_offset=2, padding_id=1),
    dataclasses.replace(SPEC, causal=True, num_kv_heads=2, head_size=6, rotary_theta=30.0, rotary_factor=0.7),
    dataclasses.replace(
        SPEC,
        type_vocab_size=0,
        absolute_positions=False,
        norm_first=True,
        embedding_norm=False,
        rms_norm=True,
        gated_ffn=True,
        num_kv_heads=1,
        head_size=10,
        head_norms=True,
        causal=True,
        rotary_theta=100.0,
    ),
    dataclasses.replace(
        SPEC,
        num_layers=5,
        type_vocab_size=0,
        absolute_positions=False,
        norm_first=True,
        embedding_norm=False,
        embedding_scale=5.6,
        rms_norm=True,
        gated_ffn=True,
        num_kv_heads=2,
        head_norms=True,
        post_norms=True,
        attention_scale=0.25,
        rotary_theta=1000.0,
        rotary_theta_local=20.0,
        window=4,
        global_every=3,
        global_first=2,
    ),
    dataclasses.replace(
        SPEC,
        type_vocab_size=0,
        norm_first=True,
        embedding_norm=False,
        embedding_scale=0.88,
        dropped_id=7,
        activation="quick_gelu",
        causal=True,
    ),
    # Nothing has all of it at once, but nothing speaks against it.
    dataclasses.replace(
        SPEC, relative_attention_buckets=16, rotary_theta=100.0, window=2, global_every=2, norm_first=True
    ),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_plain_pytorch(spec: EncoderSpec, generator: torch.Generator) -> None:
    weights = make_weights(spec, generator)
    ids, bounds, types = batch(generator)
    if spec.padding_id >= 0:
        ids[::4] = spec.padding_id
    if spec.dropped_id >= 0:
        ids[::3] = spec.dropped_id
    if spec.type_vocab_size < 2:
        types = torch.zeros_like(types)
    expected = run_plain(spec, weights, ids, bounds, types)
    exact = Encoder(spec, weights, "fp32")(ids, bounds, types)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), expected, rtol=1e-4, atol=1e-4)
    rounded = Encoder(spec, weights, "bf16")(ids, bounds, types)
    assert rounded.dtype == torch.bfloat16
    assert cosine(rounded, expected) > 0.999


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tokens_that_others_do_not_attend_to(spec: EncoderSpec, generator: torch.Generator) -> None:
    """As a ColBERT's query is filled up; in one op, and op by op."""
    weights = make_weights(spec, generator)
    types: Tensor | None
    ids, bounds, types = batch(generator)
    types = types if spec.type_vocab_size == 2 else torch.zeros_like(types)
    attended = torch.tensor([1, 9, 1, 7], dtype=torch.int32)
    expected = run_plain(spec, weights, ids, bounds, types, attended)
    exact = Encoder(spec, weights, "fp32")
    torch.testing.assert_close(exact(ids, bounds, types, attended).double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(exact(ids, bounds, types, bounds.diff()), exact(ids, bounds, types))
    types = types if spec.type_vocab_size else None
    for dtype in ("bf16", "int8"):
        encoder = Encoder(spec, weights, dtype)
        actual = encoder(ids, bounds, types, attended)
        assert cosine(actual, expected) > (0.999 if dtype == "bf16" else 0.99)
        assert cosine(actual, encoder.run_reference(ids, bounds, types, attended=attended)) > 0.999


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_op_equals_op_by_op(spec: EncoderSpec, generator: torch.Generator) -> None:
    """The whole stack in ``encoder_forward`` rounds at the same places as the readable reference."""
    encoder = Encoder(spec, make_weights(spec, generator))
    ids, bounds, types = batch(generator)
    if spec.type_vocab_size < 2:
        types = torch.zeros_like(types)
    expected = encoder.run_reference(ids, bounds, types if spec.type_vocab_size else None)
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        actual = encoder(ids, bounds, types)
        # PyTorch's own linear adds the residual after rounding.
        assert cosine(actual, expected) > 0.999
        if torch_ext.isa_report()["linear"] == "torch_ext":
            assert torch.equal(actual, expected)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "int8"])
def test_threads_that_share_a_batch_out_give_the_same(
    generator: torch.Generator, dtype: torch_ext.encoder.Dtype
) -> None:
    """Enough texts for each thread to take some of them alone, in uneven parts; the result is that of one thread."""
    spec = dataclasses.replace(SPEC, max_positions=60)
    encoder = Encoder(spec, make_weights(spec, generator), dtype)
    lengths = torch.randint(1, spec.max_positions + 1, (150,), generator=generator).tolist()
    ids, bounds, types = batch(generator, lengths)
    attended = torch.tensor([max(1, length - index % 9) for index, length in enumerate(lengths)], dtype=torch.int32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = encoder(ids, bounds, types, attended)
        assert expected.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
        for count, times in ((2, 1), (3, 1), (4, 3)):
            torch.set_num_threads(count)
            for _ in range(times):
                actual = encoder(ids, bounds, types, attended)
                # Kernels for few rows may add in another order than those for many.
                assert cosine(actual, expected) > 0.9999
                rows = F.cosine_similarity(actual.double(), expected.double(), dim=-1)
                assert float(rows.min()) > 0.999
    finally:
        torch.set_num_threads(threads)


@pytest.mark.anywhere
def test_a_batch_in_groups_equals_its_texts(generator: torch.Generator) -> None:
    """More tokens than one group takes: a group's memory is bounded, and nothing is lost between two."""
    spec = dataclasses.replace(SPEC, intermediate_size=4096, num_layers=1)
    encoder = Encoder(spec, make_weights(spec, generator))
    lengths = torch.randint(1, spec.max_positions + 1, (200,), generator=generator)
    bounds = reference.cu_seqlens(lengths.tolist())
    ids = torch.randint(0, spec.vocab_size, (int(bounds[-1]),), generator=generator)
    types = torch.randint(0, 2, ids.shape, generator=generator)
    together = encoder(ids, bounds, types)
    half = bounds[100]
    first = encoder(ids[:half], bounds[:101], types[:half])
    second = encoder(ids[half:], bounds[100:] - half, types[half:])
    assert cosine(together, torch.cat((first, second))) > 0.9999
    assert cosine(together, encoder.run_reference(ids, bounds, types)) > 0.9999


def test_a_damaged_packed_encoder_is_refused(generator: torch.Generator) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator))
    ids, bounds, _ = batch(generator)
    packed = encoder._packed
    assert packed is not None
    wide = torch.full((SPEC.hidden_size, 8), 0, dtype=torch.uint8)
    for damaged, message in (
        (packed.float(), "expected an encoder packed"),
        (wide, "expected an encoder packed"),
        (torch.zeros_like(packed), "without its header"),
        (packed[:, : packed.shape[1] // 2].contiguous(), "damaged"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch_ext.encoder_forward(ids, bounds, None, damaged)
    # Any byte of the header and of the table of sections.
    size = 128 + 16 * int(torch.ops.torch_ext._encoder_sections(packed).shape[0])
    for position in range(0, size, 3):
        damaged = packed.clone()
        damaged.view(-1)[position] ^= 0xFF
        with pytest.raises(RuntimeError, match="packed"):
            torch_ext.encoder_forward(ids, bounds, None, damaged)


def test_weights_are_kept_once(generator: torch.Generator) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator))
    assert encoder._packed is not None
    storage = encoder._packed.untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() == storage for tensor in encoder._tensors.values())


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
        (ValueError, "expected input_ids as a dense tensor, got torch.sparse_coo", (ids.to_sparse(), bounds)),
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
        (TypeError, "expected attended of torch.int32, got torch.int64", (ids, bounds, None, bounds.diff().long())),
        (RuntimeError, r"expected attended i32 \[4\], got", (ids, bounds, None, cu(1, 1))),
        (RuntimeError, "attended from 1 to the 3 tokens of sequence 0, got 0", (ids, bounds, None, cu(0, 1, 1, 1))),
        (RuntimeError, "attended from 1 to the 1 tokens of sequence 2, got 2", (ids, bounds, None, cu(3, 1, 2, 1))),
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
    with pytest.raises(ValueError, match="unknown dtype 'i8'; known: 'bf16', 'fp32', 'int8'"):
        Encoder(SPEC, weights, "i8")
    for match, change in (
        ("num_heads=5 does not divide hidden_size=32", {"num_heads": 5}),
        ("num_layers of at least 1", {"num_layers": 0}),
        ("unknown activation 'elu'", {"activation": "elu"}),
        ("global_every of at least 1, got 0", {"global_every": 0}),
        ("window of at least 0, got -1", {"window": -1}),
        ("rotary_theta of at least 0, got nan", {"rotary_theta": float("nan")}),
        ("heads of an even size, got 9", {"hidden_size": 36, "rotary_theta": 10.0}),
        ("heads of an even size, got 5", {"head_size": 5, "rotary_theta": 10.0}),
        ("num_kv_heads=3 does not divide num_heads=4", {"num_kv_heads": 3}),
        ("global_first below global_every=2, got 2", {"window": 3, "global_every": 2, "global_first": 2}),
        ("embedding_scale and rotary_factor above 0", {"embedding_scale": 0.0}),
        ("need embedding_norm=False", {"rms_norm": True}),
        ("needs norm_first", {"embedding_norm": False}),
        ("post_norms=True needs rms_norm=True", {"norm_first": True, "embedding_norm": False, "post_norms": True}),
        ("position_span of at least 1 with content_to_position", {"position_span": 4}),
        ("got 3 for 4", {"position_span": 4, "position_reach": 3, "position_to_content": True}),
        ("as many heads of keys", {"position_span": 4, "position_to_content": True, "num_kv_heads": 2}),
        ("relative_attention_buckets divisible by 4.*got 6 and 128", {"relative_attention_buckets": 6}),
        ("got 8 and 2", {"relative_attention_buckets": 8, "relative_attention_max_distance": 2}),
        ("norm_first_attention=False means nothing without norm_first", {"norm_first_attention": False}),
        ("expected padding_id -1, or an id and position_offset of at least 1", {"padding_id": 0}),
        ("expected padding_id -1, or an id and position_offset of at least 1", {"padding_id": -2}),
        ("gated_ffn of type bool, got 1", {"gated_ffn": 1}),
        ("vocab_size of type int, got '50'", {"vocab_size": "50"}),
        ("vocab_size of type int, got True", {"vocab_size": True}),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(SPEC, **change)
    with pytest.raises(ValueError, match="unknown task 'regression'"):
        dataclasses.replace(HEAD, task="regression")
    for match, change in (
        ("unknown pooling 'max'; known: 'cls', 'mean', 'lasttoken'", {"pooling": "max"}),
        ("num_outputs of at least 1, got 0", {"num_outputs": 0}),
        ("mean nothing without a dense layer", {"dense": False}),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(HEAD, **change)


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
        (TypeError, "rows as a torch.Tensor, got list", (hidden, [0])),
        (TypeError, "hidden as a torch.Tensor, got list", (hidden.tolist(),)),
        (ValueError, "rows with 1 dimension", (hidden, rows[None])),
        (ValueError, "rows from 0 to 8, got 9", (hidden, torch.tensor([0, 9]))),
        (ValueError, "rows from 0 to 8, got -1", (hidden, torch.tensor([-1]))),
    ):
        with pytest.raises(error, match=match):
            head(*arguments)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_head_without_dense_layer(generator: torch.Generator, dtype: torch_ext.encoder.Dtype) -> None:
    plain = {"dense": False, "activation": "none", "norm": False, "num_outputs": 3}
    spec = dataclasses.replace(HEAD, task="token-classification", **plain)
    weights = make_weights(spec, generator)
    assert weights.keys() == {"head.out.weight", "head.out.bias"}
    hidden = torch.randn(9, 32, generator=generator)
    head = Head(spec, weights, dtype)
    tolerance = 1e-5 if dtype == "fp32" else 0.03
    expected = F.linear(hidden, weights["head.out.weight"], weights["head.out.bias"])
    torch.testing.assert_close(head(hidden), expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"a head for text-classification, this one is for token-classification"):
        head.classify(hidden, reference.cu_seqlens([9]))


def test_head_pools_texts(generator: torch.Generator) -> None:
    bounds = reference.cu_seqlens([4, 1, 4])
    hidden = torch.randn(9, 32, generator=generator)
    spec = dataclasses.replace(HEAD, task="text-classification", dense_size=24)
    weights = make_weights(spec, generator)
    head = Head(spec, weights, "fp32")
    assert torch.equal(head.classify(hidden, bounds), head(hidden, bounds[:-1]))
    pooled = Head(dataclasses.replace(spec, pooling="mean"), weights, "fp32").classify(hidden, bounds)
    means = torch.stack([part.mean(0) for part in hidden.split([4, 1, 4])])
    torch.testing.assert_close(pooled, head(means))
    with pytest.raises(ValueError, match=r"expected hidden \[T, 32\]"):
        head.classify(hidden[:, :31], bounds)
    with pytest.raises(RuntimeError, match="sequence 1 has no tokens"):
        head.classify(hidden, reference.cu_seqlens([4, 0, 5]))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_save_and_load(generator: torch.Generator, tmp_path: Path, dtype: torch_ext.encoder.Dtype) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator), dtype)
    head = Head(HEAD, make_weights(HEAD, generator), dtype)
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(b"")
    mode = path.stat().st_mode
    path.unlink()
    encoder.save(path, head)
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder.safetensors"]
    assert path.stat().st_mode == mode
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


def test_saving_leaves_the_umask_alone(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to the process: another thread's files would be open to everybody meanwhile."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask of the process was set"))
    Encoder(SPEC, make_weights(SPEC, generator)).save(tmp_path / "encoder.safetensors")


def test_files_from_before_a_field_existed_mean_bert(generator: torch.Generator, tmp_path: Path) -> None:
    encoder, head = Encoder(SPEC, make_weights(SPEC, generator)), Head(HEAD, make_weights(HEAD, generator))
    path = tmp_path / "encoder.safetensors"
    names = (
        *("architecture", "hidden_size", "num_layers", "num_heads", "intermediate_size", "activation"),
        *("max_positions", "position_offset", "layer_norm_eps", "vocab_size", "type_vocab_size"),
    )
    old_encoder = json.dumps({name: getattr(SPEC, name) for name in names})
    names = ("task", "hidden_size", "activation", "norm", "layer_norm_eps", "num_outputs")
    old_head = json.dumps({name: getattr(HEAD, name) for name in names})
    metadata = {"format": "torch-ext-encoder", "format_version": "1", "dtype": "bf16"}
    save_file({**encoder.weights(), **head.weights()}, path, {**metadata, "encoder": old_encoder, "head": old_head})
    assert Encoder.load(path).spec == SPEC
    loaded = Head.load(path)
    assert loaded is not None
    assert loaded.spec == HEAD


@pytest.mark.parametrize("architecture", ["roberta", "xlm-roberta", "camembert", "mpnet"])
def test_files_from_before_padding_was_told_apart_know_it(
    generator: torch.Generator, tmp_path: Path, architecture: str
) -> None:
    spec = dataclasses.replace(SPEC, architecture=architecture, position_offset=2, padding_id=1)
    encoder = Encoder(spec, make_weights(spec, generator))
    fields = dataclasses.asdict(spec)
    del fields["padding_id"]
    metadata = {"format": "torch-ext-encoder", "format_version": "1", "dtype": "bf16", "encoder": json.dumps(fields)}
    save_file(encoder.weights(), tmp_path / "old", metadata)
    assert Encoder.load(tmp_path / "old").spec == spec
    # What says that it counts all tokens does so.
    counting = Encoder(dataclasses.replace(spec, padding_id=-1), encoder.weights())
    counting.save(tmp_path / "new")
    assert Encoder.load(tmp_path / "new").spec == counting.spec


@pytest.mark.anywhere
def test_padding_is_not_counted_wherever_threads_begin(generator: torch.Generator) -> None:
    """Threads start in the middle of texts and of batches in several groups."""
    spec = dataclasses.replace(SPEC, hidden_size=512, num_layers=1, max_positions=400, position_offset=5, padding_id=4)
    encoder = Encoder(spec, make_weights(spec, generator))
    lengths = [400, 1, 0, 37, 399, 2, 300]
    bounds = reference.cu_seqlens(lengths)
    ids = torch.randint(0, 8, (sum(lengths),), generator=generator)
    threads = torch.get_num_threads()
    expected = []
    for count in (1, 7):
        torch.set_num_threads(count)
        w = encoder._tensors
        tables = w["embeddings.word"], w["embeddings.position"], w["embeddings.token_type"]
        norm = w["embeddings.norm.weight"], w["embeddings.norm.bias"]
        arguments = (ids, bounds, None, *tables, *norm, 1e-12, 5, 4)
        reference.embed_layer_norm(*arguments).check(torch_ext.embed_layer_norm(*arguments), f"{count} threads")
        assert w["embeddings.position"].shape[0] == 405
        expected.append(torch_ext.encoder_forward(ids, bounds, None, encoder._packed))
    torch.set_num_threads(threads)
    assert cosine(*expected) > 0.9999


def test_save_errors(generator: torch.Generator, tmp_path: Path) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator))
    other = dataclasses.replace(HEAD, hidden_size=16)
    for head in (Head(other, make_weights(other, generator)), Head(HEAD, make_weights(HEAD, generator), "fp32")):
        with pytest.raises(ValueError, match="expected a head of hidden_size=32, bf16"):
            encoder.save(tmp_path / "a.safetensors", head)
    with pytest.raises(TypeError, match=r"expected a torch_ext\.Head, got str"):
        encoder.save(tmp_path / "a.safetensors", "fill-mask")
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
    unknown = json.dumps({**dataclasses.asdict(SPEC), "experts": 8, "a": 1})
    fails(r"does not know its fields \['a', 'experts'\]: update torch-ext", {**fields, "encoder": unknown})
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


@pytest.mark.anywhere
def test_loading_needs_torch_and_safetensors_only(generator: torch.Generator, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    Encoder(SPEC, make_weights(SPEC, generator)).save(path, Head(HEAD, make_weights(HEAD, generator)))
    program = (
        "import sys, torch_ext; torch_ext.Encoder.load(sys.argv[1]); torch_ext.Head.load(sys.argv[1]);"
        "print([name for name in ('transformers', 'tokenizers', 'onnxruntime', 'optimum') if name in sys.modules])"
    )
    result = warm.python("torch").run("-c", program, str(path), complete=False)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


@pytest.mark.compile
@pytest.mark.parametrize("spec", [SPEC, SPECS[-1], SPECS[-2]], ids=str)
def test_compiled_equals_eager(generator: torch.Generator, spec: EncoderSpec) -> None:
    encoder = Encoder(spec, make_weights(spec, generator))
    compiled = torch.compile(lambda *arguments: encoder(*arguments), fullgraph=True)
    ids, bounds, types = batch(generator)
    arguments = (ids, bounds, types if spec.type_vocab_size else None)
    with torch.no_grad():
        assert cosine(compiled(*arguments), encoder(*arguments)) > 0.9999
