"""The model of threads: its arithmetic, and that docs/threads.md holds what the code gives."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import threads

ROOT = Path(__file__).resolve().parents[2]


def test_time_of_a_part_is_its_slowest_resource() -> None:
    costs = threads.Costs(10, 2, 8, 4, barrier_us=5)
    assert threads.Part("p", 1, most_macs=100, macs=100).ns(costs) == 10
    assert threads.Part("p", 1, most_macs=100, macs=100, most_bytes=60, bytes=60).ns(costs) == 30
    assert threads.Part("p", 1, elements=400).ns(costs) == 100
    # Memory is shared: 64 tasks of 60 bytes each.
    shared = threads.Part("p", 64, most_macs=1, macs=64, most_bytes=60, bytes=64 * 60)
    assert shared.ns(costs) == pytest.approx(480 + 5000)


def test_barriers_grow_with_threads() -> None:
    found = [threads.HIGH.barrier_ns(count) for count in (1, 2, 8, 32, 64)]
    assert found[0] == 0
    assert found == sorted(found)
    assert found[-1] == found[-2] == 8000


def test_balance() -> None:
    assert threads.Part("p", 4, most_macs=25, macs=100).balance(4) == 1
    assert threads.Part("p", 4, most_macs=25, macs=100).balance(8) == 2
    assert threads.Part("p", 4).balance(4) is None


def test_rows_are_split_by_the_grain_of_the_encoder() -> None:
    grain = threads.row_grain()
    assert threads.norm_part("n", 1, 384, 64, grain).tasks == 1
    wide = threads.norm_part("n", 8192, 768, 64, grain)
    assert wide.tasks == 64
    assert wide.elements == 8192 // 64 * 768


def test_insert_replaces_only_the_tables() -> None:
    document = f"before\n{threads.BEGIN}\nold\n{threads.END}\nafter\n"
    written = threads.insert(document, "new")
    assert written == f"before\n{threads.BEGIN}\n\nnew\n\n{threads.END}\nafter\n"
    assert threads.insert(written, "new") == written
    with pytest.raises(ValueError, match="expected the lines"):
        threads.insert("nothing", "new")


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return threads.compile_planner(tmp_path_factory.mktemp("planner"), os.environ.get("CXX", "g++"))


@pytest.mark.parametrize("model", threads.MODELS)
@pytest.mark.parametrize("tokens", [16, 2048])
def test_plans_hold_all_the_work(planner: Path, model: str, tokens: int) -> None:
    hidden, wide, _, _ = threads.MODELS[model]
    layers = threads.plan(planner, model, tokens)
    assert sorted(layers) == list(range(1, threads.MOST_THREADS + 1))
    for count, parts in layers.items():
        by_name = {part.name: part for part in parts}
        assert len(parts) == 7
        for name, products in (("qkv", 3 * hidden * hidden), ("out", hidden * hidden), ("up", hidden * wide)):
            part = by_name[name]
            assert part.macs == tokens * products, (count, name)
            assert 1 <= part.tasks <= count
            assert part.macs / part.tasks <= part.most_macs <= part.macs
    assert threads.speed_up(layers, 1, threads.LOW) == 1
    for count in (2, 64):
        best, worst = (threads.speed_up(layers, count, costs) for costs in (threads.LOW, threads.HIGH))
        assert 0 < worst <= best <= count


def test_document_is_up_to_date(planner: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(threads, "compile_planner", lambda folder, compiler: planner)
    monkeypatch.setattr(sys, "argv", ["threads.py", "--check"])
    assert threads.main() == 0, capsys.readouterr().err
    text = (ROOT / "docs" / "threads.md").read_text(encoding="utf-8")
    assert "Nothing on this page was timed" in text
    assert (ROOT / "docs" / "threads.svg").exists()
    assert (ROOT / "docs" / "threads.png").exists()
