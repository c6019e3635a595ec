"""int8 encoders and layers, and the choice of what stays in bf16."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import torch_ext
from tests.ops.test_encoder import HEAD, SPEC, SPECS, batch, cosine, make_weights, run_plain
from torch_ext import Encoder, EncoderSpec, Head, PackedLinear
from torch_ext.encoder.spec import is_matrix
from torch_ext.quantize import (
    MAX_INT8_INPUTS,
    MAX_ROW_OUTLIERS,
    dequantize_weight,
    quantize_weight,
    round_rows,
    row_limits,
)
from torch_ext.sensitivity import (
    MOST_UNITS,
    AccuracyError,
    Mixtures,
    Report,
    Similarity,
    choose_layers,
    output_rows,
    similarity,
)

PARTS = ("attention.qkv", "attention.out", "ffn.up", "ffn.down")
LAYERS = [f"layers.{index}.{part}" for index in range(SPEC.num_layers) for part in PARTS]


# --- quantized weights ---


def test_quantized_weights_are_near_and_stay_what_they_are(generator: torch.Generator) -> None:
    weight = torch.randn(50, 37, generator=generator) * torch.logspace(-30, 20, 50)[:, None]
    weight[3] = 0
    weight[4] = 1e-38
    q, scale = quantize_weight(weight)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert int(q.min()) >= -127
    values = dequantize_weight(q, scale)
    assert not values[3:5].any()
    # Half a step, and the scale is at most 2^-15 larger than the largest magnitude over 127.
    rows = [row for row in range(50) if row not in (3, 4)]
    assert bool(((values - weight).abs() <= 0.5001 * scale[:, None])[rows].all())
    assert bool((scale <= weight.abs().amax(1) / 127 * (1 + 2.0**-15))[rows].all())
    assert bool((q.abs().amax(1) == 127)[rows].all())
    again = quantize_weight(values)
    assert torch.equal(again[0], q)
    assert torch.equal(again[1], scale)
    weight[7, 1] = torch.nan
    with pytest.raises(ValueError, match="row 7 holds a number that is not finite"):
        quantize_weight(weight)


# --- Encoder ---


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_encoder_is_near_plain_pytorch(spec: EncoderSpec, generator: torch.Generator) -> None:
    weights = make_weights(spec, generator)
    ids, bounds, types = batch(generator)
    if spec.type_vocab_size < 2:
        types = torch.zeros_like(types)
    encoder = Encoder(spec, weights, "int8")
    hidden = encoder(ids, bounds, types)
    assert hidden.dtype == torch.bfloat16
    # Steps of 1/127 of the largest of some 40 numbers: an error of 0.5 % a matrix, which adds up over the layers.
    assert cosine(hidden, run_plain(spec, weights, ids, bounds, types)) > 0.997
    plain = encoder.run_reference(ids, bounds, types)
    if spec.norm_first:
        # One op rounds residuals at other places than several do, which may move a number by one step of int8.
        assert cosine(hidden, plain) > 0.998
    else:
        assert torch.equal(hidden, plain)
    # What is quantized is exactly the linear layers.
    stored = encoder.weights()
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.int8} == {
        name for name in spec.shapes() if is_matrix(name)
    }
    assert {f"{name}.weight" for name in encoder.linear_names} == {name for name in stored if is_matrix(name)}
    assert stored["embeddings.word"].dtype == torch.bfloat16


def with_outliers(spec: EncoderSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of which a few channels of the norms stand out, as those of trained models do."""
    weights = make_weights(spec, generator)
    for name, tensor in weights.items():
        if name.endswith("norm.weight"):
            tensor[:2] *= 5
        elif name.endswith("norm.bias"):
            tensor[2:4] += 2
    return weights


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_balanced_weights_compute_the_same(spec: EncoderSpec, generator: torch.Generator) -> None:
    weights = with_outliers(spec, generator)
    balanced = Encoder.balanced(spec, weights)
    # Tiny random models may have layers that are best without a shift.
    shifts = {name for name in spec.optional_shapes() if name.endswith("shift")}
    assert set(balanced) | shifts == {*spec.shapes(), *spec.optional_shapes()}
    changed = {name for name in weights if not torch.equal(weights[name], balanced[name])}
    moved = ("up.weight",) if spec.rms_norm else ("up.weight", "up.bias")
    assert {f"layers.0.ffn.{name}" for name in moved} <= changed
    ids, bounds, types = batch(generator)
    if spec.type_vocab_size < 2:
        types = torch.zeros_like(types)
    exact = Encoder(spec, weights, "fp32")(ids, bounds, types)
    # fp32 either way, rounded at other places.
    torch.testing.assert_close(Encoder(spec, balanced, "fp32")(ids, bounds, types), exact, rtol=1e-3, atol=1e-3)
    # A large model is not in memory twice: what has changed is made when it is looked up.
    matrices = {name for name in changed if name.endswith(".weight") and weights[name].dim() == 2}
    twice = {name: (balanced[name], balanced[name]) for name in matrices}
    held = {name for name, (one, other) in twice.items() if one.data_ptr() == other.data_ptr()}
    assert held <= {"embeddings.projection.weight"}
    assert "layers.0.ffn.up.weight" in matrices - held


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_balanced_rows_have_smaller_peaks(spec: EncoderSpec, generator: torch.Generator) -> None:
    """What int8 costs a row is its largest element over its mean one. On a trained model: tests/deploy."""
    weights = with_outliers(spec, generator)
    ids, bounds, types = batch(generator)
    types = types if spec.type_vocab_size > 1 else torch.zeros_like(types)

    def peaks(used: dict[str, Tensor]) -> dict[str, float]:
        found: dict[str, float] = {}

        def observe(name: str, x: Tensor) -> None:
            if not name.endswith("ffn.down"):  # It has no channels that are balanced.
                found[name] = float((x.abs().amax(1) / x.square().mean(1).sqrt()).mean())

        Encoder(spec, used, "fp32").run_reference(ids, bounds, types, observe=observe)
        return found

    before, after = peaks(weights), peaks(Encoder.balanced(spec, weights))
    assert {name for name in before if name.endswith("ffn.up")} == {
        f"layers.{i}.ffn.up" for i in range(spec.num_layers)
    }
    assert before.keys() == after.keys()
    assert sum(after.values()) < 0.88 * sum(before.values())


