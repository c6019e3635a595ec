"""What the ops should compute, in plain PyTorch and double precision, and how far from it they may be.

All bounds are here, each with its reason. ``EPS32`` and ``EPS16`` are the unit roundoffs of fp32 and bf16 (half the
distance between neighbours, relative).
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

import torch_ext

EPS32 = 2.0**-24
EPS16 = 2.0**-8

ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}

# The largest slope of each activation: how much of an error before it is left after it.
SLOPES = dict.fromkeys(ACTIVATIONS, 1.0) | {"gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1, "quick_gelu": 1.1}

# Activations are polynomials or rational functions in fp32: 32 units of rounding of the value, or of 1 if it is
# smaller.
ACTIVATION_EPS = 2.0**-19


def activation_eps(activation: str, dtype: torch.dtype) -> float:
    """The error of an activation: GELU that is rounded to bf16 comes from a shorter polynomial."""
    return 5e-5 if activation == "gelu" and dtype == torch.bfloat16 else ACTIVATION_EPS


@dataclasses.dataclass(frozen=True)
class Bounded:
    """An exact result and the bound on the error, element by element; both fp64."""

    exact: Tensor
    bound: Tensor

    def check(self, actual: Tensor, what: str) -> None:
        """Assert that ``actual`` is within the bound everywhere.

        Args:
            actual: what the op returned.
            what: named in the message.
        """
        assert actual.shape == self.exact.shape, f"{what}: {list(actual.shape)}, expected {list(self.exact.shape)}"
        error = (actual.double() - self.exact).abs()
        # Written so that a NaN fails.
        bad = ~(error <= self.bound)
        if bad.any():
            index = tuple(int(i) for i in bad.nonzero()[0])
            raise AssertionError(
                f"{what}: {int(bad.sum())} of {actual.numel()} elements beyond the bound, first at {index}: got "
                f"{float(actual[index])}, exact {float(self.exact[index])}, bound {float(self.bound[index]):.3g}, "
                f"largest error / bound {float((error / self.bound.clamp_min(1e-300)).nan_to_num(1e30).max()):.3g}"
            )


def rounding(dtype: torch.dtype) -> float:
    """The unit roundoff of a result's dtype."""
    return EPS16 if dtype == torch.bfloat16 else EPS32


def takes_fp32() -> bool:
    """Whether the kernels in use multiply fp32 input as it is, instead of rounding it to bf16."""
    report = torch_ext.isa_report()
    return any(name.split("_")[2] == "f32" for name in report["linear_kernels"])


def rounds_product() -> bool:
    """Whether the product reaches the epilogue in bf16: PyTorch's own bf16 linear does not give out its fp32 sums."""
    return bool(torch_ext.isa_report()["isa"] == "onednn")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
) -> Bounded:
    """The reference of ``linear``, with the unpacked weight.

    The sums: BFMMLA rounds to odd and flushes subnormals, and the order of summation is free; ``8 * EPS32 * sum |a *
    b|`` holds for random data at any depth (rounding errors of fp32 sums grow with the square root of the number of
    terms).
    """
    left = (x if takes_fp32() else x.bfloat16()).double()
    right = weight.bfloat16().double()
    exact = left @ right.T
    bound = 8 * EPS32 * (left.abs() @ right.abs().T) + 2.0**-120
    if bias is not None:
        exact = exact + bias.double()
        bound = bound + EPS32 * exact.abs()
    if rounds_product() and activation in ("quick_gelu", "sigmoid", "leaky_relu"):  # those that oneDNN does not fuse
        bound = bound + EPS16 * (exact.abs() + bound)
    exact = ACTIVATIONS[activation](exact)
    if activation != "none":
        eps = activation_eps(activation, out_dtype or x.dtype)
        bound = SLOPES[activation] * bound + eps * exact.abs().clamp_min(1.0)
    if rounds_product():
        bound = bound + EPS16 * (exact.abs() + bound)
    if residual is not None:
        exact = exact + residual.double()
        bound = bound + EPS32 * exact.abs()
    bound = bound + rounding(out_dtype or x.dtype) * (exact.abs() + bound)
    return Bounded(exact, bound)


