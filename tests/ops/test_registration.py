"""What torch needs of an op beyond its result: schemas, fake kernels, torch.compile, torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_ext
from tests.ops import reference

OPS = torch.ops.torch_ext


def samples(generator: torch.Generator) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Calls of every op that differ in what a fake kernel may get wrong."""

    def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    bf16 = torch.bfloat16
    packed = torch_ext.pack_linear_weight(rand(13, 24))
    packed_int8 = torch_ext.pack_linear_weight_int8(rand(13, 24))
    bounds = reference.cu_seqlens([3, 2])
    ids = torch.tensor([1, 4, 0, 9, 2])
    tables = (rand(10, 8), rand(6, 8), rand(2, 8))
    norm = (rand(8), rand(8))
    spec = torch_ext.EncoderSpec("bert", 8, 1, 2, 12, "gelu", 6, 0, 1e-5, 10, 2)
    weights = {name: rand(*shape) for name, shape in spec.shapes().items()}
    encoder = torch_ext.Encoder(spec, weights)
    exact = torch_ext.Encoder(spec, weights, "fp32")
    return {
        "encoder_forward": [
            ((ids, bounds, None, encoder._packed), {}),
            ((ids, bounds, ids % 2, encoder._packed), {}),
            ((ids, bounds, None, encoder._packed), {"attended": torch.tensor([3, 1], dtype=torch.int32)}),
            ((ids, bounds, None, exact._packed), {"fp32": True}),
        ],
        "pack_linear_weight": [
            ((rand(13, 24),), {}),
            ((rand(24, 13, dtype=bf16).T,), {}),
            ((rand(24, 13, dtype=bf16),), {"transposed": True}),
        ],
        "unpack_linear_weight": [((packed,), {})],
        "pack_linear_weight_int8": [
            ((rand(13, 24),), {}),
            ((rand(13, 24, dtype=bf16),), {}),
            ((torch.randint(-127, 128, (13, 24), generator=generator, dtype=torch.int8), rand(13).abs()), {}),
        ],
        "unpack_linear_weight_int8": [((packed_int8,), {})],
        "linear": [
            ((rand(5, 24), packed), {}),
            ((rand(2, 3, 24, dtype=bf16), packed_int8, rand(13)), {"activation": "gelu", "residual": rand(2, 3, 13)}),
            ((rand(2, 3, 24, dtype=bf16), packed, rand(13)), {"activation": "gelu", "out_dtype": torch.float32}),
            ((rand(24, 5).T, packed), {"out_dtype": bf16, "residual": rand(5, 13)}),
            ((rand(24), packed, rand(13, dtype=bf16), "tanh"), {}),
            ((rand(0, 24), packed), {}),
        ],
        "matmul": [
            ((rand(5, 24), rand(24, 13)), {}),
            ((rand(5, 24, dtype=bf16), rand(13, 24, dtype=bf16).T), {"out_dtype": torch.float32}),
            ((rand(2, 1, 5, 24, dtype=bf16), rand(3, 24, 13, dtype=bf16)), {}),
            ((rand(24, dtype=bf16), rand(2, 24, 13, dtype=bf16)), {}),
            ((rand(2, 5, 24, dtype=bf16), rand(24, dtype=bf16)), {}),
            ((rand(24, dtype=bf16), rand(24, dtype=bf16)), {}),
            ((rand(5, 0, dtype=bf16), rand(0, 13, dtype=bf16)), {}),
        ],
        "bmm": [((rand(2, 5, 24, dtype=bf16), rand(2, 13, 24, dtype=bf16).transpose(1, 2)), {})],
        "addmm": [
            ((rand(13, dtype=bf16), rand(5, 24, dtype=bf16), rand(24, 13, dtype=bf16)), {}),
            ((rand(5, 1), rand(5, 24), rand(24, 13)), {"beta": 0.5, "alpha": 2.0}),
        ],
        "varlen_attention": [
            ((rand(5, 96), bounds, 2), {}),
            ((rand(5, 48, dtype=bf16), bounds, 4, 0.5), {}),
            ((rand(5, 96), bounds, 2), {"attended": torch.tensor([1, 2], dtype=torch.int32)}),
            ((rand(5, 96), bounds, 2), {"position_keys": rand(6, 32), "position_queries": rand(6, 32)}),
        ],
        "add_layer_norm": [
            ((rand(5, 8), None, *norm, 1e-5), {}),
            ((rand(5, 8, dtype=bf16), rand(5, 8, dtype=bf16), *norm, 1e-5), {}),
        ],
        "add_rms_norm": [((rand(5, 8, dtype=bf16), rand(5, 8, dtype=bf16), rand(8), 1e-5), {})],
        "rotary_embedding": [((rand(5, 24), bounds, 2, rand(4, 4)), {})],
        "gate": [((rand(5, 8), "gelu"), {}), ((rand(5, 8, dtype=bf16), "silu"), {})],
        "embed_layer_norm": [
            ((ids, bounds, None, *tables[:2], None, *norm, 1e-5, 0), {}),
            ((ids, bounds, None, tables[0], None, None, *norm, 1e-5, 0), {}),
            ((ids, bounds, ids % 2, *(table.to(bf16) for table in tables), *norm, 1e-5, 2), {}),
            ((ids, bounds, None, *tables[:2], None, *norm, 1e-5, 2, 4), {}),
        ],
        "pool": [
            ((rand(5, 8, dtype=dtype), bounds, mode, normalize), {})
            for mode in torch_ext.ops.POOLING_MODES
            for dtype, normalize in ((torch.float32, True), (bf16, False))
        ],
    }