def test_balanced_encoders_are_saved_and_those_of_before_load(generator: torch.Generator, tmp_path: Path) -> None:
    weights = with_outliers(SPEC, generator)
    ids, bounds, types = batch(generator)
    for name, used in (("balanced", Encoder.balanced(SPEC, weights)), ("before", weights)):
        encoder = Encoder(SPEC, used, "int8", "layers.1.ffn.down")
        encoder.save(tmp_path / name)
        assert ("layers.0.ffn.residual_scale" in load_file(tmp_path / name)) == (name == "balanced")
        for other in (Encoder.load(tmp_path / name, "int8"), pickle.loads(pickle.dumps(encoder))):
            assert other.kept_bf16 == ("layers.1.ffn.down",)
            assert torch.equal(other(ids, bounds, types), encoder(ids, bounds, types))
    with pytest.raises(ValueError, match=r"expected layers.0.ffn.residual_scale \[32\], got \[31\]"):
        Encoder(SPEC, {**weights, "layers.0.ffn.residual_scale": torch.ones(31)}, "int8")


def test_all_layers_kept_is_the_bf16_encoder(generator: torch.Generator) -> None:
    weights = make_weights(SPEC, generator)
    ids, bounds, types = batch(generator)
    kept = Encoder(SPEC, weights, "int8", keep_bf16="*")
    assert kept.kept_bf16 == kept.linear_names
    assert torch.equal(kept(ids, bounds, types), Encoder(SPEC, weights, "bf16")(ids, bounds, types))
    assert not torch.equal(kept(ids, bounds, types), Encoder(SPEC, weights, "int8")(ids, bounds, types))


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ((), []),
        ("layers.0.ffn.down", ["layers.0.ffn.down"]),
        (["layers.1.attention.qkv", "layers.0.ffn.up"], ["layers.0.ffn.up", "layers.1.attention.qkv"]),
        ("*.down", ["layers.0.ffn.down", "layers.1.ffn.down"]),
        ("layers.1", LAYERS[4:]),
        ("layers.?.attention", [name for name in LAYERS if "attention" in name]),
    ],
)
def test_layers_by_name(generator: torch.Generator, patterns: Any, kept: list[str]) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator), "int8", patterns)
    assert list(encoder.kept_bf16) == kept
    stored = encoder.weights()
    for name in LAYERS:
        assert stored[f"{name}.weight"].dtype == (torch.bfloat16 if name in kept else torch.int8)
        assert (f"{name}.weight_scale" in stored) == (name not in kept)
    assert ("in bf16" in repr(encoder)) == bool(kept)


def test_embedding_projection_is_int8(generator: torch.Generator) -> None:
    spec = dataclasses.replace(SPEC, embedding_size=20)
    encoder = Encoder(spec, make_weights(spec, generator), "int8", "layers")
    assert encoder.weights()["embeddings.projection.weight"].dtype == torch.int8
    assert list(encoder.kept_bf16) == LAYERS


