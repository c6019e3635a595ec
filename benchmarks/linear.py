"""Linear layers with bias: `torch_ext` beside `F.linear`, and beside the fastest product that PyTorch makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import torch_ext
from benchmarks.timing import Times, interleaved

__all__ = ["BASELINE", "BASELINE_FP32", "SHAPES", "LinearResult", "gflops", "has_int8", "measure", "peak_gflops"]

# [m, k, n]: one token, a product so small that only the call costs, a short text, a batch, MiniLM's widest layer.
SHAPES = ((1, 768, 768), (16, 16, 16), (32, 768, 768), (128, 768, 3072), (1568, 384, 1536), (1568, 1536, 384))
BASELINE, BASELINE_FP32 = "F.linear bf16", "F.linear fp32"
# A product that would take longer than this is not tried: a smaller one says how fast it is.
PEAK_CALL_S = 1.0


@dataclass(frozen=True)
class LinearResult:
    """One candidate on one shape.

    Attributes:
        shape: m, k, n.
        name: the candidate.
        times: seconds of a call.
    """

    shape: tuple[int, int, int]
    name: str
    times: Times


def gflops(shape: tuple[int, int, int], seconds: float) -> float:
    """Billions of additions and multiplications per second."""
    m, k, n = shape
    return 2e-9 * m * k * n / seconds


def has_int8() -> bool:
    """Whether this torch_ext packs int8 weights."""
    return hasattr(torch_ext, "pack_linear_weight_int8")


def peak_gflops(dtype: torch.dtype, size: int = 2048, rounds: int = 7, limit_s: float = math.inf) -> float:
    """GFLOPS of the fastest of several square products by PyTorch: what this machine can be brought to.

    Args:
        dtype: of the factors.
        size: rows and columns; fewer where such a product would take longer than a second.
        rounds: products that are timed.
        limit_s: time of all of them.
    """
    with torch.inference_mode():
        tried = min(size, 128)
        while True:
            a, b = torch.randn(tried, tried).to(dtype), torch.randn(tried, tried).to(dtype)
            call = {"peak": lambda a=a, b=b: a @ b}
            took_s = min(interleaved(call, 1)["peak"].least_s for _ in range(2))
            if tried == size or 8 * took_s > PEAK_CALL_S:
                break
            tried = min(size, 2 * tried)
        return gflops((tried, tried, tried), interleaved(call, rounds, limit_s=limit_s)["peak"].least_s)


def candidates(shape: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """The ways to compute one layer, by name; each has its own operands, in the form that it likes best."""
    m, k, n = shape
    x, weight, bias = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    xb, wb, bb = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    linear = torch.ops.torch_ext.linear
    packed = torch_ext.pack_linear_weight(weight)
    calls: dict[str, Callable[[], object]] = {"torch_ext bf16": lambda: linear(xb, packed, bias, "none")}
    if has_int8():
        packed_int8 = torch_ext.pack_linear_weight_int8(weight)
        calls["torch_ext int8"] = lambda: linear(xb, packed_int8, bias, "none")
    calls[BASELINE] = lambda: F.linear(xb, wb, bb)
    calls[BASELINE_FP32] = lambda: F.linear(x, weight, bias)
    return calls


def measure(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    rounds: int = 25,
    sample_s: float = 0.004,
    limit_s: float = math.inf,
) -> list[LinearResult]:
    """Times all candidates on all shapes; operands stay in the caches as far as they fit.

    Args:
        shapes: m, k, n of each.
        rounds: samples of each candidate.
        sample_s: length of a sample.
        limit_s: time of each candidate on each shape; a slow one has fewer samples, at least one.
    """
    results = []
    with torch.inference_mode():
        for shape in shapes:
            torch.manual_seed(0)
            found = interleaved(candidates(shape), rounds, sample_s, limit_s)
            results += [LinearResult(shape, name, times) for name, times in found.items()]
    return results
