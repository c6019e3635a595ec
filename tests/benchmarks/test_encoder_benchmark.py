"""`make bench`: how texts become batches, what is promised, and a short run of all of it."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import batching, bounded, candidates, encoder, encoder_report, report, timing

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = [5, 1, 9, 3, 3, 12, 2]


@pytest.mark.parametrize("setting", batching.settings(pads=False), ids=str)
def test_split_keeps_every_text_and_the_limit(setting: batching.Setting) -> None:
    batches = batching.split(LENGTHS, setting)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(LENGTHS)))
    if setting.by_length:
        assert [LENGTHS[i] for i in flat] == sorted(LENGTHS)
    else:
        assert flat == list(range(len(LENGTHS)))


def test_split_by_texts_and_tokens() -> None:
    assert batching.split(LENGTHS, batching.Setting(3, "texts", False)) == [[0, 1, 2], [3, 4, 5], [6]]
    # A text longer than the budget still gets a batch.
    assert batching.split(LENGTHS, batching.Setting(10, "tokens", False)) == [[0, 1], [2], [3, 4], [5], [6]]


def test_padded_engines_get_no_token_budgets() -> None:
    assert {setting.unit for setting in batching.settings(pads=True)} == {"texts"}
    assert len(set(batching.settings(pads=False))) == len(batching.settings(pads=False))


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


def test_a_call_without_time_has_one_sample() -> None:
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.interleaved(ways, 4, limit_s=1e-12)
    assert [len(times.samples_s) for times in found.values()] == [1, 1]
    calls.clear()
    found = timing.latencies(ways, 4, block=3, warm_up=2, limit_s=1e-12)
    assert [len(times.samples_s) for times in found.values()] == [1, 1]
    assert "".join(calls) == "ab" + "ab"  # what a call takes, and the sample


def test_percentiles() -> None:
    times = timing.Times([float(n) for n in range(100, 0, -1)])
    assert times.percentile_s(95) == 96
    assert times.percentile_s(100) == 100
    assert times.least_s == 1


class Fake(candidates.Candidate):
    """Embeds every text as its length, and sleeps for every token."""

    def __init__(self, name: str, token_s: float = 0.0) -> None:
        self.name = name
        self.token_s = token_s
        self.calls = 0

    def prepare(self, ids: candidates.Ids) -> list[int]:
        return [len(text) for text in ids]

    def run(self, batch: list[int]) -> np.ndarray:
        self.calls += 1
        time.sleep(self.token_s * sum(batch))
        rows = np.array([[1.0, length] for length in batch], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def texts(count: int) -> list[list[int]]:
    return [[1] * (1 + number % 7) for number in range(count)]


def test_a_slow_candidate_is_bounded() -> None:
    ids = texts(60)  # 235 tokens
    fakes = [Fake(candidates.OURS), Fake(candidates.PYTORCH_FP32), Fake(candidates.PYTORCH_BF16, token_s=0.01)]
    rows = encoder.measure_throughput(fakes, ids, 2, quick=False, sweep_s=0.3, passes_s=0.6)
    by_name = {row["name"]: row for row in rows}
    slow = by_name[candidates.PYTORCH_BF16]
    assert re.fullmatch(r"too slow: > \d+ s for 60 texts \(\d+ done\)", slow["bounded"])
    # A pass takes 2.35 s and more, and was stopped before its end: the bound is above what it can do.
    assert slow["at_most_texts_per_s"] > 60 / 2.35
    assert fakes[2].calls < 200
    assert "texts_per_s" not in slow
    for row in (by_name[candidates.OURS], by_name[candidates.PYTORCH_FP32]):
        assert row["cosine_min"] == pytest.approx(1)
        assert row["texts"] == 60
    cells = encoder_report.encoder_cells(slow)
    assert cells[0] == candidates.PYTORCH_BF16
    assert str(cells[2]).startswith("< ")
    assert str(cells[4]).startswith("< ")


def test_a_slow_machine_gets_fewer_texts() -> None:
    fakes = [Fake(candidates.OURS, 1e-4), Fake(candidates.PYTORCH_FP32, 1e-4)]
    rows = encoder.measure_throughput(fakes, texts(1024), 2, quick=True, sweep_s=0.2, passes_s=0.4)
    assert {row["texts"] for row in rows} <= {64, 128, 256, 512}


def test_a_batch_that_would_take_too_long_is_not_tried() -> None:
    slow = Fake("slow", token_s=0.001)
    tried = [
        batching.Setting(1, "texts", False),
        batching.Setting(32, "texts", True),
        batching.Setting(128, "texts", True),
    ]
    work = batching.best_setting(slow, texts(128), tried, budget_s=0.1, token_s=0.001)
    assert work.setting.size == 1


WATCHED = """
import sys, time
from benchmarks.bounded import Guard
guard, left_out = Guard(int(sys.argv[1])), sys.argv[2]
with guard.limit("quick", 100):
    pass