def test_encoder_errors(generator: torch.Generator) -> None:
    weights = make_weights(SPEC, generator)
    quantized = Encoder(SPEC, weights, "int8").weights()
    name = "layers.0.ffn.up.weight"
    for match, arguments in (
        ("keep_bf16 names no linear layer: layers.2, norm; there are lay", (weights, "int8", ["layers.2", "norm"])),
        ("keep_bf16 means nothing with dtype='bf16'", (weights, "bf16", "layers.0")),
        ("expected fp32 or bf16 weights for dtype='bf16', got int8", (quantized, "bf16")),
        ("expected fp32 or bf16 weights for dtype='fp32', got int8", (quantized, "fp32")),
        ("cannot keep layers.1.ffn.up in bf16, being quantized already", (quantized, "int8", "layers.1.ffn.up")),
        ("missing .'layers.0.ffn.up.weight_scale'.", ({**weights, name: quantized[name]}, "int8")),
        ("unexpected .'layers.0.ffn.up.weight_scale'.", ({**quantized, name: weights[name]}, "int8")),
        (r"ffn.up.weight_scale \[56\], got \[1\]", ({**quantized, f"{name}_scale": torch.ones(1)}, "int8")),
        ("weight_scale of fp32", ({**quantized, f"{name}_scale": torch.ones(56).bfloat16()}, "int8")),
        ("embeddings.word of fp32 or bf16", ({**weights, "embeddings.word": torch.ones(50, 32).char()}, "int8")),
        ("row 0 holds a number that is not finite", ({**weights, name: weights[name] * torch.inf}, "int8")),
    ):
        with pytest.raises(ValueError, match=match):
            Encoder(SPEC, *arguments)


@pytest.mark.parametrize("keep", [(), "layers.0.ffn"])
def test_save_load_pickle_and_copy(generator: torch.Generator, tmp_path: Path, keep: Any) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator), "int8", keep)
    head = Head(HEAD, make_weights(HEAD, generator), "int8")
    assert head.dtype == "bf16"
    path = tmp_path / "encoder.safetensors"
    encoder.save(path, head)
    stored = load_file(path)
    assert stored["layers.1.ffn.up.weight"].dtype == torch.int8
    assert stored["layers.1.ffn.up.weight_scale"].shape == (56,)
    assert stored["layers.0.ffn.up.weight"].dtype == (torch.bfloat16 if keep else torch.int8)
    assert stored["head.out.weight"].dtype == torch.bfloat16

    ids, bounds, types = batch(generator)
    hidden = encoder(ids, bounds, types)
    for other in (Encoder.load(path, "int8"), pickle.loads(pickle.dumps(encoder)), copy.deepcopy(encoder)):
        assert (other.dtype, other.kept_bf16) == ("int8", encoder.kept_bf16)
        assert torch.equal(other(ids, bounds, types), hidden)
        assert all(torch.equal(tensor, other.weights()[name]) for name, tensor in encoder.weights().items())
    for dtype in ("int8", "bf16"):
        again = Head.load(path, dtype)
        assert again is not None
        assert torch.equal(again(hidden, bounds[:-1]), head(hidden, bounds[:-1]))
    for dtype in ("bf16", "fp32"):
        with pytest.raises(ValueError, match=f"holds int8 weights, {dtype} was asked for: load the {dtype} file"):
            Encoder.load(path, dtype)
    with pytest.raises(ValueError, match="holds int8 weights, fp32 was asked for"):
        Head.load(path, "fp32")
    with pytest.raises(ValueError, match="expected a head of hidden_size=32, bf16, got 32, fp32"):
        encoder.save(path, Head(HEAD, make_weights(HEAD, generator), "fp32"))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_other_files_are_quantized_when_loaded(
    generator: torch.Generator, tmp_path: Path, dtype: torch_ext.encoder.Dtype
) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator), dtype)
    encoder.save(tmp_path / "a")
    loaded = Encoder.load(tmp_path / "a", "int8")
    assert loaded.kept_bf16 == ()
    ids, bounds, types = batch(generator)
    expected = Encoder(SPEC, Encoder.balanced(SPEC, encoder.weights()), "int8")(ids, bounds, types)
    assert torch.equal(loaded(ids, bounds, types), expected)


@pytest.mark.compile
def test_compiled_encoder_equals_eager(generator: torch.Generator) -> None:
    encoder = Encoder(SPEC, make_weights(SPEC, generator), "int8", "layers.1.ffn")
    compiled = torch.compile(lambda *arguments: encoder(*arguments), fullgraph=True)
    ids, bounds, types = batch(generator)
    with torch.no_grad():
        assert cosine(compiled(ids, bounds, types), encoder(ids, bounds, types)) > 0.9999


# --- sums of 32 bits ---


