"""PackedLinear and optimize()."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from tests.ops import reference
from torch_ext import PackedLinear

DTYPES = (torch.float32, torch.bfloat16)


class Block(nn.Module):
    """Two linear layers, one of them used twice, under a name with several parts."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 37), "down": nn.Linear(37, width, bias=False)})
        self.again = self.mlp["up"]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mlp["down"](torch.relu(self.mlp["up"](self.norm(x))))
        return self.again(hidden)


@pytest.fixture
def model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Block(), nn.Linear(37, 5))


def test_layer_equals_linear(generator: torch.Generator) -> None:
    for dtype in DTYPES:
        for bias in (True, False):
            linear = nn.Linear(24, 13, bias=bias, dtype=dtype)
            layer = PackedLinear.from_linear(linear)
            assert (layer.in_features, layer.out_features) == (24, 13)
            for shape in ((24,), (5, 24), (2, 3, 24)):
                x = torch.randn(shape, generator=generator).to(dtype)
                expected = reference.linear(x, linear.weight.detach(), linear.bias.detach() if bias else None)
                expected.check(layer(x), f"{dtype} {shape}")
            assert f"in_features=24, out_features=13, bias={bias}" in repr(layer)


def test_optimize_swaps_in_place(model: nn.Sequential, generator: torch.Generator) -> None:
    x = torch.randn(6, 24, generator=generator)
    expected = model(x)
    model.train()
    assert torch_ext.optimize(model) is model
    assert not model.training
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 3
    assert model[0].again is model[0].mlp["up"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(x), expected.detach(), rtol=0.02, atol=0.03)


def test_second_call_changes_nothing(model: nn.Sequential) -> None:
    torch_ext.optimize(model)
    before = list(model.modules())
    assert torch_ext.optimize(model, skip="1") is model
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("1", {"1"}),
        (["1", "0.mlp.up"], {"1", "0.mlp.up", "0.again"}),
        ("*.down", {"0.mlp.down"}),
        ("0.mlp", {"0.mlp.up", "0.mlp.down", "0.again"}),
        (["0.?lp.*"], {"0.mlp.up", "0.mlp.down", "0.again"}),
        (lambda name, module: module.out_features == 5, {"1"}),
        (lambda name, module: True, {"0.mlp.up", "0.mlp.down", "0.again", "1"}),
        ((), set()),
    ],
)
def test_skip(model: nn.Sequential, skip: torch_ext.nn.Skip, left: set[str]) -> None:
    torch_ext.optimize(model, skip=skip)
    modules = model.named_modules(remove_duplicate=False)
    assert {name for name, module in modules if isinstance(module, nn.Linear)} == left


def test_only_plain_linear_is_swapped() -> None:
    class Other(nn.Linear):
        pass

    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    own_forward = nn.Linear(8, 8)
    own_forward.forward = lambda x: x
    model = nn.ModuleList([Other(8, 8), parametrized, own_forward, nn.MultiheadAttention(8, 2), nn.Linear(8, 8)])
    before = list(model.modules())
    torch_ext.optimize(model)
    assert isinstance(model[4], PackedLinear)
    assert all(a is b for a, b in zip(before[:-1], list(model.modules())[:-1], strict=True))


def test_root_is_returned_packed() -> None:
    linear = nn.Linear(24, 13)
    layer = torch_ext.optimize(linear)
    assert isinstance(layer, PackedLinear)
    assert type(linear) is nn.Linear


def test_shared_weights_are_packed_once() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    model[1].weight = model[0].weight
    torch_ext.optimize(model)
    assert model[0]._packed is model[1]._packed
    assert not torch.equal(model[0].bias, model[1].bias)


def test_weight_tied_to_an_embedding_is_its_own() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(13, 24), "head": nn.Linear(24, 13)})
    model["head"].weight = model["embedding"].weight
    original = model["embedding"].weight.detach().clone()
    torch_ext.optimize(model)
    assert torch.equal(model["embedding"].weight, original)
    assert torch.equal(model["head"].weight, original.bfloat16().float())


def test_hooks_are_kept() -> None:
    model = nn.Sequential(nn.Linear(24, 13))
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda module, args: calls.append("before"))
    model[0].register_forward_hook(lambda module, args, output: calls.append("after"))
    torch_ext.optimize(model)(torch.ones(2, 24))
    assert calls == ["before", "after"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_transformer_encoder_calls_the_layers(generator: torch.Generator) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 32, generator=generator)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.inference_mode():
        expected = model(x, src_key_padding_mask=mask)
        torch_ext.optimize(model)
        called: list[int] = []
        model.layers[0].linear1.register_forward_hook(lambda *_: called.append(1))
        actual = model(x, src_key_padding_mask=mask)
    assert called == [1]
    torch.testing.assert_close(actual[~mask], expected[~mask], rtol=0.05, atol=0.05)