for name in ("hangs", "crashes"):
    if name not in left_out:
        with guard.limit(name, 0.2, texts=3):
            if name == "crashes":
                import os
                os.abort()
            time.sleep(1000)
print("left out:", left_out)
sys.exit(3)
"""


def test_a_candidate_that_hangs_or_crashes_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[dict[str, bounded.Stopped]] = []

    def command(descriptor: int, stopped: Mapping[str, bounded.Stopped]) -> list[str]:
        seen.append(dict(stopped))
        return [sys.executable, "-c", WATCHED, str(descriptor), " ".join(stopped)]

    assert bounded.supervise(command) == 3
    assert [sorted(stopped) for stopped in seen] == [[], ["hangs"], ["crashes", "hangs"]]
    assert seen[-1]["hangs"] == bounded.Stopped(0.2, "too slow: > 0.2 s", texts=3)
    assert seen[-1]["crashes"].texts == 0
    assert "ended the process by signal 6" in seen[-1]["crashes"].why
    assert "left out: hangs crashes" in capfd.readouterr().out


def test_a_process_that_ends_by_itself_is_not_started_again() -> None:
    runs: list[int] = []

    def command(descriptor: int, stopped: Mapping[str, bounded.Stopped]) -> list[str]:
        runs.append(descriptor)
        return [sys.executable, "-c", "import os; os.abort()"]

    assert bounded.supervise(command) == 128 + signal.SIGABRT
    assert len(runs) == 1


KEPT: dict[str, Any] = {
    "machine": {"isa": {"isa": "avx512_bf16"}},
    "encoder": [
        {"name": "torch_ext bf16", "ratio": 1.0},
        {"name": "PyTorch bf16", "ratio": 0.5},
        {"name": "PyTorch fp32", "ratio": 0.25},
        {"name": "ONNX Runtime int8", "ratio": 0.8},
    ],
    "latency": [{"name": "torch_ext bf16", "median_ms": 0.5}, {"name": "PyTorch bf16", "median_ms": 1.0}],
    "linear": [{"shape": "16x16x16", "name": "torch_ext bf16", "speedup": 0.6}],
    "int8_accuracy": {"texts": 2000, "cosine_mean": 0.997, "cosine_min": 0.991},
}
KEPT_AVX2: dict[str, Any] = KEPT | {
    "machine": {"isa": {"isa": "avx2"}},
    "encoder": [
        {"name": "torch_ext bf16", "ratio": 1.0},
        {"name": "torch_ext int8", "ratio": 1.2},
        {"name": "PyTorch bf16", "ratio": 0.1, "bounded": "too slow: > 9 s"},
        {"name": "PyTorch fp32", "ratio": 0.8},
        {"name": "ONNX Runtime fp32", "ratio": 0.7},
        {"name": "ONNX Runtime int8", "ratio": 0.9},
    ],
}


@pytest.mark.parametrize(("data", "count"), [(KEPT, 7), (KEPT_AVX2, 4)], ids=["avx512_bf16", "avx2"])
def test_bars_that_are_kept(data: dict[str, Any], count: int) -> None:
    bars = encoder_report.bars(data)
    assert len(bars) == count
    assert all(bar.passed for bar in bars), [bar.line() for bar in bars]


@pytest.mark.parametrize(
    ("kept", "part", "index", "key", "value"),
    [
        (KEPT, "encoder", 1, "ratio", 0.6),
        (KEPT, "encoder", 2, "ratio", 0.3),
        (KEPT, "encoder", 3, "ratio", 0.9),
        (KEPT, "latency", 0, "median_ms", 0.7),
        (KEPT, "linear", 0, "speedup", 0.4),
        (KEPT, "int8_accuracy", None, "cosine_mean", 0.995),
        (KEPT, "int8_accuracy", None, "cosine_min", 0.98),
        (KEPT_AVX2, "encoder", 1, "ratio", 1.1),
        (KEPT_AVX2, "encoder", 4, "ratio", 0.85),
        (KEPT_AVX2, "encoder", 5, "ratio", 1.0),
        (KEPT_AVX2, "int8_accuracy", None, "cosine_min", 0.98),
        # What was stopped keeps no bar, and a peer without a bound decides nothing.
        (KEPT_AVX2, "encoder", 1, "bounded", "too slow: > 9 s"),
        (KEPT_AVX2, "encoder", 5, "ratio", None),
    ],
)
def test_each_bar_can_be_missed(kept: dict[str, Any], part: str, index: int | None, key: str, value: Any) -> None:
    data = copy.deepcopy(kept)
    (data[part] if index is None else data[part][index])[key] = value
    assert sum(not bar.passed for bar in encoder_report.bars(data)) == 1


def test_int8_that_was_not_measured_is_missed() -> None:
    bars = encoder_report.bars({**KEPT, "int8_accuracy": None})
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


def test_a_quick_run_leaves_the_kept_results_alone() -> None:
    assert report.RESULTS == ROOT / "benchmarks" / "results"
    ignored = subprocess.run(["git", "check-ignore", "-q", str(encoder.QUICK_RESULTS)], cwd=ROOT, check=False)
    assert ignored.returncode == 0 or not (ROOT / ".git").exists()


@pytest.mark.needs_transformers
@pytest.mark.long
def test_short_run(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/encoder.py", "--quick", "--model", str(tiny_model), "--threads", "1"]
    # Time enough, so that a busy machine leaves nothing out.
    command += ["--output", str(tmp_path), "--texts", "24", "--accuracy-texts", "24", "--budget-s", "10000"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    stem = f"encoder-{os.uname().machine}"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{kind}" for kind in ("md", "json", "svg", "png")}
    data = json.loads((tmp_path / f"{stem}.json").read_text())
    names = [row["name"] for row in data["encoder"]]
    assert {"torch_ext bf16", "torch_ext int8", "torch_ext fp32"} <= set(names)
    assert {"PyTorch bf16", "PyTorch fp32", "ONNX Runtime fp32", "ONNX Runtime int8"} <= set(names)
    # All of them embed the same texts; how exactly is the business of other tests. Products of ONNX Runtime's int8
    # saturate on some CPUs.
    for row in data["encoder"]:
        assert row["cosine_min"] > (0.5 if row["name"] == "ONNX Runtime int8" else 0.9), row
    assert [row["name"] for row in data["latency"]] == names
    assert "PyTorch bf16, compile" in data["left_out"]
    assert data["machine"]["commit"]
    assert str(tmp_path) not in data["machine"]["command"]
    assert data["machine"]["versions"]["torch"]
    assert data["threads"] == 1
    assert data["texts"]["count"] == 24
    text = (tmp_path / f"{stem}.md").read_text()
    assert re.search(r"^(pass|FAIL)  texts/s, torch_ext bf16 / ", text, re.MULTILINE)
    for name in (*names, *data["left_out"]):
        assert name in text