def test_the_widest_input_is_summed_exactly() -> None:
    """127^2 times 133,144 is the last to fit below 2^31."""
    assert MAX_INT8_INPUTS == 133144
    weight, x = torch.full((2, MAX_INT8_INPUTS), 0.01), torch.ones(1, MAX_INT8_INPUTS)
    weight[1] = -0.01
    expected = torch.tensor([[1331.44, -1331.44]])
    for packed in (
        torch_ext.pack_linear_weight_int8(weight),
        torch_ext.pack_linear_weight_int8(*quantize_weight(weight)),
    ):
        torch.testing.assert_close(torch_ext.linear(x, packed), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(torch_ext.linear(-x, packed), -expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(PackedLinear(weight, dtype="int8")(x), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("inputs", [MAX_INT8_INPUTS + 1, 133152, 140000])
def test_inputs_too_wide_are_refused_before_anything_changes(inputs: int, generator: torch.Generator) -> None:
    weight = torch.full((1, inputs), 0.01)
    linear = nn.Linear(inputs, 1)
    model = nn.Sequential(nn.Linear(4, 4), linear)
    spec = dataclasses.replace(SPEC, intermediate_size=inputs, num_layers=1)
    weights = make_weights(spec, generator)
    too_wide = f"K at most 133144 for int8, got K={inputs}.*leave this layer in bf16"
    calls: list[Callable[[], object]] = [
        lambda: torch_ext.pack_linear_weight_int8(weight),
        lambda: torch_ext.pack_linear_weight_int8(weight.char(), torch.ones(1)),
        lambda: quantize_weight(weight),
        lambda: PackedLinear(weight, dtype="int8"),
        lambda: PackedLinear.from_linear(linear, "int8"),
        lambda: Encoder(spec, weights, "int8"),
        lambda: torch_ext.optimize(model, "int8"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=too_wide):
            call()
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch_ext.optimize(model, "int8", keep_bf16="1")
    assert [layer.dtype for layer in model] == ["int8", "bf16"]
    assert Encoder(spec, weights, "int8", "*.down").kept_bf16 == ("layers.0.ffn.down",)


# --- numbers that are not finite ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinity_gives_what_fp32_gives(dtype: torch.dtype, generator: torch.Generator) -> None:
    for inputs in (1, 7, 48, 131):
        weight = torch.randn(21, inputs, generator=generator)
        weight[:, ::3] = weight[:, ::3].round()  # Zeros among them: infinity times zero is NaN.
        packed = torch_ext.pack_linear_weight_int8(weight)
        exact = dequantize_weight(*torch_ext.unpack_linear_weight_int8(packed))
        x = torch.randn(2 * inputs + 2, inputs, generator=generator).to(dtype)
        for place in range(inputs):
            x[2 * place, place] = torch.inf if place % 2 else -torch.inf
        x[-1, inputs // 2] = torch.nan
        result = torch_ext.linear(x, packed)
        # Element by element: a BLAS may multiply infinities with padding of its own.
        expected = (x.float()[:, None, :] * exact).sum(dim=-1)
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.isposinf(), expected.isposinf())
        assert torch.equal(result.isneginf(), expected.isneginf())
        # Rows beside those are as they would be without them.
        finite = x[1:-1:2].contiguous()
        torch.testing.assert_close(result[1:-1:2], torch_ext.linear(finite, packed), rtol=2.0**-7, atol=0)


def test_infinities_of_one_sign_add_up() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.5, -1.0], [-1.0, -2.0, 0.5, 1.0]])
    packed = torch_ext.pack_linear_weight_int8(weight)
    x = torch.tensor([[torch.inf, torch.inf, 3.0, 4.0], [torch.inf, 1.0, 3.0, -torch.inf]])
    assert torch.equal(torch_ext.linear(x, packed), torch.tensor([[torch.inf, -torch.inf]] * 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [3, 64, 150])
def test_outliers_of_a_row_keep_their_precision(dtype: torch.dtype, inputs: int, generator: torch.Generator) -> None:
    rows = 60
    x = torch.randn(rows, inputs, generator=generator)
    for row in range(rows):
        for place in torch.randint(inputs, (row % 7,), generator=generator):
            x[row, place] = (-1) ** row * (40 + row)
    x[0], x[1], x[1, 0] = 0, 1, 2  # Half of the largest is no outlier.
    x = x.to(dtype)
    limits, at = row_limits(x.float())
    above = x.float().abs() > x.float().abs().amax(1, keepdim=True) / 2
    for row in range(rows):
        few = int(above[row].sum()) <= MAX_ROW_OUTLIERS
        rest = x[row].float().abs().masked_fill(above[row], 0) if few else x[row].float().abs()
        assert float(limits[row]) == float(rest.max())
        assert float(limits[row]) in (0, abs(float(x[row, at[row]])))
    # What an identity matrix gives is what a layer multiplies.
    read = torch_ext.linear(x, torch_ext.pack_linear_weight_int8(torch.eye(inputs)), out_dtype=torch.float32)
    apart = x.float().abs() > limits[:, None]
    assert int(apart.sum()) > 40
    torch.testing.assert_close(read[apart], x[apart].float(), rtol=1e-4, atol=0)
    # Numbers between two steps may take either.
    lost = (read - x.float()).abs()
    half = limits[:, None] / 254
    assert bool((lost <= half * 1.002 + x.float().abs() * 1e-4).all())
    torch.testing.assert_close(lost.sum(), (round_rows(x.float()) - x.float()).abs().sum(), rtol=0.02, atol=1e-3)


# --- PackedLinear and optimize() ---


def exact_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """What int8 means, in fp64: weights by row, inputs by row."""
    values = dequantize_weight(*quantize_weight(linear.weight.detach())).double()
    rows = round_rows(x.float().flatten(0, -2)).double().view(x.shape)
    return F.linear(rows, values, None if linear.bias is None else linear.bias.double())


def test_layer(generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (True, False):
            linear = nn.Linear(48, 13, bias=bias, dtype=dtype)
            layer = PackedLinear.from_linear(linear, "int8")
            assert f"in_features=48, out_features=13, bias={bias}, dtype=int8" in repr(layer)
            assert layer.weight.dtype == dtype
            x = torch.randn(2, 3, 48, generator=generator).to(dtype)
            result = layer(x)
            assert result.dtype == dtype
            # A number of the input that lies between two steps may take either: one step of a few products.
            torch.testing.assert_close(
                result.double(), exact_linear(x, linear).detach(), rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-5,
                atol=float(x.abs().max()) / 127 * float(linear.weight.detach().abs().max()),
            )  # fmt: skip


class Net(nn.Module):
    """Three linear layers; the second has columns, and the first rows, that int8 cannot resolve beside the others.

    They are more than the outliers that are kept apart.
    """

    def __init__(self, outlier: float = 1.0) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.first.weight[5:11] *= outlier
            self.first.bias[5:11] *= outlier
            self.second.weight[:, 5:11] /= outlier

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(self.first(x))))


def test_optimize(generator: torch.Generator) -> None:
    model = Net()
    x = torch.randn(9, 32, generator=generator)
    expected = model(x).detach()
    original = copy.deepcopy(model.state_dict())
    assert torch_ext.optimize(model, "int8", skip="third", keep_bf16="second") is model
    assert type(model.third) is nn.Linear
    assert [module.dtype for module in (model.first, model.second)] == ["int8", "bf16"]
    assert similarity([expected], [model(x)]).min > 0.999

    state = model.state_dict()
    assert list(state) == list(original)
    assert torch.equal(state["first.weight"], dequantize_weight(*quantize_weight(original["first.weight"])))
    assert torch.equal(state["second.weight"], original["second.weight"].bfloat16().float())
    assert torch.equal(state["first.bias"], original["first.bias"])
    fresh = Net()
    fresh.load_state_dict(state)
    assert similarity([fresh(x)], [model(x)]).min > 0.999
    # Packed again from what it holds itself: the same bits.
    other = torch_ext.optimize(Net(), "int8", skip="third", keep_bf16="second")
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    broken = {**state, "first.weight": torch.full((48, 32), torch.nan)}
    with pytest.raises(RuntimeError, match=r"first\.weight: cannot quantize a weight to int8: row 0"):
        other.load_state_dict(broken)


def test_another_dtype_of_packed_layers_is_refused(generator: torch.Generator) -> None:
    x = torch.randn(9, 32, generator=generator)
    bf16, int8 = torch_ext.optimize(Net()), torch_ext.optimize(Net(), "int8")
    mixed = torch_ext.optimize(Net(), "int8", keep_bf16="second")
    partly = torch_ext.optimize(Net(), skip="third")
    layer = torch_ext.optimize(nn.Linear(3, 3))
    sample = {"accuracy": 0.9, "sample": [x]}
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], str]] = [
        (bf16, ("int8",), {}, r"first and 2 more layers: expected int8 .*got bf16: .*in skip or keep_bf16"),
        (bf16, ("int8",), {"skip": "first"}, "second and 1 more layers: expected int8"),
        (bf16, ("int8",), {"keep_bf16": ["first", "second"]}, "optimize: third: expected int8"),
        (bf16, ("int8",), sample, "expected int8"),
        (int8, ("bf16",), {}, r"first and 2 more layers: expected bf16 .*got int8: .*in skip$"),
        (int8, (), {}, "expected bf16"),
        (int8, ("int8",), {"keep_bf16": "second"}, "optimize: second: expected bf16"),
        (mixed, ("int8",), {}, "optimize: second: expected int8"),
        (mixed, ("bf16",), {}, "first and 1 more layers: expected bf16"),
        (partly, ("int8",), {}, "first and 1 more layers: expected int8"),
        (layer, ("int8",), {}, "the model: expected int8"),
    ]
    for model, arguments, options, match in calls:
        before, expected = list(model.modules()), None if model is layer else model(x)
        with pytest.raises(ValueError, match=match):
            torch_ext.optimize(model, *arguments, **options)
        assert all(a is b for a, b in zip(before, model.modules(), strict=True))
        assert expected is None or torch.equal(model(x), expected)
    assert type(partly.third) is nn.Linear


