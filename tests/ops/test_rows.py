"""add_layer_norm, add_rms_norm, rotary_embedding, gate, embed_layer_norm, pool."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

import torch_ext
from tests.ops import reference

FLOATS = (torch.float32, torch.bfloat16)
# Under emulation, fewer: tests/csrc runs the same kernels there with every width.
EMULATED = "QEMU_CPU" in os.environ
WIDTHS = (1, 3, 8, 17, 127, 384) if EMULATED else (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64, 127, 384, 768)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_layer_norm(generator: torch.Generator, dtype: torch.dtype, with_residual: bool) -> None:
    for rows, width, offset in [*((3, width, 0.0) for width in WIDTHS), (0, 8, 0.0), (1, 384, 0.0), (9, 384, 30.0)]:
        x = (torch.randn(rows, width, generator=generator) + offset).to(dtype)
        residual = torch.randn(rows, width, generator=generator).to(dtype) if with_residual else None
        weight, bias = torch.randn(width, generator=generator), torch.randn(width, generator=generator)
        actual = torch_ext.add_layer_norm(x, residual, weight, bias, 1e-5)
        assert actual.dtype == dtype
        reference.add_layer_norm(x, residual, weight, bias, 1e-5).check(actual, f"{rows}x{width}+{offset}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_add_layer_norm_with_a_scaled_residual(generator: torch.Generator, dtype: torch.dtype) -> None:
    for rows, width in [*((3, width) for width in WIDTHS), (0, 8), (300, 384), (2, 2051)]:
        x, residual = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
        weight, bias, scale = (torch.randn(width, generator=generator) for _ in range(3))
        actual = torch_ext.add_layer_norm(x, residual, weight, bias, 1e-5, scale)
        assert actual.dtype == dtype
        reference.add_layer_norm(x, residual, weight, bias, 1e-5, scale).check(actual, f"{rows}x{width}")


def test_add_layer_norm_strided(generator: torch.Generator) -> None:
    base = torch.randn(40, 90, generator=generator)
    weight, bias = torch.randn(80, generator=generator)[::2], torch.randn(40, generator=generator)
    x, residual = base.T[:50], base.T[40:]
    actual = torch_ext.add_layer_norm(x, residual, weight, bias, 1e-12)
    reference.add_layer_norm(x, residual, weight, bias, 1e-12).check(actual, "strided")


def test_constant_rows() -> None:
    weight, bias = torch.full((16,), 2.0), torch.full((16,), 3.0)
    assert torch.equal(torch_ext.add_layer_norm(torch.full((2, 16), 7.0), None, weight, bias, 1e-5), bias.expand(2, 16))


def test_add_layer_norm_errors() -> None:
    x, ones = torch.ones(3, 8), torch.ones(8)
    for match, arguments in (
        (r"expected x \[T, H\]", (ones, None, ones, ones)),
        ("expected weight", (x, None, torch.ones(7), ones)),
        ("expected bias", (x, None, ones, torch.ones(9))),
        ("expected residual like x", (x, torch.ones(3, 7), ones, ones)),
        ("expected residual like x", (x, x.bfloat16(), ones, ones)),
        ("fp32 or bf16, got fp64", (x.double(), None, ones, ones)),
        ("x requires grad", (x.clone().requires_grad_(), None, ones, ones)),
        ("weight requires grad", (x, None, ones.clone().requires_grad_(), ones)),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch_ext.add_layer_norm(*arguments, 1e-5)
    for match, residual, scale in (
        ("expected a residual for residual_scale, got none", None, ones),
        (r"expected residual_scale of shape \[8\], got fp32 \[7\]", x, torch.ones(7)),
        ("residual_scale requires grad", x, ones.clone().requires_grad_()),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch_ext.add_layer_norm(x, residual, ones, ones, 1e-5, scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_rms_norm(generator: torch.Generator, dtype: torch.dtype, with_residual: bool) -> None:
    for rows, width, offset in [*((3, width, 0.0) for width in WIDTHS), (0, 8, 0.0), (1, 384, 0.0), (9, 384, 30.0)]:
        x = (torch.randn(rows, width, generator=generator) + offset).to(dtype)
        residual = torch.randn(rows, width, generator=generator).to(dtype) if with_residual else None
        weight = torch.randn(width, generator=generator)
        actual = torch_ext.add_rms_norm(x, residual, weight, 1e-5)
        assert actual.dtype == dtype
        reference.add_rms_norm(x, residual, weight, 1e-5).check(actual, f"{rows}x{width}+{offset}")


def test_add_rms_norm_errors() -> None:
    x, ones = torch.ones(3, 8), torch.ones(8)
    for match, arguments in (
        (r"add_rms_norm: expected x \[T, H\]", (ones, None, ones)),
        ("expected weight", (x, None, torch.ones(7))),
        ("expected residual like x", (x, x.bfloat16(), ones)),
        ("fp32 or bf16, got fp64", (x.double(), None, ones)),
        ("weight requires grad", (x, None, ones.clone().requires_grad_())),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch_ext.add_rms_norm(*arguments, 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rotary_embedding(generator: torch.Generator, dtype: torch.dtype) -> None:
    for heads, size, lengths in itertools.product(
        (1, 3), (2, 6, 8, 30, 32, 34, 64, 66), ([1], [3, 20, 0, 1, 18], [0], [])
    ):
        tokens, bounds = sum(lengths), reference.cu_seqlens(lengths)
        qkv = torch.randn(tokens, 3 * heads * size, generator=generator).to(dtype)
        angles = 100 * torch.randn(20, size // 2, generator=generator)
        table = torch.cat((angles.cos(), angles.sin()), 1)
        actual = torch_ext.rotary_embedding(qkv, bounds, heads, table)
        assert actual.dtype == dtype
        assert torch.equal(actual[:, 2 * heads * size :], qkv[:, 2 * heads * size :])
        reference.rotary_embedding(qkv, bounds, heads, table).check(actual, f"{heads}x{size} {lengths}")


def test_rotary_embedding_strided(generator: torch.Generator) -> None:
    qkv, bounds = torch.randn(24, 9, generator=generator).T, reference.cu_seqlens([4, 5])
    table = torch.randn(4, 10, generator=generator).T[:, :4]
    actual = torch_ext.rotary_embedding(qkv, bounds, 2, table)
    reference.rotary_embedding(qkv, bounds, 2, table).check(actual, "strided")


def test_rotary_embedding_errors() -> None:
    qkv, bounds, table = torch.ones(5, 24), reference.cu_seqlens([2, 3]), torch.ones(3, 4)
    assert torch_ext.rotary_embedding(qkv, bounds, 2, table).shape == (5, 24)
    for match, arguments in (
        (r"expected qkv \[T, 3 \* H\] with H / num_heads even", (torch.ones(24), bounds, 2, table)),
        ("expected qkv", (qkv, bounds, 8, table)),
        ("expected qkv", (qkv, bounds, 0, table)),
        (r"expected cos_sin fp32 \[P, 4\], got fp32 \[3, 5\]", (qkv, bounds, 2, torch.ones(3, 5))),
        ("expected cos_sin fp32", (qkv, bounds, 2, table.bfloat16())),
        ("a sequence of 3 tokens is longer than the 2 positions", (qkv, bounds, 2, table[:2])),
        ("cu_seqlens to end", (qkv, reference.cu_seqlens([2, 2]), 2, table)),
        ("fp32 or bf16, got fp16", (qkv.half(), bounds, 2, table)),
        ("qkv requires grad", (qkv.clone().requires_grad_(), bounds, 2, table)),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch_ext.rotary_embedding(*arguments)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", torch_ext.ops.ACTIVATIONS)
def test_gate(generator: torch.Generator, dtype: torch.dtype, activation: torch_ext.ops.Activation) -> None:
    for rows, width in [*((3, width) for width in WIDTHS), (0, 8), (6 if EMULATED else 70, 1152)]:
        x = (4 * torch.randn(rows, 2 * width, generator=generator)).to(dtype)
        actual = torch_ext.gate(x, activation)
        assert actual.dtype == dtype
        reference.gate(x, activation).check(actual, f"{rows}x{width}")
    reference.gate(x.T, activation).check(torch_ext.gate(x.T, activation), "strided")


def test_gate_errors() -> None:
    x = torch.ones(3, 8)
    for match, arguments in (
        (r"expected x \[T, 2 \* I\], got fp32 \[3, 7\]", (x[:, :7], "gelu")),
        ("expected x", (x[0], "gelu")),
        ("expected x", (x[:, :0], "gelu")),
        ("gate: expected activation none, gelu.*got 'elu'", (x, "elu")),
        ("fp32 or bf16, got fp64", (x.double(), "gelu")),
        ("x requires grad", (x.clone().requires_grad_(), "gelu")),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch_ext.gate(*arguments)


def embedding(generator: torch.Generator, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "word": torch.randn(50, width, generator=generator).to(dtype),
        "position": torch.randn(20, width, generator=generator).to(dtype),
        "token_type": torch.randn(3, width, generator=generator).to(dtype),
        "weight": torch.randn(width, generator=generator),
        "bias": torch.randn(width, generator=generator),
    }


@pytest.mark.parametrize("dtype", FLOATS)
def test_embed_layer_norm(generator: torch.Generator, dtype: torch.dtype) -> None:
    for width, lengths, offset in itertools.product((1, 7, 33, 384), ([1], [3, 20, 0, 1, 18], [0], []), (0, 2)):
        if max(lengths, default=0) + offset > 20:
            lengths = [length - 2 if length > 2 else length for length in lengths]
        tensors = embedding(generator, width, dtype)
        tokens, bounds = sum(lengths), reference.cu_seqlens(lengths)
        ids = torch.randint(0, 50, (tokens,), generator=generator)
        types = torch.randint(0, 3, (tokens,), generator=generator)
        padding = -1
        if offset:
            padding = 7
            ids[torch.rand(tokens, generator=generator) < 0.3] = padding
        for token_type_ids, token_type in ((None, None), (None, tensors["token_type"]), (types, tensors["token_type"])):
            arguments = (ids, bounds, token_type_ids, tensors["word"], tensors["position"], token_type)
            arguments += (tensors["weight"], tensors["bias"], 1e-12, offset, padding)
            actual = torch_ext.embed_layer_norm(*arguments)
            assert actual.dtype == dtype
            reference.embed_layer_norm(*arguments).check(actual, f"{width} {lengths} {offset}")
            # Without a table of positions no sequence is too long.
            arguments = (ids, bounds, token_type_ids, tensors["word"], None, *arguments[5:])
            reference.embed_layer_norm(*arguments).check(torch_ext.embed_layer_norm(*arguments), "no positions")


def test_embed_layer_norm_errors(generator: torch.Generator) -> None:
    tensors = embedding(generator, 8, torch.float32)
    good = {
        "input_ids": torch.zeros(5, dtype=torch.int64),
        "cu_seqlens": reference.cu_seqlens([2, 3]),
        "token_type_ids": None,
        **tensors,
        "eps": 1e-5,
        "position_offset": 0,
    }
    assert torch_ext.embed_layer_norm(**good).shape == (5, 8)
    for match, change in (
        ("input_ids from 0 to 49, got 50 at 3", {"input_ids": torch.tensor([0, 0, 0, 50, 0])}),
        ("input_ids from 0 to 49, got -1 at 0", {"input_ids": torch.tensor([-1, 0, 0, 0, 0])}),
        ("input_ids i64", {"input_ids": torch.zeros(5, dtype=torch.int32)}),
        ("input_ids i64", {"input_ids": torch.zeros(1, 5, dtype=torch.int64)}),
        ("token_type_ids from 0 to 2, got 3", {"token_type_ids": torch.tensor([0, 0, 0, 0, 3])}),
        ("token_type_ids i64", {"token_type_ids": torch.zeros(4, dtype=torch.int64)}),
        ("no token types", {"token_type_ids": torch.zeros(5, dtype=torch.int64), "token_type": None}),
        ("truncate it", {"position": tensors["position"][:2]}),
        ("truncate it", {"position_offset": 18}),
        ("expected position_offset from 0 to the 20 rows", {"position_offset": -1}),
        ("expected position_offset from 0 to the 20 rows", {"position_offset": 2**62}),
        ("expected padding_id -1, or an id and position_offset of at least 1", {"padding_id": 0}),
        ("expected padding_id -1, or an id and position_offset of at least 1", {"padding_id": -2}),
        ("position", {"position": torch.ones(20, 7)}),
        ("position", {"position": tensors["position"].bfloat16()}),
        ("cu_seqlens to end", {"cu_seqlens": reference.cu_seqlens([2, 2])}),
        ("fp32 or bf16", {"word": tensors["word"].half()}),
        ("word requires grad", {"word": tensors["word"].clone().requires_grad_()}),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch_ext.embed_layer_norm(**{**good, **change})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", torch_ext.ops.POOLING_MODES)
@pytest.mark.parametrize("normalize", [False, True])
def test_pool(generator: torch.Generator, dtype: torch.dtype, mode: str, normalize: bool) -> None:
    for width, lengths in itertools.product((1, 3, 16, 17, 384), ([1], [5, 1, 200, 7], [])):
        hidden = torch.randn(sum(lengths), width, generator=generator).to(dtype)
        bounds = reference.cu_seqlens(lengths)
        actual = torch_ext.pool(hidden, bounds, mode, normalize)
        assert actual.dtype == torch.float32
        reference.pool(hidden, bounds, mode, normalize).check(actual, f"{width} {lengths}")


def test_pool_strided_and_zero(generator: torch.Generator) -> None:
    hidden = torch.randn(16, 9, generator=generator).T
    bounds = reference.cu_seqlens([4, 5])
    reference.pool(hidden, bounds, "mean", True).check(torch_ext.pool(hidden, bounds, "mean", True), "strided")
    # As torch.nn.functional.normalize does: no NaN from a zero vector.
    assert torch.equal(torch_ext.pool(torch.zeros(9, 16), bounds, "mean", True), torch.zeros(2, 16))
    # Unlike it: a vector whose length is more than fp32 holds does not become zeros.
    wide = torch.full((2, 4), 1e30)
    assert torch_ext.pool(wide, reference.cu_seqlens([2]), "mean", True).isnan().all()


def test_pool_max_of_negative_numbers() -> None:
    assert (torch_ext.pool(torch.full((3, 4), -5.0), reference.cu_seqlens([3]), "max") == -5).all()


def test_pool_errors() -> None:
    hidden, bounds = torch.ones(5, 8), reference.cu_seqlens([2, 3])
    for match, arguments in (
        ("expected mode one of mean, cls, max, lasttoken, weightedmean, .*; got 'sum'", (hidden, bounds, "sum")),
        ("sequence 1 has no tokens", (hidden, reference.cu_seqlens([2, 0, 3]))),
        (r"expected hidden \[T, H\]", (torch.ones(5), bounds)),
        ("fp32 or bf16, got fp16", (hidden.half(), bounds)),
        ("cu_seqlens to end", (hidden, reference.cu_seqlens([2, 2]))),
        ("hidden requires grad", (hidden.clone().requires_grad_(), bounds)),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch_ext.pool(*arguments)
