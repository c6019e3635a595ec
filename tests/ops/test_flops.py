"""What FlopCounterMode counts: as much for our ops as for those of PyTorch that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import torch_ext
from tests import warm
from tests.ops import reference
from tests.ops.test_encoder import SPEC, SPECS, make_weights
from torch_ext import Encoder, EncoderSpec


def count(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


COUNT = """
import sys, torch, warnings
warnings.simplefilter("error")
{first}
import torch_ext
before = 'torch.utils.flop_counter' in sys.modules
{then}
from torch.utils.flop_counter import FlopCounterMode
packed = torch_ext.pack_linear_weight(torch.ones(13, 24))
with FlopCounterMode(display=False) as counter:
    torch_ext.linear(torch.ones(5, 24), packed)
print(before, counter.get_total_flops() == 2 * 5 * 24 * 13)
"""

IMPORT_TWICE = """
import importlib, inspect, threading
threads = [threading.Thread(target=importlib.import_module, args=["torch.utils.flop_counter"]) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert "class FlopCounterMode" in inspect.getsource(sys.modules["torch.utils.flop_counter"])
importlib.reload(sys.modules["torch.utils.flop_counter"])
"""


@pytest.mark.anywhere
@pytest.mark.parametrize(
    ("first", "then", "before"),
    [("import torch.utils.flop_counter", "", True), ("", IMPORT_TWICE, False)],
    ids=["before torch_ext", "after torch_ext, by threads, and again"],
)
def test_the_counter_is_imported_when_it_is_needed(first: str, then: str, before: bool) -> None:
    program = COUNT.format(first=first, then=then)
    done = warm.python("torch").run("-c", program, complete=False)
    assert done.stdout.split() == [str(before), "True"], done.stderr


def test_products(generator: torch.Generator) -> None:
    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    weight, bias = rand(13, 24), rand(13)
    for x in (rand(24), rand(5, 24), rand(2, 3, 24)):
        expected = 2 * x.numel() * 13
        for packed in (torch_ext.pack_linear_weight(weight), torch_ext.pack_linear_weight_int8(weight)):
            assert count(lambda x=x, packed=packed: torch_ext.linear(x, packed, bias, "gelu")) == expected
            with FakeTensorMode(allow_non_fake_inputs=True):
                assert count(lambda x=x, packed=packed: torch_ext.linear(x, packed)) == expected
    for a, b in ((rand(5, 24), rand(24, 13)), (rand(2, 1, 5, 24), rand(3, 24, 13)), (rand(2, 5, 24), rand(24, 13))):
        assert count(lambda a=a, b=b: torch_ext.matmul(a, b)) == count(lambda a=a, b=b: a @ b) > 0
    a, b = rand(2, 5, 24), rand(2, 24, 13)
    assert count(lambda: torch_ext.bmm(a, b)) == count(lambda: torch.bmm(a, b)) > 0
    assert count(lambda: torch_ext.addmm(bias, a[0], b[0])) == count(lambda: torch.addmm(bias, a[0], b[0])) > 0


@pytest.mark.parametrize("window", [None, 0, 1, 3, 100])
def test_attention(window: int | None, generator: torch.Generator) -> None:
    lengths = [3, 20, 1, 0, 7]
    qkv, bounds = torch.randn(31, 96, generator=generator), reference.cu_seqlens(lengths)
    pairs = 0
    for length in lengths:
        distance = (torch.arange(length) - torch.arange(length)[:, None]).abs()
        pairs += int((distance <= (length if window is None else window)).sum())

    def run(qkv: Tensor = qkv, bounds: Tensor = bounds) -> object:
        return torch_ext.varlen_attention(qkv, bounds, 4, window=window)

    assert count(run) == 4 * pairs * 32
    for causal in (False, True):
        keys = torch.tensor([2, 5, 1, 0, 7], dtype=torch.int32)
        pairs = 0
        for length, most in zip(lengths, keys.tolist(), strict=True):
            distance = torch.arange(length)[:, None] - torch.arange(most)
            near = distance.abs() <= (length if window is None else window)
            pairs += int((near & (distance >= 0) if causal else near).sum())
        options = {"window": window, "causal": causal, "attended": keys}
        assert count(lambda o=options: torch_ext.varlen_attention(qkv, bounds, 4, **o)) == 4 * pairs * 32
    # Where lengths are not known, all tokens count as one sequence.
    if window is None:
        assert count(lambda: run(qkv.to("meta"), bounds.to("meta"))) == 4 * 31**2 * 32


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_encoder(spec: EncoderSpec, generator: torch.Generator) -> None:
    """The whole stack as one op counts what it counts op by op."""
    bounds = reference.cu_seqlens([3, 20, 1, 7])
    ids = torch.randint(0, 50, (31,), generator=generator)
    encoder = Encoder(spec, make_weights(spec, generator))
    expected = count(lambda: encoder.run_reference(ids, bounds))
    assert count(lambda: encoder(ids, bounds)) == expected > 0
    attended = torch.tensor([1, 9, 1, 4], dtype=torch.int32)
    fewer = count(lambda: encoder.run_reference(ids, bounds, attended=attended))
    assert count(lambda: encoder(ids, bounds, None, attended)) == fewer < expected
    assert count(lambda: Encoder(spec, make_weights(spec, generator), "int8")(ids, bounds)) == expected


def test_optimized_layers_count_what_plain_ones_do(generator: torch.Generator) -> None:
    x = torch.randn(3, 5, 24, generator=generator)
    for dtype in ("bf16", "int8"):
        model = nn.Sequential(nn.Linear(24, 37), nn.GELU(), nn.Linear(37, 5, bias=False)).eval()
        expected = count(lambda model=model: model(x))
        assert expected == 2 * 15 * (24 * 37 + 37 * 5)
        torch_ext.optimize(model, dtype)
        assert count(lambda model=model: model(x)) == expected


@pytest.mark.needs_transformers
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_bert(dtype: Any, generator: torch.Generator) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
        max_position_embeddings=20, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 50, (1, 17), generator=generator)
    expected = count(lambda: model(ids))
    spec = dataclasses.replace(SPEC, architecture="bert")
    assert expected == 2 * (17 * 2 * (4 * 32**2 + 2 * 32 * 56) + 2 * 2 * 17**2 * 32)
    encoder = Encoder.from_transformers(model, dtype)
    assert encoder.spec == spec
    assert count(lambda: encoder(ids[0], reference.cu_seqlens([17]))) == expected
    torch_ext.optimize(model, dtype)
    assert count(lambda: model(ids)) == expected