def addmm(
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    beta: float = 1,
    alpha: float = 1,
    out_dtype: torch.dtype | None = None,
) -> Bounded:
    """The reference of ``addmm``, and without bias of ``matmul`` and ``bmm``; for the bound see ``linear``.

    Scaling and adding round up to four more times in fp32. PyTorch's own ``addmm`` may round the product to bf16 first.
    """
    exact = alpha * (a.double() @ b.double())
    bound = abs(alpha) * 8 * EPS32 * (a.double().abs() @ b.double().abs()) + 2.0**-120
    if bias is not None:
        if rounds_product():
            bound = bound + rounding(a.dtype) * (exact.abs() + bound)
        scaled = beta * bias.double() if beta else torch.zeros_like(bias, dtype=torch.float64)
        bound = bound + 4 * EPS32 * (exact.abs() + scaled.abs())
        exact = exact + scaled
    bound = bound + rounding(out_dtype or a.dtype) * (exact.abs() + bound)
    return Bounded(exact, bound)


def attention(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, scale: float | None = None) -> Bounded:
    """The reference of ``varlen_attention``.

    An error d in a score changes a probability by the factor exp(d), so at most by 2 d here. The scores' error is that
    of a product in fp32, plus that of exp() in fp32. Probabilities may be rounded to bf16 before they are multiplied by
    values if the input is bf16.
    """
    tokens, width = qkv.shape[0], qkv.shape[1] // 3
    size = width // num_heads
    factor = size**-0.5 if scale is None else scale
    exact = torch.zeros(tokens, width, dtype=torch.float64)
    bound = torch.zeros(tokens, width, dtype=torch.float64)
    offsets = cu_seqlens.tolist()
    for begin, end in itertools.pairwise(offsets):
        if begin == end:
            continue
        q, k, v = qkv[begin:end].double().view(-1, 3, num_heads, size).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) * factor
        probabilities = scores.softmax(-1)
        exact[begin:end] = (probabilities @ v).permute(1, 0, 2).reshape(-1, width)
        error = 8 * EPS32 * (q.abs() @ k.abs().transpose(1, 2)) * abs(factor) + 4 * EPS32 * (scores.abs() + 1)
        relative = 2 * error.amax(-1, keepdim=True) + 16 * EPS32 + 2.0**-20
        if qkv.dtype == torch.bfloat16:
            relative = relative + EPS16
        spread = relative * (probabilities @ v.abs())
        bound[begin:end] = spread.permute(1, 0, 2).reshape(-1, width)
    bound = bound + rounding(qkv.dtype) * (exact.abs() + bound) + 2.0**-120
    return Bounded(exact, bound)


def layer_norm(total: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, scale: Tensor) -> Bounded:
    """The reference of layer norms.

    Args:
        total: fp64 ``[T, H]``, what is normalized.
        weight: ``[H]``.
        bias: ``[H]``.
        eps: added to the variance.
        dtype: of the result.
        scale: fp64 ``[T, 1]``, the largest magnitude that enters a row: subtracting the mean cancels at most that much.

    Returns:
        The result, with 32 roundings of what enters, divided by the standard deviation.
    """
    exact = F.layer_norm(total, total.shape[-1:], weight.double(), bias.double(), eps)
    deviation = ((total - total.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + eps).sqrt()
    normal = ((total - total.mean(-1, keepdim=True)) / deviation).abs()
    bound = 32 * EPS32 * (weight.double().abs() * (scale / deviation) * (1 + normal) + bias.double().abs())
    return Bounded(exact, bound + rounding(dtype) * (exact.abs() + bound))


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual_scale: Tensor | None = None,
) -> Bounded:
    """The reference of ``add_layer_norm``."""
    total, scale = x.double(), x.double().abs()
    if residual is not None:
        added = residual.double() if residual_scale is None else residual.double() * residual_scale.double()
        total, scale = total + added, scale + added.abs()
    return layer_norm(total, weight, bias, eps, x.dtype, scale.amax(-1, keepdim=True))


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Bounded:
    """The reference of ``add_rms_norm``: nothing cancels, but in the sum of x and residual."""
    total, scale = x.double(), x.double().abs()
    if residual is not None:
        total, scale = total + residual.double(), scale + residual.double().abs()
    factor = weight.double() / (total.square().mean(-1, keepdim=True) + eps).sqrt()
    exact = total * factor
    bound = 4 * EPS32 * scale * factor.abs() + (total.shape[-1] + 8) * EPS32 * exact.abs()
    return Bounded(exact, bound + rounding(x.dtype) * (exact.abs() + bound))


