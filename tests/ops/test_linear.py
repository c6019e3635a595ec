"""pack_linear_weight, unpack_linear_weight, linear."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import torch_ext
from tests.ops import reference

FLOATS = (torch.float32, torch.bfloat16)

# Around the tiles of 1, 2, 4, 8 rows and 12 columns and the k-steps of 4, primes, and layers of BERT.
EDGES_M = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 31, 33)
EDGES_N = (1, 2, 3, 7, 11, 12, 13, 23, 24, 25, 37)
EDGES_K = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 127)
BERT = ((16, 384, 1152), (1, 384, 384), (5, 384, 1536), (7, 1536, 384), (32, 768, 768), (3, 3072, 768), (2, 768, 3072))


def make(generator: torch.Generator, m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(m, k, generator=generator)
    weight = torch.randn(n, k, generator=generator)
    return x, weight, torch.randn(n, generator=generator), torch.randn(m, n, generator=generator)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unpack_gives_the_rounded_weight(generator: torch.Generator, dtype: torch.dtype) -> None:
    for n, k in [*itertools.product(EDGES_N, EDGES_K), (384, 384), (1152, 384), (97, 1536)]:
        weight = torch.randn(n, k, generator=generator).to(dtype)
        packed = torch_ext.pack_linear_weight(weight)
        assert packed.shape[0] == n
        unpacked = torch_ext.unpack_linear_weight(packed)
        assert unpacked.dtype == torch.bfloat16
        assert torch.equal(unpacked, weight.bfloat16()), (n, k)


def test_pack_rounds_to_nearest_even() -> None:
    weight = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20, 3.4e38, 1e-40, float("inf")]])
    assert torch.equal(torch_ext.unpack_linear_weight(torch_ext.pack_linear_weight(weight)), weight.bfloat16())


def test_pack_keeps_nan() -> None:
    weight = torch.ones(3, 5)
    weight[1, 2] = float("nan")
    unpacked = torch_ext.unpack_linear_weight(torch_ext.pack_linear_weight(weight))
    assert torch.equal(unpacked.isnan(), weight.isnan())


def test_pack_reads_any_strides(generator: torch.Generator) -> None:
    base = torch.randn(40, 60, generator=generator)
    for weight in (base.T, base[:, 3:50], base[::2], base[:, ::3], base.T[5:, 1:]):
        unpacked = torch_ext.unpack_linear_weight(torch_ext.pack_linear_weight(weight))
        assert torch.equal(unpacked, weight.bfloat16())


@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes(generator: torch.Generator, dtype: torch.dtype) -> None:
    shapes = [(m, 33, 25) for m in EDGES_M] + [(9, k, 13) for k in EDGES_K] + [(5, 37, n) for n in EDGES_N]
    shapes += itertools.product((1, 3, 8), (1, 4, 6), (1, 12, 14))
    for m, k, n in [*shapes, *BERT]:
        x, weight, bias, _ = make(generator, m, k, n)
        x = x.to(dtype)
        actual = torch_ext.linear(x, torch_ext.pack_linear_weight(weight), bias)
        assert actual.dtype == dtype
        reference.linear(x, weight, bias).check(actual, f"{m}x{k}x{n}")


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("dtype", FLOATS)
def test_epilogues(generator: torch.Generator, dtype: torch.dtype, activation: str) -> None:
    for m, k, n in ((1, 20, 30), (13, 64, 37)):
        x, weight, bias, residual = make(generator, m, k, n)
        x, packed = x.to(dtype), torch_ext.pack_linear_weight(weight / 4)
        for out, bias_dtype, residual_dtype in itertools.product((None, *FLOATS), (None, *FLOATS), (None, *FLOATS)):
            b = bias.to(bias_dtype) if bias_dtype else None
            r = residual.to(residual_dtype) if residual_dtype else None
            actual = torch_ext.linear(x, packed, b, activation, out, r)
            assert actual.dtype == (out or dtype)
            what = f"{m}x{k}x{n} {activation} out={out} bias={bias_dtype} residual={residual_dtype}"
            reference.linear(x, weight / 4, b, activation, out, r).check(actual, what)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations_at_the_ends(activation: str) -> None:
    values = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88, -88, 1e4, -1e4])])
    x = values.bfloat16().unsqueeze(1)
    actual = torch_ext.linear(x, torch_ext.pack_linear_weight(torch.ones(1, 1)), None, activation, torch.float32)
    reference.linear(x, torch.ones(1, 1), None, activation, torch.float32).check(actual, activation)


def test_leading_dimensions(generator: torch.Generator) -> None:
    _, weight, bias, _ = make(generator, 1, 24, 15)
    packed = torch_ext.pack_linear_weight(weight)
    for shape in ((24,), (3, 24), (2, 3, 24), (2, 1, 4, 24), (1, 1, 1, 24)):
        x = torch.randn(shape, generator=generator).bfloat16()
        residual = torch.randn(*shape[:-1], 15, generator=generator).bfloat16()
        actual = torch_ext.linear(x, packed, bias, "gelu", None, residual)
        reference.linear(x, weight, bias, "gelu", None, residual).check(actual, str(shape))


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_rows(dtype: torch.dtype) -> None:
    packed = torch_ext.pack_linear_weight(torch.ones(15, 24))
    for shape in ((0, 24), (2, 0, 24), (0, 3, 24)):
        actual = torch_ext.linear(torch.empty(shape, dtype=dtype), packed, torch.ones(15), "gelu", torch.float32)
        assert actual.shape == (*shape[:-1], 15)
        assert actual.dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_input(generator: torch.Generator, dtype: torch.dtype) -> None:
    weight = torch.randn(19, 20, generator=generator)
    packed = torch_ext.pack_linear_weight(weight)
    base = torch.randn(50, 50, generator=generator).to(dtype)
    residuals = torch.randn(19, 50, generator=generator).to(dtype).T
    inputs = (base[:20].T, base[:, 7:27], base[::3, 1:21], base[:, ::2][:, :20], base[:1, :20].expand(6, 20))
    for x in inputs:
        residual = residuals[: x.shape[0]]
        assert not residual.is_contiguous() or residual.shape[0] == 1
        actual = torch_ext.linear(x, packed, None, "none", None, residual)
        reference.linear(x, weight, None, "none", None, residual).check(actual, f"{x.shape} {x.stride()}")
    bias = torch.randn(38, generator=generator)[::2]
    reference.linear(inputs[0], weight, bias).check(torch_ext.linear(inputs[0], packed, bias), "strided bias")


def test_input_is_left_alone(generator: torch.Generator) -> None:
    x, weight, bias, residual = make(generator, 9, 20, 13)
    packed = torch_ext.pack_linear_weight(weight)
    before = [tensor.clone() for tensor in (x, packed, bias, residual)]
    torch_ext.linear(x, packed, bias, "gelu", torch.float32, residual)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, packed, bias, residual), strict=True))


def test_threads_agree(generator: torch.Generator) -> None:
    x, weight, bias, _ = make(generator, 67, 96, 250)
    x, packed = x.bfloat16(), torch_ext.pack_linear_weight(weight)
    expected = reference.linear(x, weight, bias, "gelu")
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        expected.check(torch_ext.linear(x, packed, bias, "gelu"), f"{threads} threads")


def test_nan_and_infinity_stay_in_their_row() -> None:
    x = torch.ones(9, 16).bfloat16()
    x[2, 5], x[4, 15] = float("nan"), float("inf")
    actual = torch_ext.linear(x, torch_ext.pack_linear_weight(torch.ones(13, 16)))
    assert actual[2].isnan().all()
    assert (actual[4] == float("inf")).all()
    assert (actual[[0, 1, 3, 5, 6, 7, 8]] == 16).all()


def test_errors() -> None:
    x, weight = torch.ones(3, 20), torch.ones(7, 20)
    packed = torch_ext.pack_linear_weight(weight)
    for match, call in (
        (r"expected x with K=20 \(packed weight is 7x20\), got .*\[3, 21\]", lambda: (torch.ones(3, 21), packed)),
        ("expected x with K=20", lambda: (torch.tensor(1.0), packed)),
        (r"expected x in fp32 or bf16, got fp16", lambda: (x.half(), packed)),
        (r"expected x in fp32 or bf16, got i64", lambda: (x.long(), packed)),
        (r"expected bias of shape \[7\], got fp32 \[8\]", lambda: (x, packed, torch.ones(8))),
        (r"expected bias in fp32 or bf16", lambda: (x, packed, torch.ones(7).double())),
        ("expected activation none, gelu.*got 'swish'", lambda: (x, packed, None, "swish")),
        ("expected out_dtype", lambda: (x, packed, None, "none", torch.float16)),
        ("expected residual", lambda: (x, packed, None, "none", None, torch.ones(3, 8))),
        ("expected residual", lambda: (x, packed, None, "none", None, torch.ones(7))),
        ("expected a weight packed by", lambda: (x, weight)),
        ("expected a weight packed by", lambda: (x, torch.zeros(7, 200, dtype=torch.uint8))),
        ("expected a weight packed by", lambda: (x, torch.empty(0, 0, dtype=torch.uint8))),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch_ext.linear(*call())


def test_pack_errors() -> None:
    for match, weight in (
        (r"expected weight \[N, K\]", torch.ones(3)),
        (r"expected weight \[N, K\]", torch.ones(3, 4, 5)),
        (r"N and K at least 1", torch.ones(0, 4)),
        (r"N and K at least 1", torch.ones(4, 0)),
        ("expected weight in fp32 or bf16, got fp16", torch.ones(3, 4).half()),
        ("expected weight in fp32 or bf16, got i8", torch.ones(3, 4, dtype=torch.int8)),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch_ext.pack_linear_weight(weight)


def test_damaged_weights_are_refused() -> None:
    packed = torch_ext.pack_linear_weight(torch.ones(7, 20))
    x = torch.ones(3, 20)
    for change in (
        lambda t: t[1:],  # no header
        lambda t: t[:-1],  # cut off
        lambda t: torch.cat([t, t]),  # not the header's shape
        lambda t: t.T.contiguous(),
        lambda t: t.T,  # strided
        lambda t: t.flatten(),
        lambda t: t.to(torch.int8),
    ):
        for op in (lambda t: torch_ext.linear(x, t), torch_ext.unpack_linear_weight):
            with pytest.raises(RuntimeError, match="packed"):
                op(change(packed))


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_damaged_headers_are_refused(dtype: str) -> None:
    weight = torch.ones(7, 20)
    pack = torch_ext.pack_linear_weight if dtype == "bf16" else torch_ext.pack_linear_weight_int8
    unpack = torch_ext.unpack_linear_weight if dtype == "bf16" else torch_ext.unpack_linear_weight_int8
    packed = pack(weight)
    for byte, flipped in itertools.product(range(64), (0x01, 0x80, 0xFF)):
        broken = packed.clone()
        broken.view(-1)[byte] ^= flipped
        # With as many columns as the header says: that x does not fit must not be all that is seen.
        says = int.from_bytes(bytes(broken.view(-1)[24:32].tolist()), "little")
        x = torch.ones(3, says if says < 1 << 20 else 20)
        for call in (lambda x=x, broken=broken: torch_ext.linear(x, broken), lambda broken=broken: unpack(broken)):
            with pytest.raises(RuntimeError, match="packed"):
                call()


def test_gradients_are_refused() -> None:
    x, weight, bias = torch.ones(3, 20), torch.ones(7, 20), torch.ones(7)
    packed = torch_ext.pack_linear_weight(weight)
    for match, call in (
        ("x requires grad.*inference only.*no_grad", lambda: torch_ext.linear(x.requires_grad_(), packed)),
        ("x requires grad", lambda: torch_ext.linear((x.requires_grad_() * 2).view(3, 20), packed)),
        ("bias requires grad", lambda: torch_ext.linear(x.detach(), packed, bias.requires_grad_())),
        (
            "residual requires grad",
            lambda: torch_ext.linear(x.detach(), packed, None, "none", None, torch.ones(3, 7, requires_grad=True)),
        ),
        ("weight requires grad", lambda: torch_ext.pack_linear_weight(weight.clone().requires_grad_())),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not torch_ext.linear(x.requires_grad_(), packed, bias.requires_grad_()).requires_grad