@pytest.mark.anywhere
@pytest.mark.parametrize("name", samples(torch.Generator()))
def test_opcheck(generator: torch.Generator, name: str) -> None:
    for args, kwargs in samples(generator)[name]:
        torch.library.opcheck(getattr(OPS, name).default, args, kwargs)


def test_every_op_is_checked() -> None:
    assert {name for name in dir(OPS) if not name.startswith("_") and name != "name"} == set(samples(torch.Generator()))


@pytest.mark.parametrize("name", [name for name in samples(torch.Generator()) if "pack" not in name])
def test_fake_kernels_on_meta_tensors(generator: torch.Generator, name: str) -> None:
    op = getattr(OPS, name)
    for args, kwargs in samples(generator)[name]:
        real = op(*args, **kwargs)

        def to_meta(value: Any) -> Any:
            return value.to("meta") if isinstance(value, Tensor) else value

        fake = op(*map(to_meta, args), **{key: to_meta(value) for key, value in kwargs.items()})
        assert (fake.shape, fake.dtype, fake.device.type) == (real.shape, real.dtype, "meta")
        assert fake.stride() == real.stride()


def test_fake_kernels_check() -> None:
    packed = torch_ext.pack_linear_weight(torch.ones(13, 24)).to("meta")
    x = torch.ones(5, 24, device="meta")
    for match, call in (
        ("requires grad.*inference only", lambda: torch_ext.linear(x.clone().requires_grad_(), packed)),
        ("activation", lambda: torch_ext.linear(x, packed, None, "swish")),
        ("bias", lambda: torch_ext.linear(x, packed, torch.ones(12, device="meta"))),
        ("residual", lambda: torch_ext.linear(x, packed, residual=torch.ones(5, 12, device="meta"))),
        ("fp32 or bf16", lambda: torch_ext.linear(x.half(), packed)),
        ("packed by", lambda: torch_ext.linear(x, torch.ones(13, 24, device="meta"))),
        ("matmul: expected b with K=24", lambda: torch_ext.matmul(x, x)),
        ("matmul: expected a and b both", lambda: torch_ext.matmul(x, x.T.bfloat16())),
        ("matmul: a requires grad", lambda: torch_ext.matmul(x.clone().requires_grad_(), x.T)),
        ("bmm: expected a", lambda: torch_ext.bmm(x[None], x[None])),
        ("addmm: expected a", lambda: torch_ext.addmm(x[0], x, x)),
        ("addmm: expected bias that broadcasts", lambda: torch_ext.addmm(x[0], x, x.T)),
        ("num_heads", lambda: torch_ext.varlen_attention(x, torch.ones(2, device="meta"), 5)),
        ("attended i32", lambda: torch_ext.varlen_attention(x.repeat(1, 2), x[0], 2, attended=x[0])),
        ("mode", lambda: torch_ext.pool(x, torch.ones(2, device="meta"), "sum")),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_function_equals_eager(generator: torch.Generator, dynamic: bool) -> None:
    weight, bias = torch.randn(13, 24, generator=generator), torch.randn(13, generator=generator)
    packed = torch_ext.pack_linear_weight(weight)

    def function(x: Tensor, bounds: Tensor) -> Tensor:
        wide = torch_ext.linear(x * 2, packed, bias, "gelu")
        qkv = torch.cat([wide[:, :4]] * 3, -1) + 1
        hidden = torch_ext.varlen_attention(qkv, bounds, 2)
        return torch_ext.pool(torch_ext.add_layer_norm(hidden, None, bias[:4], bias[4:8], 1e-5), bounds).exp()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for lengths in ([3, 2], [7, 1, 1]):
        x, bounds = torch.randn(sum(lengths), 24, generator=generator), reference.cu_seqlens(lengths)
        torch.testing.assert_close(compiled(x, bounds), function(x, bounds), rtol=1e-4, atol=1e-5)


SIZES = [(5, 8, 12), (6, 10, 14), (7, 6, 6), (4, 1, 2)]
"""Rows, inputs and outputs, in one order and in the other: what is a symbol depends on what comes first."""


@pytest.mark.compile
@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1]])
def test_every_size_may_be_symbolic(generator: torch.Generator, sizes: list[tuple[int, int, int]]) -> None:
    def block(x: Tensor, bounds: Tensor, up: Tensor, down: Tensor, norm: Tensor) -> Tensor:
        attended = torch_ext.varlen_attention(torch_ext.linear(x, up), bounds, 2)
        hidden = torch_ext.add_layer_norm(torch_ext.linear(attended, down, norm), x, norm, norm, 1e-5)
        product = torch_ext.addmm(norm, torch_ext.matmul(hidden, hidden.T), hidden)
        return torch_ext.pool(torch_ext.gate(torch.cat((product, x), 1), "gelu"), bounds)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for pack in (torch_ext.pack_linear_weight, torch_ext.pack_linear_weight_int8):
        for rows, inputs, outputs in sizes:
            width, bounds = 2 * inputs, reference.cu_seqlens([1, rows - 1])
            x, norm = torch.randn(rows, width, generator=generator), torch.randn(width, generator=generator)
            up = torch.randn(6 * outputs, width, generator=generator)
            down = torch.randn(width, 2 * outputs, generator=generator)
            arguments = (x, bounds, pack(up), pack(down), norm)
            torch.testing.assert_close(compiled(*arguments), block(*arguments))


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_that_only_data_tells(generator: torch.Generator, dynamic: bool) -> None:
    """Tokens that a mask chose, and the columns of an unpacked weight: no guard can look at them."""

    def linear(x: Tensor, packed: Tensor, mask: Tensor) -> Tensor:
        tokens = x[mask]
        hidden = torch_ext.linear(tokens, packed, None, "gelu", None, torch_ext.linear(tokens, packed))
        return torch_ext.add_rms_norm(hidden, None, hidden.new_ones(hidden.shape[1]), 1e-5)

    def products(x: Tensor, packed: Tensor, mask: Tensor) -> Tensor:
        places, weight = mask.nonzero()[:, 0], torch_ext.unpack_linear_weight(packed).T
        tokens, bias = x.bfloat16()[places], x.bfloat16()[places, :1]
        product = torch_ext.matmul(x.bfloat16(), weight)[places] + torch_ext.addmm(bias, tokens, weight)
        return product + torch_ext.addmm(product, tokens, weight)

    def again(x: Tensor, packed: Tensor, mask: Tensor) -> Tensor:
        weight = torch_ext.unpack_linear_weight(packed)
        quantized = torch_ext.unpack_linear_weight_int8(torch_ext.pack_linear_weight_int8(weight))
        return torch_ext.linear(x, torch_ext.pack_linear_weight_int8(*quantized))

    for function in (linear, products, again):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
            for rows, inputs, outputs in SIZES[:2]:
                x = torch.randn(rows, inputs, generator=generator)
                packed = torch_ext.pack_linear_weight(torch.randn(outputs, inputs, generator=generator))
                mask = torch.arange(rows) % 3 != 0
                torch.testing.assert_close(compiled(x, packed, mask), function(x, packed, mask))