def rotary_embedding(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, cos_sin: Tensor) -> Bounded:
    """The reference of ``rotary_embedding``: pairs as complex numbers, times numbers of length 1."""
    tokens, width = qkv.shape[0], qkv.shape[1] // 3
    half = width // num_heads // 2
    rows = [row for length in cu_seqlens.diff().tolist() for row in range(length)]
    turn = torch.complex(*cos_sin.double()[rows].split(half, 1))[:, None]
    exact, bound = qkv.double().clone(), torch.zeros(qkv.shape, dtype=torch.float64)
    for part in (slice(0, width), slice(width, 2 * width)):
        pairs = torch.complex(*qkv[:, part].double().reshape(tokens, num_heads, 2, half).unbind(2))
        turned = pairs * turn
        exact[:, part] = torch.stack((turned.real, turned.imag), 2).reshape(tokens, width)
        error = 4 * EPS32 * pairs.abs() * turn.abs()
        bound[:, part] = torch.stack((error, error), 2).reshape(tokens, width)
        bound[:, part] += rounding(qkv.dtype) * (exact[:, part].abs() + bound[:, part])
    return Bounded(exact, bound)


def gate(x: Tensor, activation: str) -> Bounded:
    """The reference of ``gate``."""
    value, factor = x.double().chunk(2, -1)
    exact = ACTIVATIONS[activation](value) * factor
    bound = activation_eps(activation, x.dtype) * value.abs().clamp_min(1) * factor.abs() + EPS32 * exact.abs()
    return Bounded(exact, bound + rounding(x.dtype) * (exact.abs() + bound))


def embed_layer_norm(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    position_offset: int,
    padding_id: int = -1,
) -> Bounded:
    """The reference of ``embed_layer_norm``."""
    lengths = cu_seqlens.diff().tolist()
    rows = torch.cat([torch.arange(length) for length in lengths] or [torch.empty(0, dtype=torch.int64)])
    parts = [word.double()[input_ids]]
    if position is not None:
        if padding_id >= 0 and lengths:
            counted = [text != padding_id for text in input_ids.split(lengths)]
            rows = torch.cat([text.cumsum(0) * text - 1 for text in counted])
        parts.append(position.double()[rows + position_offset])
    if token_type is not None:
        parts.append(token_type.double()[torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids])
    scale = torch.stack([part.abs() for part in parts]).sum(0).amax(-1, keepdim=True)
    return layer_norm(torch.stack(parts).sum(0), weight, bias, eps, word.dtype, scale)


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool) -> Bounded:
    """The reference of ``pool``.

    A sum of n terms has n roundings of the running sum, which the sum of magnitudes bounds.
    """
    exact, bound = [], []
    offsets = cu_seqlens.tolist()
    for begin, end in itertools.pairwise(offsets):
        rows = hidden[begin:end].double()
        n = end - begin
        weights = {
            "mean": torch.full((n,), 1 / n, dtype=torch.float64),
            "weightedmean": torch.arange(1, n + 1, dtype=torch.float64) / (n * (n + 1) / 2),
            "mean_sqrt_len_tokens": torch.full((n,), n**-0.5, dtype=torch.float64),
        }
        if mode in weights:
            w = weights[mode][:, None]
            # A weight has roundings of its own, too.
            value, error = (w * rows).sum(0), (n + 8) * EPS32 * (w * rows.abs()).sum(0)
        else:
            value = {"cls": rows[0], "lasttoken": rows[-1], "max": rows.amax(0)}[mode]
            error = torch.zeros_like(value)
        if normalize:
            norm = value.norm().clamp_min(1e-12)
            # The length is off by the components' errors and by the sum of their squares.
            relative = error.norm() / norm + (value.numel() + 4) * EPS32
            value, error = value / norm, error / norm + relative * (value / norm).abs()
        exact.append(value)
        bound.append(error + 2 * EPS32 * value.abs())
    if not exact:
        empty = torch.empty(0, hidden.shape[1], dtype=torch.float64)
        return Bounded(empty, empty)
    return Bounded(torch.stack(exact), torch.stack(bound))


def cu_seqlens(lengths: list[int]) -> Tensor:
    """Bounds of sequences of the given lengths, i32 ``[B + 1]``."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
