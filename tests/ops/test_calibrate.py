"""Weights of int8 that are rounded for what layers read, and channels that are balanced for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ops.test_encoder import SPEC, SPECS, batch, make_weights
from tests.ops.test_int8 import LAYERS, with_outliers
from torch_ext import Encoder
from torch_ext.encoder.balance import _by_range, _fit, _shift, random_texts
from torch_ext.encoder.calibrate import balanced_weights, calibrated_weights, round_to_inputs, with_random_texts
from torch_ext.encoder.spec import is_matrix, scale_name
from torch_ext.quantize import dequantize_weight, quantize_weight, round_rows
from torch_ext.sensitivity import Mixtures


def inputs(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Rows that move in a few directions, as hidden states do, and a little in all."""
    mixed = torch.randn(rows, width // 6, generator=generator) @ torch.randn(width // 6, width, generator=generator)
    return mixed + 0.3 * torch.randn(rows, width, generator=generator)


def factors_are_right() -> bool:
    """False under QEMU with SVE vectors of 512 bits: OpenBLAS is wrong there."""
    matrix = torch.eye(150) + 0.5
    factor = torch.linalg.cholesky_ex(matrix)[0]
    return torch.allclose(factor @ factor.T, matrix, atol=1e-3)


def test_errors_make_up_for_one_another(generator: torch.Generator) -> None:
    weight = torch.randn(70, 150, generator=generator)  # More than one block of columns, and not whole ones.
    x = inputs(2000, 150, generator)
    seen, unseen = x[:1500], x[1500:]
    q, scale, left = round_to_inputs(weight, seen, torch.rand(1500, generator=generator) + 0.5)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, (70, 150), torch.float32, (70,))
    assert left.shape == (70,)
    assert int(q.min()) >= -127

    def error(q: Tensor, scale: Tensor) -> float:
        return float((unseen @ weight.T - round_rows(unseen) @ dequantize_weight(q, scale).T).square().mean())

    plain = quantize_weight(weight)
    if not factors_are_right():
        assert torch.equal(q, plain[0])
        assert torch.equal(scale, plain[1])
        return
    # Of what weights and inputs cost together; the part of the inputs stays.
    assert error(q, scale) < 0.85 * error(*plain)
    values = dequantize_weight(q, scale)
    again = quantize_weight(values)
    assert torch.equal(dequantize_weight(*again), values) or bool((scale < values.abs().amax(1) / 126).any())


@pytest.mark.parametrize("x", [torch.zeros(5, 33), torch.full((5, 33), torch.nan), torch.full((5, 33), 3e38)], ids=str)
def test_inputs_that_say_nothing_round_to_the_nearest(x: Tensor, generator: torch.Generator) -> None:
    weight = torch.randn(7, 33, generator=generator)
    q, scale, left = round_to_inputs(weight, x)
    expected = quantize_weight(weight)
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])
    assert not left.any()


