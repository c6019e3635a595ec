"""What int8 layers read, brought to channels of similar range: exact for the encoder, easier to quantize.

A row is quantized with one scale, that of its largest element. In BERT-family models a few channels of the norms'
output are many times larger than the others, always the same ones, and cost all others their precision. So the norm
writes ``x' = (x - c) / s`` instead of ``x``, with a vector ``c`` and a vector ``s``, and everything that reads it is
changed to match; for the linear layer that reads it that is ``W' = W * s`` and ``b' = b + W c``. Weights are
quantized per output, and have precision to spare. The residual that is added after the layer is ``s * x' + c``: ``s``
becomes ``residual_scale``, which the next norm multiplies with while it adds, and ``c`` goes into the bias that is
added anyway.

What an activation such as GELU gives is hardly ever below 0, so that half of int8's steps would be left unused. A
constant is subtracted after it, ``ffn.shift``, and its product with the weight goes into the bias of the layer that
reads it.

``c`` is the mean of a channel and ``s`` the square root of its range, over texts of random tokens: what the channels
look like is a matter of the model far more than of the text, so no texts are asked for. With texts, :func:`_fit` goes
on from there to what makes the errors least that int8 is expected to cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from torch_ext.encoder.spec import EncoderSpec
from torch_ext.encoder.weights import FP32, LazyWeights
from torch_ext.quantize import round_rows, row_limits

__all__ = ["Observe", "balance", "random_texts"]

Observe = Callable[[str, Tensor], None]
"""Called with the name of a linear layer and its input, ``[T, K]``."""

_PROJECTION = "embeddings.projection"
_EXPONENT = 0.5
_LEAST_RANGE = 0.05
"""Of the mean range: channels that hardly move are not blown up."""

_SHIFTS = 16
"""Constants that are tried, from 0 to twice the middle of a usual row."""
_SHIFTED_ROWS = 256

_FITTED_ROWS = 1024
_STEPS = 60
_RATE = 0.04
_WEIGHTS_SHARE = 0.4
"""Of the weights' rounding errors, what is left once they make up for one another (`calibrate`)."""

_TEXTS = 96
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)


