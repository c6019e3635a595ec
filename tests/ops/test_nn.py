"""PackedLinear and optimize()."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torch_ext
from tests.ops import reference
from torch_ext import PackedLinear
from torch_ext.read_only import ReadOnlyTensor

DTYPES = (torch.float32, torch.bfloat16)
CASTS = (*DTYPES, torch.float16, torch.float64)


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


def test_hooks_for_errors_and_state_dicts_are_kept() -> None:
    model = nn.Sequential(nn.Linear(24, 13))
    calls: list[str] = []
    model[0].register_forward_hook(lambda module, args, output: calls.append("always"), always_call=True)
    model[0].register_state_dict_pre_hook(lambda module, prefix, keep_vars: calls.append(f"save {prefix}"))
    model[0].register_state_dict_post_hook(lambda module, state, prefix, metadata: calls.append("saved"))
    model[0].register_load_state_dict_post_hook(lambda module, keys: calls.append("loaded"))
    torch_ext.optimize(model)
    with pytest.raises(RuntimeError, match="K=24"):
        model(torch.ones(2, 3))
    model.load_state_dict(model.state_dict())
    assert calls == ["always", "save 0.", "saved", "loaded"]


def test_what_a_user_gave_a_layer_is_kept() -> None:
    """Attributes move on to the packed layer. Buffers and modules are part of the model's state: it stays as it is."""
    model = nn.Sequential(nn.Linear(24, 13), nn.Linear(13, 13), nn.Linear(13, 13))
    model[0].note = ["of", "a", "user"]
    model[1].register_buffer("mask", torch.ones(13))
    model[2].adapter = nn.ReLU()
    names = set(model.state_dict())
    torch_ext.optimize(model)
    assert isinstance(model[0], PackedLinear)
    assert model[0].note == ["of", "a", "user"]
    assert copy.deepcopy(model)[0].note == ["of", "a", "user"]
    assert type(model[1]) is nn.Linear
    assert type(model[2]) is nn.Linear
    assert set(model.state_dict()) == names


