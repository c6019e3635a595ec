"""Weights of int8 that are rounded to suit what layers read, instead of each to the nearest step.

The outputs of a layer are what has to be right, and its inputs are known well enough from some texts. Rounding one
weight up by half a step can be made good by the weights that are rounded after it, as far as their inputs move
together: optimal brain quantization, in the form of GPTQ (https://arxiv.org/abs/2210.17323), with one factorization of
the inputs' second moments for all outputs. Inputs are rounded to int8, too, and that has a part which depends on them:
a least-squares step moves the weights to make up for it. What outputs lack on the mean goes into the bias. Layers are
quantized in the order in which they run, so each one sees the inputs that those before it will give it.

All of this happens once, when weights are made: an encoder runs as fast as with weights rounded one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from torch_ext.encoder.balance import balance, random_texts
from torch_ext.encoder.model import Encoder
from torch_ext.encoder.spec import EncoderSpec, is_matrix, scale_name
from torch_ext.encoder.weights import FP32
from torch_ext.quantize import dequantize_weight, exact_scale, quantize_weight, round_rows

__all__ = ["balanced_weights", "calibrated_weights", "round_to_inputs", "with_random_texts"]

_DAMPING = 0.1
"""Of the mean second moment, added to each: how far rounding errors are trusted to cancel. With less, weights of inputs
that the texts hardly show would take over the errors of the others, and a word that does show them would suffer."""
_TIES = 1.0
"""Of the mean second moment: how strongly least squares holds the weights where they are. With less, a few thousand
rows would decide about directions that they hardly show."""
_CLIPPED = (0.95, 0.9, 0.85, 0.8)
"""Shares of a row's largest weight that may be the largest number of int8, where that is better on the whole."""
_WRONG = 1e-3
"""Of the largest number of a matrix: by how much the product of its factors may miss it."""
_ROWS = 1024
"""Rows of inputs that are in memory in fp32 at a time."""
_COLUMNS = 64
"""Inputs whose rounding errors are passed on at a time."""