def test_state_dict_has_the_original_names(model: nn.Sequential) -> None:
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch_ext.optimize(model)
    state = model.state_dict()
    assert list(state) == list(original)
    for name, tensor in state.items():
        linear = "norm" not in name and name.endswith("weight")
        expected = original[name].bfloat16().float() if linear else original[name]
        assert tensor.dtype == original[name].dtype
        assert torch.equal(tensor, expected), name
    fresh = nn.Sequential(Block(), nn.Linear(37, 5))
    fresh.load_state_dict(state)
    x = torch.ones(3, 24)
    torch.testing.assert_close(model(x), fresh(x).detach(), rtol=0.02, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_load_state_dict_packs_again(model: nn.Sequential, dtype: torch.dtype) -> None:
    torch_ext.optimize(model)
    other = nn.Sequential(Block(), nn.Linear(37, 5)).to(dtype)
    assert not model.load_state_dict(other.state_dict()).missing_keys
    expected = other.state_dict()["1.weight"].float().bfloat16().float()
    assert torch.equal(model.state_dict()["1.weight"], expected)
    x = torch.ones(3, 24)
    torch.testing.assert_close(model(x), other.float()(x).detach(), rtol=0.02, atol=0.03)


def test_load_state_dict_reports_what_does_not_fit(model: nn.Sequential) -> None:
    torch_ext.optimize(model)
    state = model.state_dict()
    for match, change in (
        ('Missing key.*"1.bias"', {"1.bias": None}),
        ('Missing key.*"1.weight"', {"1.weight": None}),
        ('Unexpected key.*"1.scale"', {"1.scale": torch.ones(1)}),
        (r"size mismatch for 1.weight: expected \[5, 37\], got \[5, 38\]", {"1.weight": torch.ones(5, 38)}),
        (r"size mismatch for 1.bias", {"1.bias": torch.ones(6)}),
        ("1.weight: expected a floating-point tensor", {"1.weight": torch.ones(5, 37, dtype=torch.int8)}),
    ):
        changed = {**state, **change}
        changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
        with pytest.raises(RuntimeError, match=match):
            model.load_state_dict(changed)
    missing = model.load_state_dict({"1.bias": torch.zeros(5), "extra": torch.ones(1)}, strict=False)
    assert "1.weight" in missing.missing_keys or "0.norm.weight" in missing.missing_keys
    assert torch.equal(model[1].bias, torch.zeros(5))


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_torch_save])
def test_copies(model: nn.Sequential, copied: Callable[[nn.Module], nn.Module], generator: torch.Generator) -> None:
    torch_ext.optimize(model)
    other = copied(model)
    x = torch.randn(6, 24, generator=generator)
    assert torch.equal(other(x), model(x))
    if copied is not copy.copy:
        assert other[0].again is other[0].mlp["up"]
        before = model(x)
        other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in other.state_dict().items()})
        assert torch.equal(other(x), torch.zeros(6, 5))
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("cast", ["float", "bfloat16", "half", "double", "cpu"])
def test_casts_leave_packed_weights_alone(cast: str) -> None:
    layer = PackedLinear.from_linear(nn.Linear(24, 13))
    model = nn.Sequential(layer)
    x = torch.ones(3, 24)
    before = layer(x)
    assert getattr(model, cast)() is model
    assert torch.equal(layer(x), before)
    assert model.to(torch.bfloat16) is model
    assert torch.equal(layer(x), before)


def test_model_in_bf16_afterwards(model: nn.Sequential) -> None:
    expected = model(torch.ones(3, 24)).detach()
    torch_ext.optimize(model).bfloat16()
    actual = model(torch.ones(3, 24, dtype=torch.bfloat16))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


def test_moves_off_the_cpu_are_refused() -> None:
    model = nn.Sequential(PackedLinear.from_linear(nn.Linear(24, 13)))
    for move in (lambda: model.to("meta"), lambda: model.to_empty(device="meta")):
        with pytest.raises(RuntimeError, match="cannot move to meta: packed weights are for the CPU"):
            move()


def test_weight_cannot_be_assigned() -> None:
    layer = PackedLinear.from_linear(nn.Linear(24, 13))
    for name in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=rf"{name} cannot be assigned.*load_state_dict"):
            setattr(layer, name, nn.Parameter(torch.ones(13, 24)))


def test_gradients_are_refused(model: nn.Sequential) -> None:
    torch_ext.optimize(model)
    x = torch.ones(3, 24, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"inference only.*torch.no_grad\(\)"):
        model(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not model(x).requires_grad
    assert not model(x.detach()).requires_grad


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "unknown dtype 'i8'; known: 'bf16', 'int8'", lambda model: torch_ext.optimize(model, dtype="i8")),
        (ValueError, "skip names no nn.Linear .*: no", lambda model: torch_ext.optimize(model, skip=["1", "no"])),
        (ValueError, "has no nn.Linear", lambda model: torch_ext.optimize(nn.LayerNorm(3))),
        (ValueError, "got meta: load the weights", lambda model: torch_ext.optimize(model.to("meta"))),
        (TypeError, "0.mlp.up: expected fp32 or bf16, got torch.fl", lambda model: torch_ext.optimize(model.half())),
        (TypeError, "expected a torch.nn.Module, got str", lambda model: torch_ext.optimize("model")),
        (TypeError, "expected fp32 or bf16", lambda model: PackedLinear(torch.ones(3, 4).double())),
        (ValueError, r"expected weight \[N, K\]", lambda model: PackedLinear(torch.ones(3))),
        (ValueError, r"bias \[N\]", lambda model: PackedLinear(torch.ones(3, 4), torch.ones(4))),
    ],
)  # fmt: skip
def test_errors_leave_the_model_alone(
    model: nn.Sequential, error: type[Exception], match: str, call: Callable[[nn.Module], object]
) -> None:
    with pytest.raises(error, match=match):
        call(model)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 3
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_module_equals_eager(model: nn.Sequential, generator: torch.Generator, dynamic: bool) -> None:
    torch_ext.optimize(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    with torch.inference_mode():
        for rows in (6, 9):
            x = torch.randn(rows, 24, generator=generator)
            torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.02)