def random_texts(spec: EncoderSpec) -> tuple[Tensor, Tensor]:
    """Texts of random tokens, the same ones at every call.

    Args:
        spec: of the encoder.

    Returns:
        ``input_ids``, i64 ``[T]``, and ``cu_seqlens``, i32 ``[B + 1]``.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [min(_LENGTHS[index % len(_LENGTHS)], spec.max_positions) for index in range(_TEXTS)]
    bounds = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
    return torch.randint(spec.vocab_size, (sum(lengths),), generator=generator, device="cpu"), bounds


def balance(
    spec: EncoderSpec,
    weights: Mapping[str, Tensor],
    run: Callable[[Observe], object],
    row_weights: Tensor | None = None,
) -> Mapping[str, Tensor]:
    """The weights of the same encoder with balanced inputs of its linear layers.

    Args:
        spec: of the encoder.
        weights: fp32 or bf16, by the names of ``spec.shapes()``; not balanced yet.
        run: runs the encoder with ``weights`` on some texts, and calls what it is given with the input of every linear
            layer that reads a norm or an activation.
        row_weights: fp32 ``[T]``, how much each token of the texts counts; None: ranges alone decide, which takes no
            time.

    Returns:
        The weights, those that changed in fp32; with ``residual_scale`` of every layer if norms come after residuals.
        Matrices that changed are made when they are looked up.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # center and scale of every channel
    shifts: dict[str, float] = {}  # by layer

    def observe(name: str, x: Tensor) -> None:
        if name.endswith("ffn.down"):
            if not spec.gated_ffn:
                shifts[name.removesuffix(".down")] = _shift(x, weights[f"{name}.weight"], row_weights)
            return
        if _source(spec, name) is None:
            return
        center, scale = _by_range(x.float(), centered=not spec.rms_norm)
        if row_weights is not None:
            picked = slice(None, None, -(-len(x) // _FITTED_ROWS))
            rows, counts = x[picked].float(), row_weights[picked]
            center, scale = _fit(rows, counts, weights[f"{name}.weight"].float(), center, scale, not spec.rms_norm)
        seen[name] = center, scale

    run(observe)
    changed: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}

    def wide(name: str) -> Tensor:
        return (changed[name] if name in changed else weights[name]).float()

    for name, (center, scale) in seen.items():
        source = _source(spec, name)
        if source is None:
            continue
        weight = wide(f"{name}.weight")
        changed[f"{name}.bias"] = wide(f"{name}.bias") + weight @ center
        if name == _PROJECTION:  # It is a source, too.
            changed[f"{name}.weight"] = weight * scale
        else:
            scales[f"{name}.weight"] = scale
        weight = wide(f"{source}.weight")
        # A norm's weight is a vector; that of a linear layer has a row for each channel.
        changed[f"{source}.weight"] = weight / (scale if weight.dim() == 1 else scale[:, None])
        if not spec.rms_norm:
            changed[f"{source}.bias"] = (wide(f"{source}.bias") - center) / scale
        after = None if spec.norm_first else _adds_residual(name)
        if after is not None:
            changed[f"{after}.bias"] = wide(f"{after}.bias") + center
            changed[f"{after.rpartition('.')[0]}.residual_scale"] = scale
    for name, shift in shifts.items():
        if shift:
            changed[f"{name}.shift"] = torch.full((spec.intermediate_size,), shift, **FP32)
            changed[f"{name}.down.bias"] = wide(f"{name}.down.bias") - shift * wide(f"{name}.down.weight").sum(1)
    return _Balanced(weights, changed, scales)


class _Balanced(LazyWeights):
    """Weights of which some have changed, and some have their columns multiplied when they are looked up.

    So a model is not in memory twice.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], changed: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> None:
        self._weights = weights
        self._changed = changed
        self._scales = scales
        self._names = dict.fromkeys((*weights, *changed))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._changed:
            return self._changed[name]
        tensor, scale = self._weights[name], self._scales.get(name)
        return tensor if scale is None else tensor.float() * scale

    def outline(self, name: str) -> Tensor:
        if name in self._changed:
            return self._changed[name]
        base = self._weights
        tensor = base.outline(name) if isinstance(base, LazyWeights) else base[name]
        return torch.zeros((), **FP32).expand(tensor.shape) if name in self._scales else tensor

    def make(self, name: str, dtype: torch.dtype, passing: bool = False) -> Tensor:
        own = name in self._changed or name in self._scales
        if isinstance(self._weights, LazyWeights) and not own:
            return self._weights.make(name, dtype, passing)
        return self[name].detach().to(dtype, copy=name not in self._scales).contiguous()


def _by_range(x: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    """The center and the scale of every channel, by their means and ranges.

    Args:
        x: fp32 ``[T, K]``.
        centered: whether the centers may be others than 0; the norms of some models have no bias to move channels with.
    """
    center = x.mean(0) if centered else torch.zeros(x.shape[1], **FP32)
    reach = torch.maximum(x.amax(0) - center, center - x.amin(0))
    reach = reach.clamp_min(_LEAST_RANGE * float(reach.mean())).clamp_min(1e-30)
    return center, (reach / reach.log().mean().exp()) ** _EXPONENT


def _fit(
    x: Tensor, counts: Tensor, weight: Tensor, center: Tensor, scale: Tensor, centered: bool
) -> tuple[Tensor, Tensor]:
    """The center and the scale of every channel that make the expected error of the layer's outputs least.

    With ``y = (x - c) / s``, rounding the inputs costs ``mean(max_k |y|²) * sum_k |s W_k|²``, and rounding the weights
    ``sum_n max_k |s W_nk|² * mean |y|²``, with one factor before both. Adam brings the logarithm of their sum down.

    Args:
        x: fp32 ``[T, K]``, what the layer reads.
        counts: fp32 ``[T]``, how much each row counts.
        weight: fp32 ``[N, K]``.
        center: fp32 ``[K]``, to begin with.
        scale: fp32 ``[K]``, to begin with, positive.
        centered: whether ``center`` may change.

    Returns:
        The best ones met; those given if a number is not finite.
    """
    shares = counts / counts.sum()
    mean = shares @ x
    spread = (shares @ (x - mean).square_()).clamp_min(1e-30)
    powers = weight.square().sum(0)
    sizes = weight.abs()
    unit = spread.sqrt()  # Centers move in steps of it, scales in shares of themselves.
    place = torch.stack([scale.log(), torch.zeros_like(scale)])
    first, second = torch.zeros_like(place), torch.zeros_like(place)
    best, least = (center, scale), float("inf")
    for step in range(_STEPS + 1):
        found_center, found = center + place[1] * unit, place[0].exp()
        largest, at = row_limits((x - found_center) / found)
        rows = shares * largest.square()
        highest, column = (sizes * found).max(1)
        highest = highest.square_()
        energy = (spread + (mean - found_center).square()) / found.square()
        inputs = float(rows.sum()), float((found.square() * powers).sum())
        weights = float(highest.sum()), float(energy.sum())
        error = inputs[0] * inputs[1] + _WEIGHTS_SHARE * weights[0] * weights[1]
        if not (math.isfinite(error) and error > 0):
            return best
        if error < least:
            best, least = (found_center, found / found.log().mean().exp()), error
        # Of the error by the logarithm of each scale, and by each center.
        by_scale = 2 * inputs[0] * found.square() * powers - 2 * inputs[1] * torch.zeros_like(scale).index_add_(
            0, at, rows
        )
        by_weight = torch.zeros_like(scale).index_add_(0, column, highest)
        by_scale += 2 * _WEIGHTS_SHARE * (weights[1] * by_weight - weights[0] * energy)
        signs = (x.gather(1, at[:, None])[:, 0] - found_center[at]).sign_()
        moved = torch.zeros_like(scale).index_add_(0, at, shares * largest * signs)
        by_center = -2 * (
            inputs[1] * moved / found + _WEIGHTS_SHARE * weights[0] * (mean - found_center) / found.square()
        )
        slope = torch.stack([by_scale, by_center * unit if centered else torch.zeros_like(scale)]) / error
        first.mul_(0.9).add_(slope, alpha=0.1)
        second.mul_(0.999).addcmul_(slope, slope, value=0.001)
        rate = _RATE * (1 - 0.9 * step / _STEPS)
        place -= rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return best


def _shift(x: Tensor, weight: Tensor, row_weights: Tensor | None) -> float:
    """What to add to all that a layer reads, so that its outputs change least when rows are rounded to int8.

    Each row's error is relative to its output, since a norm follows. Errors are computed, not estimated from ranges,
    because of rows with one huge number: its step is larger than all small numbers, which are rounded the same way.

    Args:
        x: fp32 or bf16 ``[T, K]``, what the layer reads.
        weight: fp32 or bf16 ``[N, K]``.
        row_weights: fp32 ``[T]``, how much each row counts; None: all the same.

    Returns:
        A number that bf16 has exactly; 0 where nothing is better, or a number is not finite.
    """
    picked = slice(None, None, -(-len(x) // _SHIFTED_ROWS))
    rows, wide = x[picked].float(), weight.float()
    counts = torch.ones(len(rows), **FP32) if row_weights is None else row_weights[picked]
    powers = (rows @ wide.T).square().sum(1)
    counts = counts / (powers + powers.median()).clamp_min(1e-30)
    middle = float((rows.amax(1) + rows.amin(1)).median()) / 2
    best, least = 0.0, math.inf
    for step in range(_SHIFTS + 1):
        shift = float(torch.tensor(-2 * middle * step / _SHIFTS, **FP32).bfloat16())
        moved = (rows + shift).bfloat16().float()
        lost = round_rows(moved).sub_(rows).sub_(shift)
        error = float((lost @ wide.T).square().sum(1) @ counts)
        if error < least:
            best, least = shift, error
    return best


def _source(spec: EncoderSpec, name: str) -> str | None:
    """The layer whose output the linear layer ``name`` reads, and nobody else but a residual; None if there is none."""
    if name == _PROJECTION:
        return "embeddings.norm"
    prefix, index = name.rpartition(".")[0], int(name.split(".")[1])
    if spec.norm_first:
        # Without a norm of its own the first layer reads what the residual stream holds.
        return f"{prefix}.norm" if index or spec.norm_first_attention or name.endswith("ffn.up") else None
    if name.endswith("ffn.up"):
        return f"layers.{index}.attention.norm"
    if index:
        return f"layers.{index - 1}.ffn.norm"
    return _PROJECTION if spec.embedding_size else "embeddings.norm"


def _adds_residual(name: str) -> str | None:
    """The linear layer after which the input of ``name`` is added."""
    if name == _PROJECTION:
        return None
    return f"{name.rpartition('.')[0]}.{'down' if name.endswith('ffn.up') else 'out'}"