def test_packed_layers_may_stay_what_they_are() -> None:
    for model, arguments, options, expected in (
        (torch_ext.optimize(Net()), ("bf16",), {}, ["bf16"] * 3),
        (torch_ext.optimize(Net(), "int8"), ("int8",), {}, ["int8"] * 3),
        (torch_ext.optimize(Net(), "int8", keep_bf16="second"), ("int8",), {"keep_bf16": "second"}, None),
        (torch_ext.optimize(Net(), skip="third"), ("bf16",), {}, ["bf16"] * 3),
        (torch_ext.optimize(Net(), skip="third"), ("int8",), {"skip": ["first", "second"]}, ["bf16", "bf16", "int8"]),
        (torch_ext.optimize(Net(), skip="third"), ("int8",), {"keep_bf16": ["fi*", "se*"]}, ["bf16", "bf16", "int8"]),
        (torch_ext.optimize(Net(), "int8", skip="third"), (), {"skip": ["first", "second"]}, ["int8", "int8", "bf16"]),
    ):  # fmt: skip
        before = [layer for layer in model.children() if isinstance(layer, PackedLinear)]
        assert torch_ext.optimize(model, *arguments, **options) is model
        assert [layer.dtype for layer in model.children()] == (expected or ["int8", "bf16", "int8"])
        assert all(layer in list(model.children()) for layer in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_exact(
    copied: Callable[[nn.Module], nn.Module], dtype: torch.dtype, generator: torch.Generator
) -> None:
    model = torch_ext.optimize(Net().to(dtype), "int8", keep_bf16="second")
    x = torch.randn(9, 32, generator=generator).to(dtype)
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert [module.dtype for module in (other.first, other.second)] == ["int8", "bf16"]


def test_shared_layers_and_weights() -> None:
    model = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)])
    model.append(model[0])
    model[1].weight = model[0].weight
    model[2].weight = model[0].weight
    torch_ext.optimize(model, "int8", keep_bf16="2")
    assert model[3] is model[0]
    assert model[1]._packed is model[0]._packed
    assert model[2]._packed is not model[0]._packed
    assert [module.dtype for module in model] == ["int8", "int8", "bf16", "int8"]