def with_random_texts(spec: EncoderSpec, input_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Texts, and after them those of :func:`torch_ext.encoder.balance.random_texts`, which have all kinds of tokens."""
    ids, bounds = random_texts(spec)
    return torch.cat([input_ids, ids]), torch.cat([cu_seqlens, bounds[1:] + cu_seqlens[-1]]).to(torch.int32)


def balanced_weights(
    spec: EncoderSpec, weights: Mapping[str, Tensor], input_ids: Tensor, cu_seqlens: Tensor
) -> Mapping[str, Tensor]:
    """Weights of the same encoder that suit int8, fitted to some texts: see :mod:`torch_ext.encoder.balance`.

    Args:
        spec: of the encoder.
        weights: fp32 or bf16, by the names of ``spec.shapes()``, as they were trained.
        input_ids: as for :func:`calibrated_weights`.
        cu_seqlens: likewise.

    Returns:
        Weights for the constructor of :class:`Encoder`, with any dtype.

    Raises:
        ValueError: a name, shape or dtype is wrong, or the texts do not fit.
    """
    encoder = Encoder(spec, weights, "bf16")  # Takes half the memory of fp32, and the channels look the same.
    encoder._check(input_ids, cu_seqlens, None)
    with torch.no_grad():
        return balance(
            spec,
            weights,
            lambda observe: encoder.run_reference(input_ids, cu_seqlens, observe=observe),
            _row_weights(cu_seqlens),
        )


def calibrated_weights(
    spec: EncoderSpec, weights: Mapping[str, Tensor], input_ids: Tensor, cu_seqlens: Tensor
) -> dict[str, Tensor]:
    """Quantize the linear layers of an encoder for what they read on some texts.

    Args:
        spec: of the encoder.
        weights: fp32 or bf16, by the names of ``spec.shapes()``, best balanced (:func:`balanced_weights`).
        input_ids: i64 ``[T]``, some thousands of tokens.
        cu_seqlens: i32 ``[B + 1]``.

    Returns:
        Weights for the constructor of :class:`Encoder` with dtype ``"int8"``: as :meth:`Encoder.weights` returns them.

    Raises:
        ValueError: a name, shape or dtype is wrong, a weight is not finite, or the texts do not fit.
    """
    encoder = _Calibrating(spec, weights)
    encoder._check(input_ids, cu_seqlens, None)
    encoder.row_weights = _row_weights(cu_seqlens)
    with torch.no_grad():
        encoder.run_reference(input_ids, cu_seqlens)
    return {**encoder.weights(), **encoder.found}


def _row_weights(cu_seqlens: Tensor) -> Tensor:
    """How much each token counts: a short text rests on few tokens, so each of them counts more."""
    lengths = cu_seqlens.diff()
    return lengths.float().rsqrt().repeat_interleave(lengths)


class _Calibrating(Encoder):
    """An encoder whose layers are quantized when their inputs reach them.

    Attributes:
        row_weights: fp32 ``[T]``, how much each token counts.
        found: the weights and scales of layers that ran.
    """

    row_weights: Tensor
    found: dict[str, Tensor]

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, Tensor]) -> None:
        super().__init__(spec, weights, "int8")
        self.found = {}
        self._given = weights
        self._names = {self._tensors[name].data_ptr(): name for name in weights if is_matrix(name)}

    def _linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        activation: str = "none",
        out_dtype: torch.dtype | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        name = self._names[weight.data_ptr()]
        quantized, scale, left = round_to_inputs(self._given[name], x, self.row_weights)
        bias_name = f"{name.removesuffix('.weight')}.bias"
        bias = self._given[bias_name].float() + left
        self.found[name], self.found[scale_name(name)], self.found[bias_name] = quantized, scale, bias
        packed = torch.ops.torch_ext.pack_linear_weight_int8.default(quantized, scale)
        return super()._linear(x, packed, bias, activation, out_dtype, residual)


def round_to_inputs(weight: Tensor, x: Tensor, row_weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight so that the layer's outputs change least, with its inputs in int8, too.

    Args:
        weight: fp32 or bf16 ``[N, K]``, finite.
        x: fp32 or bf16 ``[T, K]``, what the layer reads.
        row_weights: fp32 ``[T]``, how much each row counts; None: all the same.

    Returns:
        ``q``, i8 ``[N, K]``, and ``scale``, fp32 ``[N]``, as :func:`torch_ext.quantize.quantize_weight` returns them;
        the very same where the inputs are all the same or not finite. And fp32 ``[N]``, to be added to the bias: what
        outputs lack on the mean.

    Raises:
        ValueError: as for :func:`torch_ext.quantize.quantize_weight`.
    """
    wide = weight.detach().float()
    mean, lost_mean = _means(x, row_weights)

    def completed(quantized: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exact = weight.detach().float() @ (mean + lost_mean)
        left = exact - dequantize_weight(quantized, scale) @ mean
        return quantized, scale, left if bool(torch.isfinite(left).all()) else torch.zeros(len(weight), **FP32)

    plain = completed(*quantize_weight(weight))
    moments, lost = _moments(x, row_weights, mean, lost_mean)
    typical = float(moments.diagonal().mean())
    if not (math.isfinite(typical) and typical > 0 and bool(torch.isfinite(lost).all())):
        return plain
    regular = moments.clone()
    regular.diagonal().add_(_TIES * typical)
    factor = _cholesky(regular)
    if factor is None:
        return plain
    wide = wide + torch.cholesky_solve(lost @ wide.T, factor).T
    del regular, lost, factor  # As large as the weight, or larger; more of them follow.
    if not bool(torch.isfinite(wide).all()):
        return plain
    scale = _clipped_scale(wide, moments.diagonal())
    # The largest inputs come first, while there are many to make up for them.
    order = moments.diagonal().argsort(descending=True)
    moments = moments[order][:, order]
    moments.diagonal().add_(_DAMPING * typical)
    upper = _inverse_factor(moments)
    if upper is None:
        return plain
    del moments
    return completed(_round_in_order(wide, scale, upper, order), scale)


def _rounded(x: Tensor, row_weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some rows at a time as int8 has them, ``r``; the rest ``x - r``; and how much each counts, ``[rows, 1]``."""
    for begin in range(0, len(x), _ROWS):
        rows = x[begin : begin + _ROWS].float()
        rounded = round_rows(rows)
        counts = torch.ones(len(rows), **FP32) if row_weights is None else row_weights[begin : begin + _ROWS]
        yield rounded, rows - rounded, counts[:, None]


def _means(x: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means over rows of ``r`` and ``x - r``, each ``[K]``, where ``r`` is what int8 makes of ``x``."""
    mean, lost = torch.zeros(x.shape[1], **FP32), torch.zeros(x.shape[1], **FP32)
    for rounded, rest, counts in _rounded(x, row_weights):
        mean += (rounded * counts).sum(0)
        lost += (rest * counts).sum(0)
    total = len(x) if row_weights is None else float(row_weights.sum())
    return mean / total, lost / total


def _moments(x: Tensor, row_weights: Tensor | None, mean: Tensor, lost_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows of ``r rᵀ`` and ``r (x - r)ᵀ``, each ``[K, K]``, about the means of ``r`` and ``x - r``."""
    width = x.shape[1]
    moments, lost = torch.zeros(width, width, **FP32), torch.zeros(width, width, **FP32)
    for rounded, rest, counts in _rounded(x, row_weights):
        rounded -= mean
        weighted = rounded * counts
        moments.addmm_(weighted.T, rounded)
        lost.addmm_(weighted.T, rest - lost_mean)
    return moments, lost


def _clipped_scale(weight: Tensor, importance: Tensor) -> Tensor:
    """The scale of each row: of its largest weight, or of less where the sum of squared errors is smaller then.

    Args:
        weight: fp32 ``[N, K]``.
        importance: fp32 ``[K]``, of errors in each column.
    """
    largest = weight.abs().amax(1)
    best = exact_scale(largest / 127)
    least = _errors(weight, best, importance)
    for share in _CLIPPED:
        scale = exact_scale(largest * (share / 127))
        errors = _errors(weight, scale, importance)
        best = torch.where(errors < least, scale, best)
        least = torch.minimum(errors, least)
    return best


def _errors(weight: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)[:, None]
    rounded = (weight * inverse).round_().clamp_(-127, 127).mul_(scale[:, None])
    return rounded.sub_(weight).square_() @ importance


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor | None:
    """The factor of a matrix ``[K, K]``; None if there is none, or if the library that computes it is wrong.

    OpenBLAS is wrong with SVE vectors of 512 bits, without a word: so the factor is multiplied out.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    if bool(failed):
        return None
    product = factor.T @ factor if upper else factor @ factor.T
    right = product.sub_(matrix).abs_().max() <= _WRONG * max(matrix.max(), -matrix.min())
    return factor if bool(right) else None


def _inverse_factor(moments: Tensor) -> Tensor | None:
    """The upper factor of the inverse of a matrix ``[K, K]``; None if there is none."""
    lower = _cholesky(moments)
    if lower is None:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    return _cholesky(inverse, upper=True)


def _round_in_order(weight: Tensor, scale: Tensor, upper: Tensor, order: Tensor) -> Tensor:
    """Round column after column, and let the columns that are left make up for each error.

    Args:
        weight: fp32 ``[N, K]``.
        scale: fp32 ``[N]``.
        upper: fp32 ``[K, K]``, the upper factor of the inverse second moments of the columns in their order.
        order: i64 ``[K]``, the columns in the order in which they are rounded.

    Returns:
        i8 ``[N, K]``.
    """
    left = weight.T[order].contiguous()  # [K, N]: a column of the weight is one piece of memory.
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    rounded = torch.empty(left.shape, dtype=torch.int8, device="cpu")
    width = len(left)
    for begin in range(0, width, _COLUMNS):
        end = min(begin + _COLUMNS, width)
        errors = torch.empty(end - begin, left.shape[1], **FP32)
        for index in range(begin, end):
            steps = (left[index] * inverse).round_().clamp_(-127, 127)
            rounded[index] = steps
            error = torch.sub(left[index], steps.mul_(scale), out=errors[index - begin])
            error /= upper[index, index]
            left[index + 1 : end].addr_(upper[index, index + 1 : end], error, alpha=-1)
        left[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    result = torch.empty_like(rounded)
    result[order] = rounded
    return result.T.contiguous()
