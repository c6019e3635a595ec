"""matmul, bmm, addmm, and weights that are packed from [K, N]."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import torch_ext
from tests.ops import reference
from tests.ops.test_linear import BERT, EDGES_K, EDGES_M, EDGES_N

FLOATS = (torch.float32, torch.bfloat16)
BF16 = torch.bfloat16


def rand(generator: torch.Generator, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def check(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> None:
    actual = torch_ext.matmul(a, b, out_dtype)
    assert actual.dtype == (out_dtype or a.dtype)
    assert actual.is_contiguous()
    assert actual.shape == torch.matmul(a.float(), b.float()).shape
    what = f"{a.dtype} {list(a.shape)} {a.stride()} @ {list(b.shape)} {b.stride()}"
    reference.addmm(None, a, b, out_dtype=out_dtype).check(actual, what)


def shapes() -> list[tuple[int, int, int]]:
    edges = [(m, 33, 25) for m in EDGES_M] + [(9, k, 13) for k in EDGES_K] + [(5, 37, n) for n in EDGES_N]
    few = itertools.product((1, 2, 3, 4), (1, 4, 7, 8, 9, 41), (1, 3, 4, 17, 33))
    return [*edges, *few, *itertools.product((3, 8), (1, 4, 6), (1, 12, 14)), *BERT]


@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes(generator: torch.Generator, dtype: torch.dtype) -> None:
    for m, k, n in shapes():
        a, b = rand(generator, m, k, dtype=dtype), rand(generator, k, n, dtype=dtype)
        check(a, b)
        check(a, b.T.contiguous().T)  # [N, K] in memory


@pytest.mark.parametrize(("dtype", "out"), [*itertools.product(FLOATS, FLOATS)])
def test_out_dtype(generator: torch.Generator, dtype: torch.dtype, out: torch.dtype) -> None:
    for m, k, n in ((1, 20, 30), (9, 64, 37)):
        check(rand(generator, m, k, dtype=dtype), rand(generator, k, n, dtype=dtype), out)


@pytest.mark.parametrize("rows", [1, 3, 13])
def test_strides(generator: torch.Generator, rows: int) -> None:
    base = rand(generator, 60, 60)
    lefts = (
        base[:rows, :20],
        base[:20, :rows].T,  # rows are not adjacent
        base[5 : 5 + rows, 7:27],  # offset
        base[::3, 1:21][:rows],
        base[:, ::2][:rows, :20],
        base[:1, :20].expand(rows, 20),  # stride 0
        base[:rows, :1].expand(rows, 20),
    )
    rights = (
        base[:20, 3:40],
        base[3:40, 5:25].T,
        base[::3, :31],
        base[:31, ::3].T,
        base[1::2, ::2][:20],  # neither rows nor columns are adjacent
        base[:1, :31].expand(20, 31),
        base[:20, :1].expand(20, 31),
        base[:1, :1].expand(20, 31),
    )
    for a, b in itertools.product(lefts, rights):
        check(a, b)


def test_vectors(generator: torch.Generator) -> None:
    for k, n in ((1, 1), (7, 5), (64, 37)):
        vector, long = rand(generator, k), rand(generator, 3 * k)[::3]
        matrix, batch = rand(generator, k, n), rand(generator, 2, 3, k, n)
        for a, b in (
            (vector, vector),
            (vector, long),
            (vector, matrix),
            (long, matrix.T.contiguous().T),
            (matrix.T, long),
            (vector, batch),
            (batch.transpose(-1, -2), long),
        ):
            check(a, b)


BATCHES = (
    ((3,), (3,)),
    ((7,), (7,)),
    ((2, 3), (2, 3)),
    ((2, 3), ()),
    ((), (2, 3)),
    ((2, 1), (1, 3)),
    ((1, 3), (2, 1)),
    ((3,), (2, 3)),
    ((2, 3), (3,)),
    ((2, 3), (1, 1)),
    ((4, 1, 3), (2, 1)),
)


@pytest.mark.parametrize("size", [(1, 20, 30), (5, 17, 13), (9, 8, 24), (40, 64, 48)])
def test_batches(generator: torch.Generator, size: tuple[int, int, int]) -> None:
    m, k, n = size
    for left, right in BATCHES:
        a, b = rand(generator, *left, m, k), rand(generator, *right, k, n)
        check(a, b)
        check(a.transpose(-1, -2).contiguous().transpose(-1, -2), b.transpose(-1, -2).contiguous().transpose(-1, -2))


def test_batches_of_views(generator: torch.Generator) -> None:
    # Heads of attention: [B, S, heads, size] -> [B, heads, S, size].
    query, key, value = rand(generator, 3, 2, 11, 4, 8).permute(0, 1, 3, 2, 4)
    check(query, key.transpose(-1, -2))
    check(torch.softmax(query @ key.transpose(-1, -2), -1), value)
    # A batch that is the same matrix again and again, rows that are equally far apart, and rows that are not.
    matrix = rand(generator, 8, 13)
    check(query, matrix.expand(2, 4, 8, 13))
    check(rand(generator, 2, 5, 16)[..., :8], matrix)
    check(rand(generator, 3, 7, 8)[:, 1:6], matrix)
    check(rand(generator, 5, 8).expand(3, 5, 8), matrix)
    check(rand(generator, 3, 1, 16)[..., 8:], matrix)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(generator: torch.Generator, threads: int) -> None:
    """Every way to split the work: rows, panels, batches, right-hand sides too large for a thread's own memory."""
    torch.set_num_threads(threads)
    for left, right in (
        ((1, 700), (700, 400)),
        ((4, 300), (300, 200)),
        ((67, 96), (96, 250)),
        ((200, 40), (40, 9)),
        ((9, 640), (640, 420)),
        ((2, 60, 96), (2, 96, 100)),
        ((3, 40, 64), (3, 64, 100)),
        ((9, 20, 64), (9, 64, 50)),
        ((3, 5, 20, 64), (3, 1, 64, 50)),
        ((3, 5, 1, 96), (3, 1, 96, 300)),
        ((2, 3, 5, 640), (3, 640, 420)),
        ((3, 7, 640), (3, 640, 420)),
    ):
        check(rand(generator, *left), rand(generator, *right))