def test_a_wrong_factor_is_not_used(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.linalg.cholesky_ex

    def wrong(matrix: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        factor, failed = right(matrix, **options)
        return factor * 1.01, failed

    monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
    weight, x = torch.randn(7, 33, generator=generator), inputs(200, 33, generator)
    assert torch.equal(round_to_inputs(weight, x)[0], quantize_weight(weight)[0])


def test_the_bias_makes_up_for_the_mean(generator: torch.Generator) -> None:
    """All inputs lie about -1, as those after a shift: what rounding does to their mean is known, and taken out."""
    weight = torch.randn(9, 64, generator=generator)
    x = 0.05 * torch.randn(500, 64, generator=generator) - 1
    q, scale, left = round_to_inputs(weight, x)
    errors = round_rows(x) @ dequantize_weight(q, scale).T + left - x @ weight.T
    assert float(errors.mean(0).abs().max()) < 1e-4
    assert float(left.abs().max()) > 1e-2


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh"])
def test_a_shift_centers_what_activations_give(activation: str, generator: torch.Generator) -> None:
    x = torch.randn(200, 64, generator=generator)
    x = {"gelu": torch.nn.functional.gelu, "relu": torch.relu, "tanh": torch.tanh}[activation](2 * x)
    weight = torch.randn(16, 64, generator=generator)
    shift = _shift(x, weight, None)
    assert float(torch.tensor(shift).bfloat16()) == shift

    def lost(shift: float) -> float:
        return float(((round_rows(x + shift) - (x + shift)) @ weight.T).square().mean())

    assert lost(shift) < {"gelu": 0.5, "relu": 0.7, "tanh": 1.01}[activation] * lost(0)
    assert _shift(x * torch.nan, weight, None) == _shift(x * 0, weight, None) == 0


def test_a_shift_is_taken_out_with_the_weights_that_are_used(generator: torch.Generator) -> None:
    """Else a layer would lack the product of its weights' rounding errors and the shift, the same in every row."""
    weights = make_weights(SPEC, generator)
    ids, bounds, types = batch(generator)
    for index in range(SPEC.num_layers):
        name = f"layers.{index}.ffn"
        weights[f"{name}.shift"] = torch.full((SPEC.intermediate_size,), -1.0)
        weights[f"{name}.down.bias"] = weights[f"{name}.down.bias"] + weights[f"{name}.down.weight"].sum(1)
    encoder = Encoder(SPEC, weights, "int8")
    found = encoder.weights()
    for index in range(SPEC.num_layers):
        name = f"layers.{index}.ffn.down"
        used = dequantize_weight(found[f"{name}.weight"], found[scale_name(f"{name}.weight")])
        lost = (weights[f"{name}.weight"] - used).sum(1)
        torch.testing.assert_close(found[f"{name}.bias"], weights[f"{name}.bias"] - lost)
    assert torch.equal(Encoder(SPEC, found, "int8")(ids, bounds, types), encoder(ids, bounds, types))
    assert torch.equal(encoder.run_reference(ids, bounds, types), encoder(ids, bounds, types))


def test_few_inputs_and_rows_of_zeros(generator: torch.Generator) -> None:
    weight = torch.randn(9, 64, generator=generator)
    weight[4] = 0
    q, scale, _ = round_to_inputs(weight, inputs(3, 64, generator))
    assert bool(torch.isfinite(scale).all())
    assert not dequantize_weight(q, scale)[4].any()
    weight[2, 5] = torch.inf
    with pytest.raises(ValueError, match="row 2 holds a number that is not finite"):
        round_to_inputs(weight, inputs(3, 64, generator))


@pytest.mark.anywhere
@pytest.mark.long
def test_every_kind_of_encoder_is_nearer(generator: torch.Generator) -> None:
    """Most are, and none is much farther: tiny random models are far from anything that rounding could be fitted to."""
    ratios = []
    for spec in SPECS:
        weights = with_outliers(spec, generator)
        texts = with_random_texts(spec, *batch(generator)[:2])
        balanced = balanced_weights(spec, weights, *texts)
        quantized = calibrated_weights(spec, balanced, *texts)
        assert {name for name, tensor in quantized.items() if tensor.dtype == torch.int8} == {
            name for name in spec.shapes() if is_matrix(name)
        }
        ids, bounds = random_texts(spec)
        ids = ids.flip(0)
        exact = Encoder(spec, weights, "fp32")(ids, bounds)
        same = Encoder(spec, balanced, "fp32")(ids, bounds)
        # Norms over few channels of which one is large: fp32 itself is only so exact, and kernels differ.
        assert ((same - exact).norm(dim=1) / exact.norm(dim=1)).max() < 5e-3

        # Of the usual token: a few whose norms divide by next to nothing would decide about the mean.
        before, after = (
            float((Encoder(spec, used, "int8")(ids, bounds).float() - exact).square().mean(1).median())
            for used in (Encoder.balanced(spec, weights), quantized)
        )
        ratios.append(after / before)
    print([round(ratio, 2) for ratio in ratios])
    assert max(ratios) < 1.2
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 0.9


@pytest.mark.anywhere
def test_fitted_channels_cost_less_than_those_by_range(generator: torch.Generator) -> None:
    """As `_fit` counts it, on rows that it did not see."""
    x = torch.randn(3000, 40, generator=generator) * torch.logspace(-1, 1, 40) + torch.linspace(-3, 3, 40)
    x[::50, 7] *= 30  # A channel that is large in a few rows only.
    weight = torch.randn(60, 40, generator=generator) * torch.logspace(0.5, -0.5, 40)
    seen, unseen = x[:2000], x[2000:]
    center, scale = _by_range(seen, centered=True)
    fitted = _fit(seen[::2], torch.ones(1000), weight, center, scale, centered=True)

    def cost(center: Tensor, scale: Tensor) -> float:
        rows = (unseen - center) / scale
        made = weight * scale
        values = dequantize_weight(*quantize_weight(made))
        return float((round_rows(rows) @ values.T - rows @ made.T).square().mean())

    assert cost(*fitted) < 0.8 * cost(center, scale)
    kept, _ = _fit(seen, torch.ones(2000), weight, torch.zeros(40), scale, centered=False)
    assert not kept.any()
    broken = _fit(seen * torch.nan, torch.ones(2000), weight, center, scale, centered=True)
    assert broken == (center, scale)


@pytest.mark.needs_transformers
def test_mixtures_for_texts(generator: torch.Generator) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
        max_position_embeddings=20,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids, bounds, types = batch(generator)
    mixtures, plain = Mixtures(model, (ids, bounds)), Mixtures(model)
    assert mixtures.names == plain.names == tuple(LAYERS)
    assert not torch.equal(mixtures(())(ids, bounds, types), plain(())(ids, bounds, types))
    kept = mixtures(["layers.1.ffn.up"])
    assert kept.kept_bf16 == ("layers.1.ffn.up",)
    weights = kept.weights()
    assert weights["layers.1.ffn.up.weight"].dtype == torch.bfloat16
    assert scale_name("layers.1.ffn.up.weight") not in weights
    # All in bf16 computes what bf16 does, whatever the channels are.
    exact = Encoder.from_transformers(model, "fp32")(ids, bounds, types)
    torch.testing.assert_close(mixtures(LAYERS)(ids, bounds, types).float(), exact, rtol=0.1, atol=0.05)


def test_texts_are_checked(generator: torch.Generator) -> None:
    weights = make_weights(SPEC, generator)
    with pytest.raises(ValueError, match="expected cu_seqlens from 0 to 3"):
        calibrated_weights(SPEC, weights, torch.tensor([1, 2, 3]), torch.tensor([0, 2], dtype=torch.int32))
