"""varlen_attention."""

from __future__ import annotations

import pytest
import torch

import torch_ext
from tests.ops import reference

FLOATS = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("lengths", "heads", "size"),
    [
        ([1], 1, 1),
        ([1], 2, 64),
        ([2, 1, 3], 3, 32),
        ([5, 7, 8, 9, 11, 12, 13], 2, 32),
        ([31, 33], 12, 64),
        ([4, 17], 2, 7),
        ([16, 3], 1, 96),
        ([129, 1], 2, 32),
        ([0, 3, 0, 2, 0], 2, 16),
        ([1] * 40, 4, 8),
    ],
)
def test_shapes(generator: torch.Generator, dtype: torch.dtype, lengths: list[int], heads: int, size: int) -> None:
    qkv = torch.randn(sum(lengths), 3 * heads * size, generator=generator).to(dtype)
    bounds = reference.cu_seqlens(lengths)
    actual = torch_ext.varlen_attention(qkv, bounds, heads)
    assert actual.dtype == dtype
    reference.attention(qkv, bounds, heads).check(actual, f"{lengths} heads {heads} size {size}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [0.5, 2.0, 1e-3])
def test_scale(generator: torch.Generator, dtype: torch.dtype, scale: float) -> None:
    qkv = torch.randn(21, 3 * 32, generator=generator).to(dtype)
    bounds = reference.cu_seqlens([9, 12])
    actual = torch_ext.varlen_attention(qkv, bounds, 2, scale)
    reference.attention(qkv, bounds, 2, scale).check(actual, f"scale {scale}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_scores_do_not_overflow(generator: torch.Generator, dtype: torch.dtype) -> None:
    qkv = torch.randn(20, 3 * 64, generator=generator)
    qkv[:, :128] *= 60
    actual = torch_ext.varlen_attention(qkv.to(dtype), reference.cu_seqlens([20]), 1)
    reference.attention(qkv.to(dtype), reference.cu_seqlens([20]), 1).check(actual, "large scores")


def test_sequences_do_not_see_each_other(generator: torch.Generator) -> None:
    qkv = torch.randn(30, 3 * 32, generator=generator).bfloat16()
    together = torch_ext.varlen_attention(qkv, reference.cu_seqlens([10, 20]), 2)
    changed = qkv.clone()
    changed[10:] = float("nan")
    assert torch.equal(torch_ext.varlen_attention(changed, reference.cu_seqlens([10, 20]), 2)[:10], together[:10])


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_input_and_no_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    base = torch.randn(14, 100, generator=generator).to(dtype)
    bounds = reference.cu_seqlens([6, 8])
    for qkv in (base[:, 2:98], torch.randn(96, 14, generator=generator).to(dtype).T):
        reference.attention(qkv, bounds, 2).check(torch_ext.varlen_attention(qkv, bounds, 2), str(qkv.stride()))
    for lengths in ([], [0], [0, 0]):
        assert torch_ext.varlen_attention(base[:0, :96], reference.cu_seqlens(lengths), 2).shape == (0, 32)


def test_threads_agree(generator: torch.Generator) -> None:
    lengths = [40, 1, 7, 90, 33]
    qkv = torch.randn(sum(lengths), 3 * 96, generator=generator).bfloat16()
    expected = reference.attention(qkv, reference.cu_seqlens(lengths), 3)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        expected.check(torch_ext.varlen_attention(qkv, reference.cu_seqlens(lengths), 3), f"{threads} threads")


def test_errors() -> None:
    qkv, bounds = torch.ones(5, 96), reference.cu_seqlens([2, 3])
    for match, arguments in (
        ("multiple of num_heads=5", (qkv, bounds, 5)),
        ("num_heads=0", (qkv, bounds, 0)),
        (r"expected qkv", (torch.ones(96), bounds, 2)),
        ("fp32 or bf16, got fp16", (qkv.half(), bounds, 2)),
        ("cu_seqlens i32", (qkv, bounds.long(), 2)),
        ("cu_seqlens i32", (qkv, bounds.unsqueeze(0), 2)),
        ("cu_seqlens i32", (qkv, bounds[:0], 2)),
        ("start at 0, got 1", (qkv, torch.tensor([1, 5], dtype=torch.int32), 2)),
        ("do not decrease, got 4 before 2", (qkv, torch.tensor([0, 4, 2, 5], dtype=torch.int32), 2)),
        ("number of tokens, 5, got 4", (qkv, torch.tensor([0, 4], dtype=torch.int32), 2)),
        ("number of tokens, 5, got 6", (qkv, torch.tensor([0, 6], dtype=torch.int32), 2)),
        ("scale > 0", (qkv, bounds, 2, 0.0)),
        ("qkv requires grad", (qkv.clone().requires_grad_(), bounds, 2)),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch_ext.varlen_attention(*arguments)