@pytest.mark.parametrize("dtype", FLOATS)
def test_empty(dtype: torch.dtype) -> None:
    for left, right in (
        ((0, 5), (5, 7)),
        ((3, 5), (5, 0)),
        ((3, 0), (0, 7)),
        ((0,), (0,)),
        ((0,), (0, 7)),
        ((3, 0), (0,)),
        ((0, 0), (0, 0)),
        ((0, 3, 5), (0, 5, 7)),
        ((0, 3, 5), (5, 7)),
        ((2, 3, 0), (1, 0, 7)),
        ((1, 3, 5), (0, 5, 7)),
    ):
        a, b = torch.ones(left, dtype=dtype), torch.ones(right, dtype=dtype)
        actual = torch_ext.matmul(a, b)
        assert actual.dtype == dtype
        assert torch.equal(actual, torch.matmul(a, b))


def test_bmm(generator: torch.Generator) -> None:
    for count, m, k, n in ((1, 3, 4, 5), (3, 13, 24, 12), (4, 1, 9, 8), (24, 16, 64, 16)):
        a, b = rand(generator, count, m, k), rand(generator, count, k, n)
        for right in (b, b.transpose(1, 2).contiguous().transpose(1, 2), b[:1].expand(count, k, n)):
            reference.addmm(None, a, right).check(torch_ext.bmm(a, right), f"{count}x{m}x{k}x{n}")
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0), (2, 3, 0, 5)):
        count, m, k, n = shape
        a, b = torch.ones(count, m, k, dtype=BF16), torch.ones(count, k, n, dtype=BF16)
        assert torch.equal(torch_ext.bmm(a, b), torch.zeros(count, m, n, dtype=BF16))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 1), (1, -2), (0.25, 3), (0, 1), (0, 0.5), (1, 0), (0, 0)])
def test_addmm(generator: torch.Generator, dtype: torch.dtype, beta: float, alpha: float) -> None:
    for m, k, n in ((1, 7, 30), (5, 33, 13), (64, 96, 50), (3, 0, 5)):
        a, b = rand(generator, m, k, dtype=dtype), rand(generator, k, n, dtype=dtype)
        wide = rand(generator, 70, 70, dtype=dtype)
        for bias in (
            wide[0, :n],
            wide[:m, :n],
            wide[:n, :m].T,
            wide[:1, :n],
            wide[:m, :1],
            wide[0, 0],
            wide[0, :1],
            wide[:1, :n].expand(m, n),
            wide[0, ::2][:n] if n <= 30 else wide[1, :n],
        ):
            actual = torch_ext.addmm(bias, a, b, beta, alpha)
            assert actual.dtype == dtype
            what = f"{m}x{k}x{n} bias {list(bias.shape)} {bias.stride()}"
            reference.addmm(bias, a, b, beta, alpha).check(actual, what)
    for m, n in ((0, 5), (5, 0)):
        empty = torch_ext.addmm(
            torch.ones(n, dtype=dtype), torch.ones(m, 3, dtype=dtype), torch.ones(3, n, dtype=dtype)
        )
        assert empty.shape == (m, n)