def test_accuracy_keeps_the_layers_that_need_it(generator: torch.Generator) -> None:
    model = Net(outlier=100.0)
    model.train()
    sample = [torch.randn(40, 32, generator=generator) for _ in range(2)]
    exact = [output_rows(model, x) for x in sample]
    every = torch_ext.optimize(copy.deepcopy(model), "int8")
    bad = similarity(exact, [output_rows(every, x) for x in sample])
    assert bad.mean < 0.995
    reports: list[Report] = []
    torch_ext.optimize(model, "int8", accuracy=0.999, sample=sample, report=reports.append)
    (report,) = reports
    # The row of the input to the second layer holds one large number, and all others are small beside it.
    assert report.kept == ("second",)
    assert report.layers[0].names == ("second",)
    assert model.second.dtype == "bf16"
    assert model.first.dtype == model.third.dtype == "int8"
    assert not model.training
    assert similarity(exact, [output_rows(model, x) for x in sample]) == report.chosen
    assert report.int8 == bad
    assert report.bf16 is not None
    assert report.chosen.mean >= 0.999 > report.int8.mean
    assert report.passes == 2 + 3 + 1
    text = str(report)
    assert "second  " in text
    assert "damage alone  kept" in text
    # Asked for less, nothing is kept, and one pass tells.
    torch_ext.optimize(Net(), "int8", accuracy=0.9, sample=sample, report=reports.append)
    assert (reports[1].kept, reports[1].layers, reports[1].passes) == ((), (), 1)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (AccuracyError, r"mean cosine of 1, but all linear layers in bf16 reach mean 0\.9", {"accuracy": 1.0}),
        (ValueError, "accuracy above 0 and at most 1, got 1.5", {"accuracy": 1.5}),
        (ValueError, "accuracy and a sample of inputs together", {"accuracy": 0.9, "sample": None}),
        (ValueError, "accuracy and a sample of inputs together", {"accuracy": 0.9, "sample": []}),
        (ValueError, "accuracy and a sample of inputs together", {}),
        (ValueError, "mean nothing with dtype='bf16'", {"dtype": "bf16", "accuracy": 0.9}),
        (ValueError, "mean nothing with dtype='bf16'", {"dtype": "bf16", "sample": None, "keep_bf16": "first"}),
        (ValueError, "keep_bf16 names no nn.Linear of the model: fourth", {"sample": None, "keep_bf16": "fourth"}),
        (ValueError, "not finite", {"accuracy": 0.9, "sample": [torch.full((1, 32), torch.nan)]}),
        (ValueError, "at least one row", {"accuracy": 0.9, "sample": [torch.ones(0, 32)]}),
        (TypeError, "got int", {"accuracy": 0.9, "sample": [3]}),
        (TypeError, "rows of floating-point numbers, got str", {"accuracy": 0.9, "sample": [lambda model: "x"]}),
        (RuntimeError, "shapes cannot be multiplied", {"accuracy": 0.9, "sample": [torch.ones(2, 3)]}),
    ],
)
def test_errors_leave_the_model_alone(error: type[Exception], match: str, options: dict[str, Any]) -> None:
    model = Net()
    before = list(model.modules())
    model.second.eval()
    with pytest.raises(error, match=match):
        torch_ext.optimize(model, **{"dtype": "int8", "sample": [torch.ones(2, 32)], **options})
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    assert (model.training, model.first.training, model.second.training) == (True, True, False)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_measured_as_it_will_run(generator: torch.Generator) -> None:
    """Fused encoder layers of torch would read unpacked weights, and find no error of quantized inputs."""
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    sample = [torch.randn(3, 5, 32, generator=generator)]
    exact = [output_rows(model, x) for x in sample]
    flags = [layer.activation_relu_or_gelu for layer in model.layers]
    with pytest.raises(AccuracyError):
        torch_ext.optimize(model, "int8", accuracy=1.0, sample=sample)
    assert [layer.activation_relu_or_gelu for layer in model.layers] == flags != [0, 0]
    assert model.use_nested_tensor
    reports: list[Report] = []
    torch_ext.optimize(model, "int8", accuracy=0.9, sample=sample, report=reports.append)
    assert similarity(exact, [output_rows(model, x) for x in sample]) == reports[0].chosen