@pytest.mark.compile
def test_compiled_gradients_are_refused() -> None:
    packed = torch_ext.pack_linear_weight(torch.ones(13, 24))
    compiled = torch.compile(lambda x: torch_ext.linear(x * 2, packed), fullgraph=True)
    with pytest.raises(Exception, match="requires grad, but torch_ext is for inference only"):
        compiled(torch.ones(5, 24, requires_grad=True))


@pytest.mark.anywhere
def test_export() -> None:
    packed = torch_ext.pack_linear_weight(torch.eye(24))

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", packed)

        def forward(self, x: Tensor) -> Tensor:
            return torch_ext.linear(x, self.packed, activation="relu")

    rows = torch.export.Dim("rows", min=1, max=100)
    program = torch.export.export(Module(), (torch.ones(5, 24),), dynamic_shapes=({0: rows},))
    x = -torch.ones(7, 24)
    assert torch.equal(program.module()(x), torch.zeros(7, 24))


@pytest.mark.anywhere
def test_derivatives_of_torch_func_and_forward_mode_are_refused() -> None:
    x, ones, bounds = torch.randn(6, 8), torch.ones(8), torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = torch_ext.pack_linear_weight(torch.randn(8, 8))
    layer = torch_ext.optimize(torch.nn.Sequential(torch.nn.Linear(8, 8)))
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: torch_ext.linear(x, packed),
        lambda x: torch_ext.linear(torch.ones(6, 8), packed, None, "none", None, x),
        lambda x: torch_ext.matmul(x, torch.ones(8, 8)),
        lambda x: torch_ext.bmm(x[None], torch.ones(1, 8, 8)),
        lambda x: torch_ext.addmm(ones, x, torch.ones(8, 8)),
        lambda x: torch_ext.varlen_attention(x.repeat(1, 3), bounds, 2),
        lambda x: torch_ext.add_layer_norm(x, None, ones, ones, 1e-5),
        lambda x: torch_ext.add_rms_norm(x, x, ones, 1e-5),
        lambda x: torch_ext.gate(x, "gelu"),
        lambda x: torch_ext.pool(x, bounds, "mean", True),
        layer,
    ]
    for function in functions:
        for differentiate in (
            lambda f=function: torch.func.grad(lambda z: f(z).sum())(x),
            lambda f=function: torch.func.vjp(f, x),
            lambda f=function: torch.func.jvp(f, (x,), (x,)),
            lambda f=function: torch.func.vmap(torch.func.grad(lambda z: f(z).sum()))(x[None]),
        ):
            with pytest.raises(RuntimeError, match="inference only"):
                differentiate()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            with pytest.raises(RuntimeError, match="inference only"):
                function(dual)
            function(x)

        # What is a constant is not differentiated.
        def constant(z: Tensor, f: Callable[[Tensor], Tensor] = function) -> Tensor:
            with torch.no_grad():
                frozen = f(z)
            return (frozen.detach() * z.sum()).sum()

        assert torch.func.grad(constant)(x).shape == x.shape