def test_fx_traces_a_layer_as_one_node(model: nn.Sequential, generator: torch.Generator) -> None:
    """As it does an nn.Linear."""
    torch_ext.optimize(model)
    traced = torch.fx.symbolic_trace(model)
    names = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    assert {"0.mlp.up", "0.mlp.down", "1"} <= names
    x = torch.randn(6, 24, generator=generator)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize(
    ("error", "match", "x"),
    [
        (TypeError, "got list", [1.0] * 24),
        (TypeError, "got NoneType", None),
        (TypeError, "got ndarray", torch.ones(2, 24).numpy()),
        (RuntimeError, "neither sparse nor nested, got torch.sparse_coo", torch.ones(2, 24).to_sparse()),
        (RuntimeError, "x of fp32, bf16, fp16 or fp64, got torch.int64", torch.ones(2, 24, dtype=torch.int64)),
        (RuntimeError, "got torch.float8_e5m2", torch.ones(2, 24).to(torch.float8_e5m2)),
    ],
)  # fmt: skip
def test_inputs_that_are_refused(error: type[Exception], match: str, x: object) -> None:
    with pytest.raises(error, match=f"PackedLinear: expected .*{match}"):
        torch_ext.optimize(nn.Linear(24, 13))(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_are_refused(layout: torch.layout) -> None:
    x = torch.nested.nested_tensor([torch.ones(2, 24), torch.ones(3, 24)], layout=layout)
    with pytest.raises(RuntimeError, match="neither sparse nor nested, got a nested tensor"):
        torch_ext.optimize(nn.Linear(24, 13))(x)


def test_casts_under_a_default_device(model: nn.Sequential) -> None:
    """That of ``torch.set_default_device`` is not where the packed weights go."""
    torch_ext.optimize(model)
    with torch.device("meta"):
        model.half()
    assert model[1].weight.dtype == torch.float16


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
    linear = nn.Linear(24, 13)
    layer = PackedLinear.from_linear(linear)
    model = nn.Sequential(layer)
    x = torch.ones(3, 24)
    before, weight = layer(x), layer.weight.clone()
    assert getattr(model, cast)() is model
    assert torch.equal(layer(x), before)
    expected = getattr(nn.Sequential(linear), cast)()[0].weight.dtype
    assert {tensor.dtype for tensor in (layer.weight, layer.bias, *model.state_dict().values())} == {expected}
    assert model.to(torch.bfloat16) is model
    assert torch.equal(layer(x), before)
    assert torch.equal(model.float()[0].weight, weight)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", CASTS)
def test_every_float_is_taken_and_returned(
    generator: torch.Generator, dtype: torch.dtype, kind: torch_ext.nn.PackedDtype
) -> None:
    layer = PackedLinear.from_linear(nn.Linear(24, 13), kind)
    x = torch.randn(5, 24, generator=generator).to(dtype)
    actual = layer(x)
    assert actual.dtype == dtype
    # The layer computes in fp32 and rounds once.
    expected = layer(x.float())
    torch.testing.assert_close(actual.float(), expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    for wrong in (torch.int64, torch.complex64):
        with pytest.raises(RuntimeError, match="expected x of"):
            layer(torch.ones(5, 24).to(wrong))


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", CASTS)
def test_autocast(generator: torch.Generator, dtype: torch.dtype, autocast: torch.dtype) -> None:
    linear = nn.Linear(24, 13)
    layer = PackedLinear.from_linear(linear)
    x = torch.randn(5, 24, generator=generator).to(dtype)
    expected = layer(x.float())
    with torch.autocast("cpu", autocast):
        actual = layer(x)
        # As autocast has it: fp64 stays.
        assert actual.dtype == (linear.double()(x).dtype if dtype == torch.float64 else linear(x).dtype)
    torch.testing.assert_close(actual.float(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_fp16_model(model: nn.Sequential, generator: torch.Generator, kind: torch_ext.nn.PackedDtype) -> None:
    x = torch.randn(6, 24, generator=generator)
    expected = model(x).detach()
    torch_ext.optimize(model.half(), kind)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    actual = model(x.half())
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
    other = nn.Sequential(Block(), nn.Linear(37, 5)).half()
    other.load_state_dict(model.state_dict())
    before = model(x.half())
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x.half()), before, rtol=0.01, atol=0.01)


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


# What reads a weight's values has to unpack it.
METADATA: list[Callable[[Tensor], object]] = [
    lambda w: w.dtype,
    lambda w: w.shape,
    lambda w: w.device,
    lambda w: (w.ndim, w.dim(), w.size(), w.size(0), w.numel(), w.nelement(), w.stride(), w.element_size(), w.nbytes),
    lambda w: (w.is_floating_point(), w.is_contiguous(), w.is_cuda, w.is_meta, w.layout, w.requires_grad, w.is_leaf),
    lambda w: (isinstance(w, Tensor), isinstance(w, nn.Parameter), w.grad, len(w), w.is_sparse),
    lambda w: (w.detach().dtype, w.data.shape, w.cpu().dtype, w.contiguous().shape, w.to(w.dtype).device),
]


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_what_is_known_of_a_weight_costs_no_unpacking(
    monkeypatch: pytest.MonkeyPatch, kind: torch_ext.nn.PackedDtype
) -> None:
    calls: list[str] = []
    real = torch_ext.packed_linear.layer_weight
    monkeypatch.setattr(torch_ext.packed_linear, "layer_weight", lambda *args: calls.append("") or real(*args))
    linear = nn.Linear(24, 13, dtype=torch.bfloat16)
    layer = PackedLinear.from_linear(linear, kind)
    plain = linear.weight.detach()
    for known in METADATA:
        assert known(layer.weight) == known(plain)
        assert known(layer.state_dict()["weight"]) == known(plain)
    assert not calls
    weight = layer.weight
    assert torch.equal(weight, weight.clone())
    assert weight.sum() == weight.float().bfloat16().sum()
    assert len(calls) == 1
    del weight
    assert layer.__dict__["_unread"] is None  # The layer does not keep what others read.


def writes() -> Iterator[tuple[str, Callable[[nn.Module, str], object]]]:
    """Ways to write into the weight or bias of a layer."""

    def add(layer: nn.Module, name: str) -> None:
        tensor = getattr(layer, name)
        tensor += 1

    def add_attribute(layer: nn.Module, name: str) -> None:
        setattr(layer, name, getattr(layer, name).__iadd__(1))

    def add_data(layer: nn.Module, name: str) -> None:
        getattr(layer, name).data += 1

    def set_item(layer: nn.Module, name: str) -> None:
        getattr(layer, name)[0] = 1

    def set_data(layer: nn.Module, name: str) -> None:
        getattr(layer, name).data = torch.zeros_like(getattr(layer, name))

    def without_grad(layer: nn.Module, name: str) -> None:
        with torch.no_grad():
            getattr(layer, name).mul_(2)

    def in_inference_mode(layer: nn.Module, name: str) -> None:
        with torch.inference_mode():
            getattr(layer, name).detach().view(-1)[1:].mul_(2)

    for function in (add, add_attribute, add_data, set_item, set_data, without_grad, in_inference_mode):
        yield function.__name__, function
    each: dict[str, Callable[[Tensor], object]] = {
        "zero_": lambda t: t.zero_(),
        "data.zero_": lambda t: t.data.zero_(),
        "data.copy_": lambda t: t.data.copy_(torch.zeros_like(t)),
        "init": lambda t: nn.init.normal_(t),
        "init of .data": lambda t: nn.init.ones_(t.data),
        "out=": lambda t: torch.mul(t, 2, out=t),
        "foreach": lambda t: torch._foreach_add_([t], 1),
        "set_": lambda t: t.set_(torch.zeros(3)),
        "resize_": lambda t: t.resize_(3),
        "index_fill_": lambda t: t.index_fill_(0, torch.tensor([0]), 1.0),
        "apply_": lambda t: t.apply_(lambda value: 0.0),
        "views": lambda t: t[0].unsqueeze(0).flatten()[:1].zero_(),
        "split": lambda t: t.split(5)[1].zero_(),
        "unbind": lambda t: t.unbind()[0].zero_(),
        "transposed": lambda t: t.transpose(0, -1).copy_(torch.zeros_like(t.transpose(0, -1))),
        "same dtype": lambda t: t.float().cpu().contiguous().zero_(),
        "bits": lambda t: t.view(torch.int32).zero_(),
        "copy.copy": lambda t: copy.copy(t).zero_(),
        "numpy": lambda t: t.numpy().fill(0),
        "dlpack": lambda t: torch.from_dlpack(t).zero_(),
        "optimizer": lambda t: torch.nn.utils.vector_to_parameters(torch.zeros(t.numel()), [t]),
    }
    for name, function in each.items():
        yield name, lambda layer, which, function=function: function(getattr(layer, which))
        yield f"{name} of state_dict()", lambda layer, which, function=function: function(layer.state_dict()[which])


@pytest.mark.parametrize("write", [pytest.param(write, id=name) for name, write in writes()])
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_writes_are_refused(write: Callable[[nn.Module, str], object], which: str) -> None:
    layer = PackedLinear.from_linear(nn.Linear(24, 13))
    x = torch.ones(3, 24)
    before, values = layer(x), getattr(layer, which).clone()
    with pytest.raises((RuntimeError, ValueError, BufferError), match=r"read-only"):
        write(layer, which)
    assert torch.equal(layer(x), before)
    assert torch.equal(getattr(layer, which), values)


def test_swapped_tensors_do_not_reach_the_layer(model: nn.Sequential, generator: torch.Generator) -> None:
    """``torch.utils.swap_tensors`` makes another tensor of what ``weight`` returned; the layer's is made anew."""
    torch_ext.optimize(model)
    x = torch.randn(6, 24, generator=generator)
    expected, weight = model(x), model[1].weight.clone()
    torch.utils.swap_tensors(model[1].weight, torch.ones(5, 37))
    assert torch.equal(model[1].weight, weight)
    assert torch.equal(model(x), expected)


def test_the_error_for_writes_says_what_to_do() -> None:
    layer = PackedLinear.from_linear(nn.Linear(24, 13))
    with pytest.raises(
        RuntimeError, match=r"aten.zero_.*before torch_ext.optimize\(\).*load_state_dict\(\).*clone\(\)"
    ):
        layer.weight.data.zero_()


def test_merging_an_adapter_is_refused(generator: torch.Generator) -> None:
    """What peft's merge_and_unload() does: safe_merge assigns, else `+=`; then the layer's own tensors are set."""
    layer = PackedLinear.from_linear(nn.Linear(24, 13))
    up, down = (PackedLinear.from_linear(nn.Linear(*sizes, bias=False)) for sizes in ((2, 13), (24, 2)))
    delta = up.weight @ down.weight
    assert type(delta) is Tensor
    with pytest.raises(RuntimeError, match="merge adapters there, too"):
        layer.weight.data += delta
    merged = layer.weight.data.clone()
    merged += delta
    with pytest.raises(RuntimeError, match="merge adapters there, too"):
        layer.weight.data = merged
    layer.weight, layer.bias = layer.weight, layer.bias
    layer.load_state_dict({"weight": merged, "bias": layer.bias})
    assert torch.equal(layer.weight, merged.bfloat16().float())


def test_values_of_a_weight_can_be_used(tmp_path: Path, model: nn.Sequential) -> None:
    torch_ext.optimize(model)
    weight, state = model[1].weight, model.state_dict()
    plain = weight.clone()
    for result in (plain, weight + 0, copy.deepcopy(weight), weight.half(), pickle.loads(pickle.dumps(weight))):
        assert type(result) is Tensor
        result.zero_()
    plain = weight.clone()
    assert (weight.tolist(), repr(weight)) == (plain.tolist(), repr(plain))
    assert weight[1, 2].item() == plain[1, 2]
    assert (weight.numpy() == plain.numpy()).all()
    assert torch.equal(torch.cat([weight, weight.flip(0)])[:5], plain)
    torch.testing.assert_close(weight @ torch.ones(37), plain.sum(1))
    torch.save(state, tmp_path / "state.pt")
    save_file(model[1].state_dict(), tmp_path / "layer.safetensors")
    loaded = torch.load(tmp_path / "state.pt")
    assert all(type(tensor) is Tensor and torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    assert torch.equal(load_file(tmp_path / "layer.safetensors")["weight"], plain)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_is_loaded_by_a_plain_model(model: nn.Sequential, assign: bool) -> None:
    torch_ext.optimize(model)
    plain = nn.Sequential(Block(), nn.Linear(37, 5))
    plain.load_state_dict(model.state_dict(), assign=assign)
    assert all(type(parameter) is nn.Parameter and parameter.requires_grad for parameter in plain.parameters())
    before = model(torch.ones(3, 24))
    plain(torch.ones(3, 24)).sum().backward()
    torch.optim.SGD(plain.parameters(), 1.0).step()
    assert not torch.equal(plain[1].bias, model[1].bias)
    if not assign:  # Else embeddings and norms are those of both models.
        assert torch.equal(model(torch.ones(3, 24)), before)
    assert torch_ext.optimize(plain.half())(torch.ones(3, 24).half()).dtype == torch.float16


class Tied(nn.Module):
    """A head whose weight is an embedding's, and whose bias is its parent's, as in BERT for masked words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 24)
        self.head = nn.Linear(24, 13)
        self.head.weight = self.embedding.weight
        self.bias = self.head.bias

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, through_pickle, through_torch_save])
def test_ties_stay(copied: Callable[[nn.Module], nn.Module], kind: torch_ext.nn.PackedDtype) -> None:
    plain = Tied()
    model = copied(torch_ext.optimize(copy.deepcopy(plain), kind))
    ids = torch.arange(13)
    tolerance = {"rtol": 0.05, "atol": 0.1}
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(ids), **tolerance)
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    assert state["head.bias"].data_ptr() == state["bias"].data_ptr()
    names = [[name for name, _ in one.named_parameters(remove_duplicate=False)] for one in (model, plain)]
    assert sorted(names[0]) == sorted(names[1])
    # Writes to what is tied, which have no version here, take effect.
    for write in (
        lambda: (model.embedding.weight.data.mul_(2), model.bias.data.add_(1)),
        lambda: (model.state_dict()["head.weight"].mul_(0.5), model.state_dict()["head.bias"].sub_(1)),
        lambda: model.load_state_dict({"embedding.weight": torch.ones(13, 24), "bias": torch.ones(13)}, strict=False),
        lambda: model.load_state_dict({name: torch.randn_like(tensor) for name, tensor in expected.items()}),
        lambda: model.half().float(),
    ):
        write()
        with torch.no_grad():
            weight, bias = model.embedding.weight, model.bias
            expected_logits = nn.functional.linear(model.embedding(ids), weight, bias)
            torch.testing.assert_close(model(ids), expected_logits, rtol=0.05, atol=0.3)
        assert model.head.bias is bias
    model.head.weight, model.head.bias = model.embedding.weight, model.bias  # As tie_weights() does.
    with pytest.raises(RuntimeError, match="weight cannot be assigned"):
        model.head.weight = nn.Parameter(torch.ones(13, 24))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_weight_may_be_resized(kind: torch_ext.nn.PackedDtype, bias: bool, generator: torch.Generator) -> None:
    """As by ``resize_token_embeddings`` of transformers, which reads the shape of the weight to resize the bias."""
    model = nn.ModuleDict({"embedding": nn.Embedding(13, 24), "head": nn.Linear(24, 13, bias=bias), "own": nn.Module()})
    model["head"].weight = model["embedding"].weight
    if bias:
        model["own"].bias = model["head"].bias
    torch_ext.optimize(model, kind)
    model["embedding"].weight.data = torch.randn(17, 24, generator=generator)
    assert model["head"].weight.shape == (17, 24)
    if bias:
        model["head"].bias.data = nn.functional.pad(model["head"].bias.data, (0, 4))
    x = torch.randn(3, 24, generator=generator)
    result = model["head"](x)
    expected = nn.functional.linear(x, model["embedding"].weight, model["head"].bias)
    assert nn.functional.cosine_similarity(result, expected).min() > 0.995
    assert model["head"].out_features == 17
    assert torch.equal(copy.deepcopy(model)["head"](x), result)


def test_load_by_assignment_ends_a_tie() -> None:
    model = torch_ext.optimize(Tied())
    state = {name: torch.full_like(tensor, index) for index, (name, tensor) in enumerate(model.state_dict().items())}
    model.load_state_dict(state, assign=True)
    assert model.state_dict()["head.weight"].unique().tolist() == [float(list(state).index("head.weight"))]
    assert model.state_dict()["embedding.weight"].unique().tolist() == [float(list(state).index("embedding.weight"))]


def test_offloaded_models_are_refused() -> None:
    """By hooks as those of accelerate, which replace forward() and may leave weights on the meta device."""
    model = nn.Sequential(nn.Linear(24, 13), nn.Linear(13, 5))
    for layer in model:
        layer._hf_hook, layer._old_forward = object(), layer.forward
        layer.forward = lambda x, layer=layer: layer._old_forward(x)
    with pytest.raises(ValueError, match=r"optimize: 0 has a hook of accelerate.*remove_hook_from_submodules\(model\)"):
        torch_ext.optimize(model)
    for layer in model:
        layer.forward = layer._old_forward
        del layer._hf_hook, layer._old_forward
    torch_ext.optimize(model)
    assert all(isinstance(layer, PackedLinear) for layer in model)


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
        (TypeError, "0.mlp.up: expected fp32, bf16 or fp16, got", lambda model: torch_ext.optimize(model.double())),
        (TypeError, "expected a torch.nn.Module, got str", lambda model: torch_ext.optimize("model")),
        (TypeError, "expected a torch.nn.Module, got SimpleNamespace: pass its .model$",  # A pipeline, for one.
         lambda model: torch_ext.optimize(SimpleNamespace(task="fill-mask", model=model))),
        (TypeError, "expected fp32, bf16 or fp16", lambda model: PackedLinear(torch.ones(3, 4).double())),
        (ValueError, r"expected weight \[N, K\]", lambda model: PackedLinear(torch.ones(3))),
        (ValueError, r"bias \[N\]", lambda model: PackedLinear(torch.ones(3, 4), torch.ones(4))),
        (TypeError, "expected a torch.Tensor, got list", lambda model: PackedLinear([[1.0]])),
        (TypeError, "a name or pattern of layers, or .* got int", lambda model: torch_ext.optimize(model, skip=[1])),
        (TypeError, "a name or pattern of layers, .* NoneType", lambda model: torch_ext.optimize(model, skip=None)),
        (TypeError, r"a list of inputs as sample, got dict: pass \[sample\]",
         lambda model: torch_ext.optimize(model, "int8", accuracy=0.9, sample={"input": torch.ones(2, 24)})),
        (TypeError, "a list of inputs as sample, got Tensor",
         lambda model: torch_ext.optimize(model, "int8", accuracy=0.9, sample=torch.ones(2, 24))),
        (TypeError, "a number as accuracy, got str",
         lambda model: torch_ext.optimize(model, "int8", accuracy="0.9", sample=[torch.ones(2, 24)])),
        (ValueError, "more is a LazyLinear whose weights are made at the first call",
         lambda model: torch_ext.optimize(nn.ModuleDict({"model": model, "more": nn.LazyLinear(3)}))),
        (ValueError, "optimize: 1: cannot quantize .*: row 2 holds",
         lambda model: (model[1].weight.data[2, 3].fill_(torch.nan), torch_ext.optimize(model, "int8"))),
    ],
)  # fmt: skip
def test_errors_leave_the_model_alone(
    model: nn.Sequential, error: type[Exception], match: str, call: Callable[[nn.Module], object]
) -> None:
    with pytest.raises(error, match=match):
        call(model)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 3
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sample_may_be_an_iterator(model: nn.Sequential, generator: torch.Generator) -> None:
    inputs = [torch.randn(6, 24, generator=generator) for _ in range(2)]
    optimized = torch_ext.optimize(model, "int8", accuracy=0.5, sample=iter(inputs))
    assert isinstance(optimized[1], PackedLinear)


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_module_equals_eager(model: nn.Sequential, generator: torch.Generator, dynamic: bool) -> None:
    torch_ext.optimize(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    with torch.inference_mode():
        for rows in (6, 9):
            x = torch.randn(rows, 24, generator=generator)
            torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.02)


@pytest.mark.compile
def test_compiled_fp16_model_that_reads_dtypes(generator: torch.Generator) -> None:
    """As T5 does; what is compiled does not unpack the weight for it."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(24, 13)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.linear.weight
            assert isinstance(weight, Tensor)
            assert weight.shape[1] == x.shape[-1]
            return self.linear(x.to(weight.dtype))

    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        return aot_module_simplified(graph, inputs, fw_compiler=compiler)

    from torch._functorch.aot_autograd import aot_module_simplified

    model = torch_ext.optimize(Reader().half())
    x = torch.randn(6, 24, generator=generator)
    with torch.inference_mode():
        expected = model(x)
        assert expected.dtype == torch.float16
        for how in (backend, "inductor"):
            actual = torch.compile(model, fullgraph=True, backend=how)(x)
            assert actual.dtype == torch.float16
            torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.compile(model, fullgraph=True, backend=backend)(x).dtype == torch.bfloat16
        values = torch.compile(lambda: model.linear.weight.float() + 1, fullgraph=True, backend=backend)
        assert torch.equal(values(), model.linear.weight.float() + 1)
    ops = [str(node.target) for node in graphs[0].graph.nodes if "torch_ext" in str(node.target)]
    assert ops == ["torch_ext.linear.default"]


@pytest.mark.anywhere
def test_read_only_tensor_in_compiled_code() -> None:
    weight = PackedLinear.from_linear(nn.Linear(24, 13)).weight
    assert isinstance(weight, ReadOnlyTensor)
    assert torch.equal(torch.compile(lambda tensor: tensor * 2, backend="eager")(weight), weight * 2)