def test_kinds_of_samples(generator: torch.Generator) -> None:
    class Output:
        def __init__(self, **fields: Tensor) -> None:
            self.__dict__.update(fields)

    class Model(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None, kind: str = "last_hidden_state") -> Any:
            return (x, None) if kind == "tuple" else Output(**{kind: x, "other": x})

    model = Model()
    x = torch.randn(2, 3, 4, generator=generator)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(output_rows(model, {"x": x, "attention_mask": mask}), x[mask.bool()])
    assert torch.equal(output_rows(model, {"x": x, "kind": "logits"}), x.reshape(6, 4))
    assert torch.equal(output_rows(model, (x, None, "tuple")), x.reshape(6, 4))
    assert torch.equal(output_rows(model, x), x.reshape(6, 4))
    assert torch.equal(output_rows(model, lambda m: m(x).other.mean(1)), x.mean(1))
    assert torch.equal(output_rows(model, {"x": x, "kind": "scores"}), x.reshape(6, 4))


class Sentences(nn.Sequential):
    """Like a model of sentence-transformers: modules that write into a dictionary."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        assert "sentence_embedding" not in features
        tokens = self[0](features["x"])
        features.update(token_embeddings=tokens, sentence_embedding=tokens.mean(1))
        return features


def test_samples_of_sentences(generator: torch.Generator) -> None:
    model = Sentences(nn.Linear(4, 5))
    sample = {"x": torch.randn(2, 3, 4, generator=generator)}
    tokens = model[0](sample["x"]).detach()
    for _ in range(2):
        assert torch.equal(output_rows(model, sample), tokens.mean(1))
    assert torch.equal(output_rows(nn.Sequential(model[0]), {"input": sample["x"]}), tokens.reshape(6, 5))
    # What encode() returns, by its options.
    rows = tokens.reshape(6, 5)
    for result in (rows.numpy(), rows.to_sparse(), list(tokens), [*rows.numpy()], [*rows]):
        assert torch.equal(output_rows(model, lambda _, result=result: result), rows)
    assert torch.equal(output_rows(model, lambda _: (tokens, tokens[0])), rows)
    for texts in ("a text", ["a text", "another"], [("a query", "a text")]):
        with pytest.raises(TypeError, match=r"got text: pass tokens, or a function .*model.encode\(texts\)"):
            output_rows(model, texts)


def test_both_ends_of_an_answer_count(generator: torch.Generator) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"start_logits": x, "end_logits": -x}

    x = torch.randn(2, 3, generator=generator)
    assert torch.equal(output_rows(Model(), x), torch.cat((x, -x)))


# --- choose_layers() ---


def model_of_damage(damage: dict[str, float], calls: list[frozenset[str]]) -> Callable[[frozenset[str]], Similarity]:
    """A made-up model: damages of layers in int8 add up."""

    def measure(kept: frozenset[str]) -> Similarity:
        calls.append(kept)
        mean = 0.9999 - sum(value for name, value in damage.items() if name not in kept)
        return Similarity(mean, mean - 0.001)

    return measure


def test_the_worst_layers_are_kept_and_no_more() -> None:
    damage = {f"layers.{index}": 0.001 * (index * 7 % 10) for index in range(10)}
    for accuracy in (0.96, 0.98, 0.99, 0.995, 0.9998):
        calls: list[frozenset[str]] = []
        report = choose_layers(list(damage), model_of_damage(damage, calls), accuracy)
        worst = sorted(damage, key=lambda name: -damage[name])
        left = [0.9999 - sum(damage[name] for name in worst[count:]) for count in range(11)]
        needed = next(count for count, mean in enumerate(left) if mean >= accuracy)
        assert list(report.kept) == worst[:needed]
        assert report.chosen.mean >= accuracy
        assert report.passes == len(calls) <= 2 + 10 + 4
        assert report.to_json()["kept_bf16"] == list(report.kept)
    with pytest.raises(AccuracyError, match="ask for less"):
        choose_layers(list(damage), model_of_damage(damage, []), 0.99999)
    with pytest.raises(ValueError, match="at most 1, got 0"):
        choose_layers(list(damage), model_of_damage(damage, []), 0)


def test_other_bounds_of_the_caller_count() -> None:
    def measure(kept: frozenset[str]) -> Similarity:
        return Similarity(0.999, 0.99, acceptable="b" in kept)

    report = choose_layers(["a", "b"], measure, 0.9)
    assert "b" in report.kept


def test_large_models_are_measured_in_groups() -> None:
    names = [f"encoder.layer.{index}.{part}" for index in range(48) for part in PARTS]
    damage = dict.fromkeys(names, 1e-6)
    damage.update({"encoder.layer.13.ffn.down": 0.03, "encoder.layer.40.ffn.up": 0.02})
    calls: list[frozenset[str]] = []
    ranked: list[frozenset[str]] = []
    report = choose_layers(names, model_of_damage(damage, calls), 0.999, model_of_damage(damage, ranked))
    assert report.kept == ("encoder.layer.13.ffn.down", "encoder.layer.40.ffn.up")
    assert report.passes == len(calls) + len(ranked) <= MOST_UNITS + 3 + 8
    assert len(calls) <= 2 + 8
    assert "encoder.layer.7 (4 layers)" in str(report)
    assert {name for layer in report.layers for name in layer.names} == set(names)


def test_similarity_of_rows() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    assert similarity([a], [2 * a]) == Similarity(1.0, 1.0)
    assert similarity([a, a], [a, -a]).min == -1.0
    assert similarity([a], [torch.full_like(a, torch.nan)]).mean == -1.0


def test_similarity_of_scores() -> None:
    """One number alone points the same way, however wrong it is."""
    exact, wrong = (
        [torch.tensor([[1.0], [5.0]]), torch.tensor([[1.0]])],
        [torch.tensor([[5.0], [1.0]]), torch.ones(1, 1)],
    )
    expected = torch.cosine_similarity(torch.tensor([1.0, 5, 1]), torch.tensor([5.0, 1, 1]), 0).item()
    found = similarity(exact, wrong)
    assert found.mean == found.min == pytest.approx(expected)
    assert similarity(exact, exact).min == pytest.approx(1)


@pytest.mark.needs_transformers
def test_mixtures_of_a_transformers_model(generator: torch.Generator) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
        max_position_embeddings=20,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    mixtures = Mixtures(model)
    assert list(mixtures.names) == LAYERS
    ids, bounds, types = batch(generator)
    choices: list[Collection[str]] = [(), LAYERS, ["layers.1.ffn.up"]]
    for kept in choices:
        expected = Encoder.from_transformers(model, "int8", kept)
        made = mixtures(kept)
        assert made.kept_bf16 == expected.kept_bf16 == tuple(kept)
        assert torch.equal(made(ids, bounds, types), expected(ids, bounds, types))
    with pytest.raises(ValueError, match="names no linear layer: pooler"):
        mixtures(["pooler"])
