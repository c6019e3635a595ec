"""`make bench`: how texts become batches, what is promised, and a short run of all of it."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import encoder, timing

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = [5, 1, 9, 3, 3, 12, 2]


@pytest.mark.parametrize("setting", encoder.settings(pads=False), ids=str)
def test_split_keeps_every_text_and_the_limit(setting: encoder.Setting) -> None:
    batches = encoder.split(LENGTHS, setting)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(LENGTHS)))
    if setting.by_length:
        assert [LENGTHS[i] for i in flat] == sorted(LENGTHS)
    else:
        assert flat == list(range(len(LENGTHS)))


def test_split_by_texts_and_tokens() -> None:
    assert encoder.split(LENGTHS, encoder.Setting(3, "texts", False)) == [[0, 1, 2], [3, 4, 5], [6]]
    # A text longer than the budget still gets a batch.
    assert encoder.split(LENGTHS, encoder.Setting(10, "tokens", False)) == [[0, 1], [2], [3, 4], [5], [6]]


def test_padded_engines_get_no_token_budgets() -> None:
    assert {setting.unit for setting in encoder.settings(pads=True)} == {"texts"}
    assert len(set(encoder.settings(pads=False))) == len(encoder.settings(pads=False))


def test_interleaved_takes_turns() -> None:
    calls: list[str] = []
    times = timing.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert all(len(found.samples_s) == 3 and 0 <= found.least_s <= found.median_s for found in times.values())


def test_latencies_discard_the_warm_up() -> None:
    calls: list[str] = []
    times = timing.latencies({name: lambda name=name: calls.append(name) for name in "ab"}, 2, block=3, warm_up=1)
    assert "".join(calls) == "aaaabbbb" + "bbbbaaaa"
    assert all(len(found.samples_s) == 6 for found in times.values())


def test_percentiles() -> None:
    times = timing.Times([float(n) for n in range(100, 0, -1)])
    assert times.percentile_s(95) == 96
    assert times.percentile_s(100) == 100
    assert times.least_s == 1


KEPT: dict[str, Any] = {
    "encoder": [
        {"name": "torch_ext bf16", "ratio": 1.0},
        {"name": "PyTorch bf16", "ratio": 0.5},
        {"name": "PyTorch fp32", "ratio": 0.25},
        {"name": "ONNX Runtime int8", "ratio": 0.8},
    ],
    "latency": [{"name": "torch_ext bf16", "ratio": 0.5}, {"name": "PyTorch bf16", "ratio": 1.0}],
    "linear": [{"shape": "16x16x16", "name": "torch_ext bf16", "speedup": 0.6}],
    "int8_accuracy": {"texts": 2000, "cosine_mean": 0.997, "cosine_min": 0.991},
}


def test_bars_that_are_kept() -> None:
    bars = encoder.bars(KEPT)
    assert len(bars) == 7
    assert all(bar.passed for bar in bars), [bar.line() for bar in bars]


@pytest.mark.parametrize(
    ("part", "index", "key", "value"),
    [
        ("encoder", 1, "ratio", 0.6),
        ("encoder", 2, "ratio", 0.3),
        ("encoder", 3, "ratio", 0.9),
        ("latency", 0, "ratio", 0.7),
        ("linear", 0, "speedup", 0.4),
        ("int8_accuracy", None, "cosine_mean", 0.995),
        ("int8_accuracy", None, "cosine_min", 0.98),
    ],
)
def test_each_bar_can_be_missed(part: str, index: int | None, key: str, value: float) -> None:
    data = copy.deepcopy(KEPT)
    (data[part] if index is None else data[part][index])[key] = value
    assert sum(not bar.passed for bar in encoder.bars(data)) == 1


def test_int8_that_was_not_measured_is_missed() -> None:
    bars = encoder.bars({**KEPT, "int8_accuracy": None})
    assert [bar.line() for bar in bars if not bar.passed] == [
        "FAIL  torch_ext int8, mean cosine to fp32: not measured (at least 0.996)",
        "FAIL  torch_ext int8, least cosine to fp32: not measured (at least 0.99)",
    ]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with two layers, and a tokenizer that knows letters."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder = tmp_path_factory.mktemp("tiny")
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=66,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.needs_transformers
@pytest.mark.slow
def test_short_run(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/encoder.py", "--quick", "--model", str(tiny_model), "--threads", "1"]
    command += ["--output", str(tmp_path), "--texts", "24", "--accuracy-texts", "24"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    stem = f"encoder-{os.uname().machine}"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{kind}" for kind in ("md", "json", "svg", "png")}
    data = json.loads((tmp_path / f"{stem}.json").read_text())
    names = [row["name"] for row in data["encoder"]]
    assert {"torch_ext bf16", "PyTorch bf16", "PyTorch fp32", "ONNX Runtime fp32", "ONNX Runtime int8"} <= set(names)
    # All of them embed the same texts; how exactly is the business of other tests.
    for row in data["encoder"]:
        assert row["cosine_min"] > 0.9, row
    assert [row["name"] for row in data["latency"]] == names
    assert "PyTorch bf16, compile" in data["left_out"]
    assert data["machine"]["commit"]
    assert data["machine"]["versions"]["torch"]
    assert data["threads"] == 1
    assert data["texts"]["count"] == 24
    text = (tmp_path / f"{stem}.md").read_text()
    assert re.search(r"^(pass|FAIL)  latency, torch_ext bf16 / PyTorch bf16: ", text, re.MULTILINE)
    for name in (*names, *data["left_out"]):
        assert name in text
