"""Calls to be counted, run inside an emulator by ``instructions.py``: one marker pair around each, after a warm-up."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable

import torch

import torch_ext

MINILM = {
    "architecture": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_layers": 6,
    "num_heads": 12,
    "intermediate_size": 1536,
    "activation": "gelu",
    "max_positions": 512,
    "position_offset": 0,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def linear_call(m: int, k: int, n: int, activation: str) -> Callable[[], object]:
    """A linear layer with bias: x bf16 [m, k], weight [n, k], result bf16 [m, n]."""
    x, weight, bias = torch.randn(m, k).bfloat16(), torch.randn(n, k), torch.randn(n)
    packed = torch_ext.pack_linear_weight(weight)
    linear = torch.ops.torch_ext.linear
    return lambda: linear(x, packed, bias, activation)


def encoder_call(tokens: int) -> Callable[[], object]:
    """Encoder and mean pooling of one text in the shapes of all-MiniLM-L6-v2; counts do not depend on the weights."""
    spec = torch_ext.EncoderSpec(**MINILM)
    weights = {name: torch.randn(shape) * 0.02 for name, shape in spec.shapes().items()}
    encoder = torch_ext.Encoder(spec, weights, "bf16")
    ids = torch.randint(0, spec.vocab_size, (tokens,))
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
    return lambda: torch_ext.pool(encoder(ids, cu_seqlens), cu_seqlens, "mean", True)


def main() -> None:
    """Arguments: the library of markers, then a JSON list of cases, at most four."""
    markers = ctypes.CDLL(sys.argv[1])
    cases = json.loads(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        for region, case in enumerate(cases):
            if case["kind"] == "encoder":
                call = encoder_call(case["tokens"])
            else:
                call = linear_call(*case["shape"], case["activation"])
            for _ in range(3):
                call()
            markers[f"marker_{120 + 2 * region}"]()
            call()
            markers[f"marker_{121 + 2 * region}"]()
    print(json.dumps(torch_ext.isa_report()))


if __name__ == "__main__":
    main()
