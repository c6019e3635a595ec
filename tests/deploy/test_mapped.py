"""Weights of a model in a file instead of in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from deploy.export.mapped import map_weights


class _Tied(torch.nn.Module):
    """Two names for one weight, a view of another, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(500, 96, generator=generator), requires_grad=False)
        self.out = self.table
        self.view = torch.nn.Parameter(self.table.data.T, requires_grad=False)
        self.empty = torch.nn.Parameter(torch.empty(0, 4), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("positions", torch.arange(4))


def _mapped_bytes(model: torch.nn.Module, path: Path) -> int:
    """How much of the memory that the parameters are in belongs to the file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if str(path) in line]
    places = [(int(first, 16), int(last, 16)) for first, last in ranges]
    return sum(
        tensor.nbytes
        for tensor in model.parameters()
        if any(first <= tensor.data_ptr() < last for first, last in places)
    )


def test_map_weights(tmp_path: Path) -> None:
    model = _Tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "weights.tmp"
    mapped = map_weights(model, path)
    assert not path.exists()
    assert _mapped_bytes(model, path) == sum(tensor.nbytes for tensor in model.parameters())
    assert model.out is model.table
    for _ in range(2):
        after = model.state_dict()
        assert after.keys() == before.keys()
        for name in before:
            assert after[name].dtype == before[name].dtype, name
            assert torch.equal(after[name], before[name]), name
        del after
        mapped.forget()
    mapped.drop()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_model_without_parameters(tmp_path: Path) -> None:
    map_weights(torch.nn.Identity(), tmp_path / "weights.tmp").forget()
    assert not list(tmp_path.iterdir())