def test_addmm_does_not_read_the_bias_at_beta_0() -> None:
    bias = torch.full((13,), float("nan")).bfloat16()
    for m in (1, 9):
        for k in (8, 0):
            actual = torch_ext.addmm(bias, torch.ones(m, k, dtype=BF16), torch.ones(k, 13, dtype=BF16), beta=0)
            assert torch.equal(actual, torch.full((m, 13), float(k), dtype=BF16))


@pytest.mark.parametrize("rows", [1, 9])
def test_nan_and_infinity_stay_where_they_belong(rows: int) -> None:
    a, b = torch.ones(rows, 16).bfloat16(), torch.ones(16, 13).bfloat16()
    b[3, 5], b[15, 12] = float("nan"), float("inf")
    for right in (b, b.T.contiguous().T):
        actual = torch_ext.matmul(a, right)
        assert actual[:, 5].isnan().all()
        assert (actual[:, 12] == float("inf")).all()
        assert (actual[:, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]] == 16).all()


def test_operands_are_left_alone(generator: torch.Generator) -> None:
    operands = [rand(generator, 13), rand(generator, 9, 20), rand(generator, 20, 13)]
    before = [operand.clone() for operand in operands]
    torch_ext.addmm(*operands, 0.5, 2)
    torch_ext.matmul(*operands[1:])
    assert all(torch.equal(a, b) for a, b in zip(before, operands, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_are_packed_from_either_order(generator: torch.Generator, dtype: torch.dtype) -> None:
    for k, n in [*itertools.product(EDGES_K, EDGES_N), (384, 1152), (1536, 97)]:
        weight = torch.randn(k, n, generator=generator).to(dtype)
        expected = weight.T.bfloat16()
        for packed in (
            torch_ext.pack_linear_weight(weight, transposed=True),
            torch_ext.pack_linear_weight(weight.T),
            torch_ext.pack_linear_weight(weight.T.contiguous().T, transposed=True),
        ):
            assert packed.shape[0] == n
            assert torch.equal(torch_ext.unpack_linear_weight(packed), expected), (k, n)
    wide = torch.randn(40, 60, generator=generator).to(dtype)
    for weight in (wide[:, 3:50], wide[::2], wide[:, ::3], wide[1:2, :30].expand(7, 30), wide[:30, 1:2].expand(30, 7)):
        unpacked = torch_ext.unpack_linear_weight(torch_ext.pack_linear_weight(weight, transposed=True))
        assert torch.equal(unpacked, weight.T.bfloat16())


def test_packed_from_either_order_is_the_same_layer(generator: torch.Generator) -> None:
    x, weight, bias = rand(generator, 5, 24), rand(generator, 24, 13), rand(generator, 13)
    actual = torch_ext.linear(x, torch_ext.pack_linear_weight(weight, transposed=True), bias)
    reference.linear(x, weight.T, bias).check(actual, "transposed")


def test_pack_errors_name_the_order() -> None:
    for weight in (torch.ones(3), torch.ones(0, 4), torch.ones(4, 0)):
        with pytest.raises(RuntimeError, match=r"expected weight \[K, N\] with N and K at least 1"):
            torch_ext.pack_linear_weight(weight, transposed=True)


def test_errors() -> None:
    a, b, bias = (torch.ones(shape, dtype=BF16) for shape in ((3, 20), (20, 7), (7,)))
    matmul, bmm, addmm = torch_ext.matmul, torch_ext.bmm, torch_ext.addmm
    for match, call in (
        (
            r"matmul: expected b with K=20, .*got bf16 \[3, 20\] and bf16 \[21, 7\]",
            lambda: matmul(a, b.new_ones(21, 7)),
        ),
        ("matmul: expected b with K=20", lambda: matmul(a, bias)),
        (r"matmul: expected a \[..., M, K\]", lambda: matmul(a, torch.tensor(1, dtype=BF16))),
        (r"matmul: expected a \[..., M, K\]", lambda: matmul(torch.tensor(1, dtype=BF16), b)),
        ("matmul: expected batch dimensions", lambda: matmul(a.expand(2, 3, 20), b.expand(3, 20, 7))),
        ("matmul: expected a in fp32 or bf16, got fp16", lambda: matmul(a.half(), b.half())),
        ("matmul: expected b in fp32 or bf16, got i64", lambda: matmul(a, b.long())),
        (r"one dtype, got bf16 \[3, 20\] and fp32 \[20, 7\]; convert", lambda: matmul(a, b.float())),
        ("expected out_dtype", lambda: matmul(a, b, torch.float16)),
        (r"bmm: expected a \[B, M, K\] and b \[B, K, N\]", lambda: bmm(a, b)),
        ("bmm: expected a", lambda: bmm(a.expand(2, 3, 20), b.expand(3, 20, 7))),
        ("bmm: expected a", lambda: bmm(a.expand(2, 3, 20), b.new_ones(2, 21, 7))),
        (r"addmm: expected a \[M, K\] and b \[K, N\]", lambda: addmm(bias, a, bias)),
        ("addmm: expected a", lambda: addmm(bias, a, b.T)),
        (r"addmm: expected bias that broadcasts to \[3, 7\], got bf16 \[8\]", lambda: addmm(bias.new_ones(8), a, b)),
        ("addmm: expected bias that broadcasts", lambda: addmm(bias.new_ones(2, 7), a, b)),
        ("addmm: expected bias that broadcasts", lambda: addmm(bias.new_ones(1, 3, 7), a, b)),
        ("addmm: expected bias of the dtype of a and b", lambda: addmm(bias.float(), a, b)),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()


def test_what_is_no_dense_tensor_is_refused() -> None:
    a, b = torch.ones(3, 20), torch.ones(20, 7)
    packed = torch_ext.pack_linear_weight(b.T)
    for error, match, call in (
        (TypeError, "matmul: expected a torch.Tensor, got list", lambda: torch_ext.matmul(a, [1.0])),
        (TypeError, "matmul: expected a torch.Tensor, got NoneType", lambda: torch_ext.matmul(None, None)),
        (TypeError, "linear: expected a torch.Tensor, got NoneType", lambda: torch_ext.linear(a, None)),
        (TypeError, "linear: expected a torch.Tensor, got int", lambda: torch_ext.linear(a, packed, 1)),
        (TypeError, "pool: expected the name of a mode, got NoneType", lambda: torch_ext.pool(a, a, None)),
        (TypeError, "pool: expected a torch.Tensor, got list", lambda: torch_ext.pool(a, [0, 3])),
        (TypeError, "varlen_attention: .* got list", lambda: torch_ext.varlen_attention(a, [0, 3], 1)),
        (TypeError, "encoder_forward: .* got list", lambda: torch_ext.encoder_forward([1], [0, 1], None, packed)),
        (RuntimeError, "matmul: .* neither sparse nor nested", lambda: torch_ext.matmul(a.to_sparse(), b)),
        (RuntimeError, "addmm: .* neither sparse nor nested", lambda: torch_ext.addmm(b[0], a, b.to_sparse())),
    ):
        with pytest.raises(error, match=match):
            call()


def test_gradients_are_refused() -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=BF16, requires_grad=True)

    a, b = torch.ones(3, 20, dtype=BF16), torch.ones(20, 7, dtype=BF16)
    for match, call in (
        ("matmul: a requires grad.*no_grad", lambda: torch_ext.matmul(leaf(3, 20), b)),
        ("matmul: b requires grad", lambda: torch_ext.matmul(a, leaf(20, 7) * 2)),
        ("bmm: b requires grad", lambda: torch_ext.bmm(a[None], leaf(1, 20, 7))),
        ("addmm: bias requires grad", lambda: torch_ext.addmm(leaf(7), a, b)),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not torch_ext.addmm(leaf(7), leaf(3, 20), leaf(20, 7)).requires_grad


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_function_equals_eager(generator: torch.Generator, dynamic: bool) -> None:
    weight, bias = rand(generator, 24, 13), rand(generator, 13)

    def function(x: Tensor) -> Tensor:
        wide = torch_ext.addmm(bias, x * 2, weight)
        batch = wide.unsqueeze(0).expand(2, -1, -1)
        scores = torch_ext.bmm(batch, batch.transpose(1, 2))
        return torch_ext.matmul(scores, wide, torch.float32).sum(0) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for rows in (5, 9, 13):
        x = rand(generator, rows, 24) / 8
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-5, atol=1e-5)
