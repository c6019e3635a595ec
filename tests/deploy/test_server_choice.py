"""Which variant a server takes by itself: the decision, the measurement and its cache, without a model.

Speeds are made up, by engines that move a clock of the test's own and by processes that only print.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import FakeEngine, LiveServer, make_manifest, wait_until

from deploy.bundle import (
    CONFIG_FILE,
    VARIANTS,
    Accuracy,
    BundleError,
    Manifest,
    Variant,
    file_entry,
    load_manifest,
    write_manifest,
)
from deploy.server.limits.bounds import Settings
from deploy.server.variants import LoadCancelled, choice, measurement, selection
from deploy.server.variants.choice import AUTO, Choice, candidates, fastest, misses
from deploy.server.variants.measure import compare, deal, make_lengths
from deploy.server.variants.measurement import Job, Measurement, Outcome
from deploy.server.variants.selection import Selection
from deploy.server.variants.speed_cache import SpeedCache, default_folder, fingerprint

EXACT = Accuracy("cosine", 1.0, 0.9999999, 9)
BF16 = Accuracy("cosine", 0.99998, 0.9999, 9)
INT8 = Accuracy("cosine", 0.9995, 0.9991, 9)


# The decision.


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({"exact": 100, "bf16": 130, "int8": 160}, "int8"),
        ({"exact": 100, "bf16": 130, "int8": 90}, "bf16"),
        ({"exact": 100, "bf16": 60, "int8": 50}, "exact"),
        # A tie goes to the more accurate one, but only a tie.
        ({"exact": 100, "bf16": 104, "int8": 104.9}, "exact"),
        ({"exact": 100, "bf16": 104, "int8": 108}, "bf16"),
        ({"exact": 90, "bf16": 96, "int8": 100}, "bf16"),
        ({"exact": 94, "int8": 100}, "int8"),
        ({"exact": 96, "int8": 100}, "exact"),
        # Rounding of fp32 is no difference of accuracy: the faster one.
        ({"exact": 100, "exact too": 101}, "exact too"),
        ({"exact": 101, "exact too": 100}, "exact"),
        ({"int8": 3}, "int8"),
    ],
)
def test_the_fastest_is_taken_and_ties_go_to_the_more_accurate(speeds: dict[str, float], expected: str) -> None:
    nearly = dataclasses.replace(EXACT, mean=1 - 1e-7, min=1 - 2e-7)
    accuracies = {"exact": EXACT, "exact too": nearly, "bf16": BF16, "int8": INT8}
    for order in itertools.permutations(speeds):
        assert fastest({name: speeds[name] for name in order}, accuracies) == expected


def test_the_choice_is_never_slower_than_a_more_accurate_variant() -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        names = [str(index) for index in range(5)]
        speeds = dict(zip(names, generator.uniform(90, 110, 5).tolist(), strict=True))
        means = dict(zip(names, generator.uniform(0.98, 1, 5).tolist(), strict=True))
        taken = fastest(speeds, {name: Accuracy("cosine", means[name], 0.9, 9) for name in names})
        assert speeds[taken] >= 0.95 * max(speeds.values())
        assert not [name for name in names if means[name] > means[taken] and speeds[name] >= speeds[taken]]


def test_equal_labels_are_told_apart_by_their_logits() -> None:
    first, second = (Accuracy("agreement", 1.0, 1.0, 9, details={"logit_error": error}) for error in (0.001, 0.1))
    assert fastest({"bf16": 100, "int8": 101}, {"bf16": first, "int8": second}) == "bf16"


def test_missed_bounds() -> None:
    kept = Accuracy("cosine", 0.993, 0.985, 9, {"mean": 0.985, "max_prob_diff": 0.1}, {"max_prob_diff": 0.05})
    assert misses(kept) == ""
    assert misses(dataclasses.replace(kept, bound={"mean": 0.995})) == "mean 0.993 < 0.995"
    worse = dataclasses.replace(kept, details={"max_prob_diff": 0.2})
    assert misses(worse) == "max_prob_diff 0.2 > 0.1"


def bundle_with(folder: Path, variants: Mapping[str, Accuracy]) -> Manifest:
    """A bundle that has files of one byte for variants with these accuracies."""
    manifest = make_manifest(folder)
    (folder / CONFIG_FILE).write_text("{}")
    made = {}
    for name, accuracy in variants.items():
        kind = VARIANTS[name]
        (folder / kind.file).write_bytes(b"x")
        made[name] = Variant(name, kind.file, kind.engine, kind.dtype, 1, accuracy)
    files = {path.name: file_entry(path) for path in folder.iterdir()}
    write_manifest(dataclasses.replace(manifest, files=files, variants=made))
    return load_manifest(folder)


ALL = {"torch_ext-fp32": EXACT, "onnx-int8": INT8, "torch_ext-bf16": BF16}


def installed(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: name if name in packages else None)


SCORES = Accuracy("agreement", 1.0, 1.0, 9, details={"max_prob_diff": 0.001, "mean_prob_diff": 0.0001})


@pytest.mark.parametrize(
    ("task", "close", "far", "why"),
    [
        ("feature-extraction", {"min": 0.9951}, {"min": 0.9949}, "min 0.9949 < 0.995"),
        ("feature-extraction", {"mean": 0.9991}, {"mean": 0.9989}, "mean 0.9989 < 0.999"),
        ("text-classification", {"max_prob_diff": 0.0099}, {"max_prob_diff": 0.0101}, "max_prob_diff 0.0101 > 0.01"),
        ("text-classification", {}, {"min": 0.98}, "min 0.98 < 0.99"),
        ("token-classification", {"max_prob_diff": 0.04}, {"mean_prob_diff": 0.0021}, "mean_prob_diff 0.0021 > 0.002"),
    ],
)
def test_what_answers_as_the_model_does_comes_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    close: dict[str, float],
    far: dict[str, float],
    why: str,
) -> None:
    installed(monkeypatch, "torch", "torch_ext", "onnxruntime")

    def with_figures(figures: dict[str, float]) -> Accuracy:
        own = {name: value for name, value in figures.items() if name in {"mean", "min"}}
        details = {name: value for name, value in figures.items() if name not in own}
        return dataclasses.replace(SCORES, **own, details={**SCORES.details, **details}, bound={"min": 0.5})

    accuracies = {"torch_ext-int8": with_figures(far), "torch_ext-bf16": with_figures(close)}
    manifest = dataclasses.replace(bundle_with(tmp_path, accuracies), task=task)
    assert candidates(manifest) == (["torch_ext-bf16"], {"torch_ext-int8": f"not as close to the model ({why})"})
    # One that is not close is better than none, if it keeps its bound.
    variants = {name: variant for name, variant in manifest.variants.items() if name == "torch_ext-int8"}
    assert candidates(dataclasses.replace(manifest, variants=variants)) == (["torch_ext-int8"], {})


def test_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missed = dataclasses.replace(INT8, bound={"mean": 0.9996})
    manifest = bundle_with(tmp_path, {**ALL, "onnx-fp32": EXACT, "torch_ext-int8": missed})
    installed(monkeypatch, "torch", "torch_ext", "onnxruntime")
    names, left_out = candidates(manifest)
    assert names == ["torch_ext-bf16", "onnx-int8", "onnx-fp32", "torch_ext-fp32"]
    assert left_out == {"torch_ext-int8": "its bound is missed (mean 0.9995 < 0.9996)"}
    (tmp_path / VARIANTS["onnx-fp32"].file).unlink()
    assert candidates(manifest)[1]["onnx-fp32"] == "model.onnx is missing"
    installed(monkeypatch, "torch", "torch_ext")
    assert candidates(manifest)[0] == ["torch_ext-bf16", "torch_ext-fp32"]
    installed(monkeypatch, "onnxruntime", "torch")
    names, left_out = candidates(manifest)
    assert names == ["onnx-int8"]
    assert left_out["torch_ext-bf16"] == "torch_ext is not installed"


# The measurement, with engines that take the time that the test says.


class Engines:
    """Engines whose batches move a clock.

    Attributes:
        loaded: Names in the order of loading.
        alive: How many engines exist, and `most` how many did at once.
    """

    def __init__(self, ms_per_token: Mapping[str, float | Exception], noise: Callable[[int], float] = lambda n: 1.0):
        self.ms_per_token = ms_per_token
        self.noise = noise
        self.now_s = 0.0
        self.calls = self.alive = self.most = 0
        self.loaded: list[str] = []

    def load(self, name: str) -> Callable[[Any], None]:
        cost = self.ms_per_token[name]
        if isinstance(cost, Exception):
            raise cost
        self.loaded.append(name)
        engines = self

        class Engine:
            def __init__(self) -> None:
                engines.alive += 1
                engines.most = max(engines.most, engines.alive)

            def __del__(self) -> None:
                engines.alive -= 1

            def __call__(self, batch: Sequence[Any]) -> None:
                engines.calls += 1
                engines.now_s += sum(map(len, batch)) * cost / 1e3 * engines.noise(engines.calls)

        return Engine()

    def compare(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        reports: list[dict[str, Any]] = []
        lengths = make_lengths(50, 256)
        speeds = compare(
            list(self.ms_per_token),
            self.load,
            lambda lengths: [np.zeros(length, np.int64) for length in lengths],
            lengths,
            dict.fromkeys(self.ms_per_token, EXACT),
            reports.append,
            lambda: self.now_s,
        )
        mean = sum(lengths) / len(lengths)
        self.truth = {
            name: 1e3 / cost / mean for name, cost in self.ms_per_token.items() if not isinstance(cost, Exception)
        }
        return speeds, reports


COSTS = {"a": 0.2, "b": 0.1, "c": 0.15, "d": 0.05, "e": 2.0}


def test_variants_are_measured_against_each_other() -> None:
    engines = Engines(COSTS)
    speeds, reports = engines.compare()
    assert speeds == pytest.approx(engines.truth)
    assert engines.loaded == list(COSTS)
    assert engines.most == 2, "no more than two are loaded at once"
    assert reports[-1] == {"done": True}
    # Half a second each for the first one and for the slower one of each pair, and at least three batches.
    assert engines.now_s < 0.5 * 2 * len(COSTS) + 6


def test_disturbances_do_not_decide() -> None:
    # Every fifth batch takes ten times as long, as when another process gets the cores.
    engines = Engines(COSTS, lambda call: 10.0 if call % 5 == 0 else 1.0)
    speeds, _ = engines.compare()
    ratios = {name: speeds[name] / engines.truth[name] for name in COSTS}
    assert max(ratios.values()) / min(ratios.values()) == pytest.approx(1, abs=0.02)


def test_slow_drift_does_not_decide() -> None:
    engines = Engines({"a": 0.1, "b": 0.1, "c": 0.1}, lambda call: 1 + call / 20)
    speeds, _ = engines.compare()
    assert max(speeds.values()) / min(speeds.values()) < 1.05


def test_variants_that_fail_are_left_out() -> None:
    engines = Engines({"a": ImportError("no\nengine"), "b": 0.1, "c": MemoryError("full"), "d": 0.05})
    speeds, reports = engines.compare()
    assert speeds == pytest.approx(engines.truth)
    failed = [report for report in reports if "failed" in report]
    assert failed == [
        {"failed": "a", "reason": "ImportError: no engine", "lasting": True},
        {"failed": "c", "reason": "MemoryError: full", "lasting": False},
    ]


@pytest.mark.parametrize(("mean", "longest"), [(50, 256), (50, 512), (400, 128), (3, 16), (50, 2), (10_000, 512)])
def test_lengths_are_ragged(mean: float, longest: int) -> None:
    lengths = make_lengths(mean, longest)
    assert len(lengths) == 64
    assert lengths == sorted(lengths, reverse=True)
    assert 1 <= lengths[-1] <= lengths[0] <= longest
    if (mean, longest) in ((50, 256), (50, 512)):
        assert sum(lengths) / 64 == pytest.approx(mean, rel=0.1)
        assert lengths[0] > 10 * lengths[-1]
    for texts in (1, 3, 8):
        batches = deal(lengths, texts)
        assert {len(batch) for batch in batches} == {texts}
        assert sorted(itertools.chain(*batches), reverse=True) == lengths[: len(batches) * texts]
    costs = [sum(batch) for batch in deal(lengths, 8)]
    assert max(costs) <= 1.6 * min(costs)


# The process that measures, replaced by one that only prints.


def pretend(*lines: str) -> list[str]:
    """A measuring process that runs these lines of Python; `names` are the candidates it is told."""
    start = (
        "import json, os, signal, sys, time\n"
        "names = json.loads(sys.stdin.readline())['names']\n"
        "def say(**value): print(json.dumps(value), flush=True)\n"
    )
    return [sys.executable, "-I", "-S", "-c", start + "\n".join(lines)]


def job(*names: str) -> Job:
    return Job("nowhere", names, 1, 100)


MEASURED = "say(begin='a'); print('noise'); say(speeds={'a': 1.5}); say(begin='b'); say(speeds={'a': 1.5, 'b': 2.5})"


def test_measurement() -> None:
    outcome = Measurement(job("a", "b"), 60, command=pretend(MEASURED, "say(done=True)")).run()
    assert outcome == Outcome({"b": 2.5, "a": 1.5}, {}, {}, True)
    assert list(outcome.texts_per_s) == ["b", "a"]


def test_a_variant_that_crashes_is_left_out() -> None:
    lines = ("for name in names:", " say(begin=name)", " if name == 'b': os.kill(os.getpid(), signal.SIGILL)")
    rest = (" say(speeds={n: 2.0 for n in names if n <= name})", "say(done=True)")
    outcome = Measurement(job("a", "b", "c"), 60, command=pretend(*lines, *rest)).run()
    assert outcome.texts_per_s == {"a": 2.0, "c": 2.0}
    assert list(outcome.failed) == ["b"]
    assert "SIGILL" in outcome.failed["b"]
    assert outcome.lasting


def test_lack_of_memory_is_not_remembered() -> None:
    kill = pretend("say(begin=names[0])", "os.kill(os.getpid(), signal.SIGKILL)")
    outcome = Measurement(job("a", "b"), 60, command=kill).run()
    assert set(outcome.failed) == {"a", "b"}
    assert "memory" in outcome.failed["a"]
    assert not outcome.lasting
    room = pretend(MEASURED, "say(failed='c', reason='MemoryError: full', lasting=False)", "say(done=True)")
    outcome = Measurement(job("a", "b", "c"), 60, command=room).run()
    assert outcome.failed == {"c": "MemoryError: full"}
    assert not outcome.lasting


def test_what_takes_too_long_is_left_out() -> None:
    slow = pretend(MEASURED, "say(begin='c'); time.sleep(60)")
    outcome = Measurement(job("a", "b", "c", "d"), limit_s=1.0, command=slow).run()
    assert outcome.texts_per_s == {"b": 2.5, "a": 1.5}
    assert outcome.unmeasured == dict.fromkeys(("c", "d"), "not measured within 1 s")
    assert not outcome.lasting


@pytest.mark.parametrize("command", [pretend("sys.exit(3)"), ["/no such program"]])
def test_a_process_that_does_not_start_measures_nothing(command: list[str], caplog: pytest.LogCaptureFixture) -> None:
    outcome = Measurement(job("a", "b"), 60, command=command).run()
    assert (outcome.texts_per_s, outcome.failed, set(outcome.unmeasured)) == ({}, {}, {"a", "b"})
    assert not outcome.lasting


def test_the_measuring_process_is_found_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = (
        f"import importlib.util, json; found = importlib.util.find_spec({measurement.COMMAND[-1]!r}) is not None; "
        "print(json.dumps({'speeds': {'a': float(found)}})); print(json.dumps({'done': True}))"
    )
    outcome = Measurement(job("a"), 60, command=[sys.executable, "-S", "-c", code]).run()
    assert outcome.texts_per_s == {"a": 1.0}


def test_a_server_that_is_stopped_while_it_measures(tmp_path: Path) -> None:
    """It answers that it lives and is not ready, and ends at once and cleanly."""
    started = tmp_path / "started"
    command = pretend(f"open({str(started)!r}, 'w').write(str(os.getpid()))", "time.sleep(60)")
    measurement = Measurement(job("a", "b"), 60, command=command)

    def load() -> FakeEngine:
        measurement.run()
        raise AssertionError("it was cancelled")

    server = LiveServer(make_manifest(tmp_path), Settings(port=0), FakeEngine(), load)
    server.batcher.cancel_load = measurement.cancel
    wait_until(lambda: started.exists() and started.read_text())
    assert server("GET", "/live").status == 200
    for path in ("/ready", "/info"):
        assert server("GET", path).status == 503
    begun_s = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun_s < 15, "the pretended measurement would take a minute"
    assert server.server.load_error is None
    assert not server.ready.is_set()
    assert not Path(f"/proc/{started.read_text()}").exists()


def test_cancelled_before_it_starts() -> None:
    measurement = Measurement(job("a", "b"), 60, command=["/no such program"])
    measurement.cancel()
    with pytest.raises(LoadCancelled):
        measurement.run()


# The cache.

KEY = {"manifest": "0" * 64, "candidates": ["a", "b"], "threads": 2, "versions": {"torch": "2"}, "cpu": ["x"]}


def test_cache_keeps_a_measurement(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    assert SpeedCache(folder, KEY).load() is None
    SpeedCache(folder, KEY).save({"a": 12.5}, {"b": "it crashes"})
    assert SpeedCache(folder, KEY).load() == ({"a": 12.5}, {"b": "it crashes"})
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    for field, value in (("manifest", "1" * 64), ("threads", 3), ("versions", {"torch": "3"}), ("cpu", ["y"])):
        assert SpeedCache(folder, {**KEY, field: value}).load() is None
    SpeedCache(None, KEY).save({"a": 1.0}, {})
    assert SpeedCache(None, KEY).load() is None


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"texts_per_s": {"a": 1.0, "b": 2.0}, "left_out": {}}',
        b"[" * 100_000,
        ("texts_per_s", {"a": "fast", "b": 1.0}),
        ("texts_per_s", {"a": float("nan"), "b": 1.0}),
        ("texts_per_s", {"a": -1.0, "b": 1.0}),
        ("texts_per_s", {"a": 1.0}),
        ("texts_per_s", {"a": 1.0, "b": 1.0, "/etc/passwd": 1.0}),
        ("texts_per_s", []),
        ("left_out", {"a": "both"}),
        ("key", {**KEY, "threads": 3}),
    ],
)
def test_damaged_cache_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes | tuple[str, Any]
) -> None:
    cache = SpeedCache(tmp_path, KEY)
    cache.save({"a": 1.0, "b": 2.0}, {})
    assert cache.load() is not None
    assert cache.path is not None
    if isinstance(damage, bytes):
        cache.path.write_bytes(damage)
    else:
        field, value = damage
        cache.path.write_text(json.dumps({**json.loads(cache.path.read_text()), field: value}))
    with caplog.at_level(logging.WARNING):
        assert cache.load() is None
    (record,) = caplog.records
    assert str(cache.path) in record.getMessage()
    assert "\n" not in record.getMessage()
    cache.save({"a": 1.0, "b": 2.0}, {})
    assert cache.load() is not None


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        cache = SpeedCache(folder, KEY)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "deploy.server"):
            cache.save({"a": 1.0, "b": 2.0}, {})
        assert cache.load() is None
        assert f"{cache.path} cannot be written (" in caplog.text
        assert "every start measures the variants; name a folder by --cache-dir" in caplog.text


def test_default_folder() -> None:
    assert default_folder({"HOME": "/home/me"}) == Path("/home/me/.cache/torch-ext/serve")
    assert default_folder({"HOME": "/home/me", "XDG_CACHE_HOME": "/var/cache"}) == Path("/var/cache/torch-ext/serve")
    assert default_folder({"HOME": "/home/me", "XDG_CACHE_HOME": "here"}) == Path("/home/me/.cache/torch-ext/serve")
    assert default_folder({"HOME": "/home/me", "DEPLOY_CACHE_DIR": "/own"}) == Path("/own")
    assert default_folder({"HOME": "/home/me", "DEPLOY_CACHE_DIR": "none"}) is None
    assert default_folder({}) is None


def test_fingerprint_tells_bundles_and_settings_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = bundle_with(tmp_path, ALL)
    monkeypatch.delenv("TORCH_EXT_ISA", raising=False)
    first = fingerprint(manifest, ["a"], 2)
    assert fingerprint(manifest, ["a"], 2) == first == json.loads(json.dumps(first))
    assert fingerprint(manifest, ["a"], 1) != first
    assert fingerprint(manifest, ["a", "b"], 2) != first
    monkeypatch.setenv("TORCH_EXT_ISA", "portable")
    assert fingerprint(manifest, ["a"], 2) != first
    monkeypatch.delenv("TORCH_EXT_ISA")
    (tmp_path / "manifest.json").write_text((tmp_path / "manifest.json").read_text() + "\n")
    assert fingerprint(manifest, ["a"], 2) != first


# All of it.


class FakeMeasurement:
    """Stands for the measuring process."""

    outcome = Outcome({"onnx-int8": 130.0, "torch_ext-bf16": 110.0, "torch_ext-fp32": 90.0}, {}, {}, True)
    runs = 0

    def __init__(self, job: Job, limit_s: float) -> None:
        assert limit_s == 30

    def run(self) -> Outcome:
        type(self).runs += 1
        return self.outcome


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeMeasurement]:
    kind = type("Fake", (FakeMeasurement,), {})
    monkeypatch.setattr(selection, "Measurement", kind)
    installed(monkeypatch, "torch", "torch_ext", "onnxruntime")
    # The fingerprint asks where packages are; here they are nowhere.
    monkeypatch.setattr(selection, "fingerprint", lambda manifest, names, threads: {**KEY, "candidates": names})
    return kind


def select(manifest: Manifest, cache: Path | None, requested: str = AUTO) -> tuple[Choice, Selection]:
    made = Selection(manifest, requested, 2, cache)
    made.prepare(100, 30)
    return made.decide(), made


def test_selection_measures_once(tmp_path: Path, fake: type[FakeMeasurement]) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    manifest = bundle_with(folder, ALL)
    taken, _ = select(manifest, tmp_path)
    assert (taken.variant, taken.by, dict(taken.texts_per_s)) == ("onnx-int8", "measurement", fake.outcome.texts_per_s)
    assert str(taken) == "measured: onnx-int8 130.0, torch_ext-bf16 110.0, torch_ext-fp32 90.0 texts/s"
    again, made = select(manifest, tmp_path)
    assert (again.variant, again.by, fake.runs) == ("onnx-int8", "cache", 1)
    assert again.texts_per_s == taken.texts_per_s
    assert made.names == ["onnx-int8"], "no other file need be checked"
    named, _ = select(manifest, tmp_path, "torch_ext-fp32")
    assert (named.variant, named.by, str(named), fake.runs) == ("torch_ext-fp32", "option", "by --variant", 1)
    _, made = select(manifest, None)
    assert fake.runs == 2
    assert set(made.names) == set(ALL)


def test_selection_of_one_variant_measures_nothing(tmp_path: Path, fake: type[FakeMeasurement]) -> None:
    manifest = bundle_with(tmp_path, {"onnx-int8": INT8, "onnx-fp32": dataclasses.replace(EXACT, bound={"min": 2.0})})
    taken, _ = select(manifest, tmp_path / "cache")
    assert (taken.variant, taken.by, fake.runs) == ("onnx-int8", "only", 0)
    assert str(taken).endswith("; without onnx-fp32: its bound is missed (min 1 < 2)")
    assert not (tmp_path / "cache").exists()


def test_selection_keeps_lasting_measurements_only(tmp_path: Path, fake: type[FakeMeasurement]) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    manifest = bundle_with(folder, ALL)
    fake.outcome = Outcome({"torch_ext-bf16": 110.0}, {"onnx-int8": "no memory"}, {"torch_ext-fp32": "no time"}, False)
    taken, _ = select(manifest, tmp_path)
    assert (taken.variant, dict(taken.left_out)) == (
        "torch_ext-bf16",
        {"onnx-int8": "no memory", "torch_ext-fp32": "no time"},
    )
    assert "; without onnx-int8: no memory; without torch_ext-fp32: no time" in str(taken)
    assert not list(tmp_path.glob("*.json"))


def test_selection_without_any_measurement(tmp_path: Path, fake: type[FakeMeasurement]) -> None:
    manifest = bundle_with(tmp_path, ALL)
    fake.outcome = Outcome(
        {}, {"torch_ext-bf16": "SIGILL"}, {"onnx-int8": "no time", "torch_ext-fp32": "no time"}, False
    )
    taken, _ = select(manifest, None)
    assert (taken.variant, taken.by) == ("onnx-int8", "default")
    assert taken.left_out == {"torch_ext-bf16": "SIGILL", "torch_ext-fp32": "no time"}
    fake.outcome = Outcome({}, dict.fromkeys(ALL, "SIGILL"), {}, True)
    with pytest.raises(BundleError, match=r"torch_ext-bf16: SIGILL.*--variant"):
        select(manifest, None)


def test_selection_without_any_candidate(tmp_path: Path) -> None:
    manifest = bundle_with(tmp_path, {"torch_ext-fp32": dataclasses.replace(EXACT, bound={"mean": 2.0})})
    with pytest.raises(BundleError, match=r"torch_ext-fp32: its bound is missed"):
        Selection(manifest, AUTO, 1, None)
    with pytest.raises(BundleError, match="torch_ext-bf16"):
        Selection(manifest, "torch_ext-bf16", 1, None)
    assert Selection(manifest, "torch_ext-fp32", 1, None).names == ["torch_ext-fp32"]


def test_the_choice_needs_the_standard_library_only() -> None:
    code = "import deploy.server.main, sys; print(*{'numpy', 'orjson', 'torch'} & set(sys.modules))"
    root = Path(choice.__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
