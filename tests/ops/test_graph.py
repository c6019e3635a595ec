"""Packed linear layers in graphs of torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torch_ext.graph import pack_graph

pytestmark = pytest.mark.anywhere


class Model(nn.Module):
    """Linear layers with what may stand around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 24, bias=False)
        self.third = nn.Linear(24, 8)
        self.tied = self.third
        self.unused = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        hidden = self.second(nn.functional.gelu(self.first(x)))
        y = torch.tanh(self.third(hidden + x))
        z = self.tied(x)
        return y + z * z.relu() + nn.functional.linear(x[0], x[0]).mean()


def packed(model: nn.Module, x: torch.Tensor) -> tuple[Any, int]:
    auto: Any = torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 1: auto},), strict=False)
    module: Any = program.module(check_guards=False)
    return module, pack_graph(module)


def test_layers_and_activations() -> None:
    model = Model().eval()
    x = torch.randn(3, 8, 24)
    module, count = packed(model, x)
    assert count == 4
    calls = [node for node in module.graph.nodes if "torch_ext" in str(node.target)]
    assert [node.args[3] for node in calls] == ["gelu", "none", "tanh", "none"]
    # Read by a linear layer alone, so written in bf16; the next one gives fp32.
    assert [node.args[4:] for node in calls] == [(torch.bfloat16,), (torch.float32,), (), ()]
    # A product of activations stays, and the other linear layers have no weight of their own any more.
    assert sum(node.target is torch.ops.aten.linear.default for node in module.graph.nodes) == 1
    assert not list(module.parameters())
    with torch.inference_mode():
        for shape in ((3, 8, 24), (1, 5, 24)):
            y = torch.randn(shape)
            expected, got = model(y), module(y)
            assert got.dtype is torch.float32
            # 8 bits of each factor, and values of up to some tens.
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_layers_used_twice_are_packed_once() -> None:
    module, _ = packed(Model().eval(), torch.randn(3, 8, 24))
    assert len([name for name, _ in module.named_buffers() if name.startswith("_packed_")]) == 3
