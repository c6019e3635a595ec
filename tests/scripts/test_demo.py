"""The demo's own parts: it starts and stops servers, and its table says what was measured."""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import deploy.tasks
import loadtest.tasks
from deploy.server.variants.choice import Choice

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_script", ROOT / "scripts" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SERVER = "import os, time; print(f'serving it on http://127.0.0.1:{os.getpid()}', flush=True); time.sleep(60)"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pid_of(host: str) -> int:
    return int(host.rpartition(":")[2])


def test_server_is_stopped_whatever_happens(demo: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER]
    with demo.serving(command, tmp_path / "log") as started:
        first = pid_of(started.host)
        assert alive(first)
    assert not alive(first)
    with pytest.raises(KeyboardInterrupt), demo.serving(command, tmp_path / "log") as started:  # noqa: PT012
        second = pid_of(started.host)
        raise KeyboardInterrupt
    assert not alive(second)


def test_server_that_dies_is_told_with_its_log(demo: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no such bundle'); sys.exit(2)"]
    with pytest.raises(demo.DemoError, match=r"(?s)exit code 2.*no such bundle"), demo.serving(command, tmp_path / "l"):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_running(tmp_path: Path, number: int) -> None:
    script = (
        "import signal, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import demo, pathlib\n"
        "def run(arguments):\n"
        f"    log = pathlib.Path({str(tmp_path / 'log')!r})\n"
        f"    with demo.serving([sys.executable, '-c', {SERVER!r}], log) as started:\n"
        "        print(started.host, flush=True)\n"
        "        signal.pause()\n"
        "demo.demo = run\n"
        "sys.argv = ['demo']\n"
        "sys.exit(demo.main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    pid = pid_of(process.stdout.readline().strip())
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "demo: stopped; its servers are stopped too"
    deadline_s = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not alive(pid)


def test_every_task_can_be_shown(demo: ModuleType) -> None:
    assert demo.TASKS.keys() == deploy.tasks.TASKS.keys()
    assert {task.endpoint for task in demo.TASKS.values()} <= loadtest.tasks.TASKS.keys()
    # Read, not imported: it takes Flask and transformers.
    text = (ROOT / "scripts" / "plain_server.py").read_text(encoding="utf-8")
    table = next(node.value for node in ast.parse(text).body if isinstance(node, ast.Assign))
    assert isinstance(table, ast.Dict)
    served = {ast.literal_eval(key) for key in table.keys if key is not None}
    assert {name for name, task in demo.TASKS.items() if task.plain} == served


def measured(texts_per_s: float) -> dict[str, Any]:
    return {"texts_per_s": texts_per_s, "latency_ms": {"p50": 10.4, "p95": 20.6}}


def test_table_compares_with_the_baseline(demo: ModuleType) -> None:
    rows = [
        demo.Row(demo.BASELINE, 90_900_000, "the reference", measured(40)),
        demo.Row("onnx-int8", 22_900_000, "cosine 0.99", measured(100)),
    ]
    header, first, second = demo.table(rows)
    assert header.split() == ["variant", "size", "accuracy", "against", "fp32", "texts/s", "gain", "p50", "p95"]
    assert first.split()[-8:] == ["the", "reference", "40.0", "1.0x", "10", "ms", "21", "ms"]
    assert second.split() == ["onnx-int8", "22.9", "MB", "cosine", "0.99", "100.0", "2.5x", "10", "ms", "21", "ms"]


@pytest.mark.parametrize(("baseline", "variant"), [(0.0, 0.3), (0.3, 0.0)])
def test_no_gain_of_a_speed_that_other_programs_lowered(demo: ModuleType, baseline: float, variant: float) -> None:
    rows = [
        demo.Row(demo.BASELINE, 90_900_000, "the reference", measured(2.9), others=baseline),
        demo.Row("onnx-int8", 22_900_000, "cosine 0.99", measured(100), others=variant),
    ]
    assert demo.table(rows)[2].split()[-6:-4] == ["100.0", "-"]


def test_table_marks_the_variant_that_the_server_took(demo: ModuleType) -> None:
    rows = [
        demo.Row(demo.BASELINE, 90_900_000, "the reference", measured(40)),
        demo.Row("torch_ext-bf16", 45_200_000, "cosine 1", measured(100), chosen=True),
        demo.Row("onnx-int8", 22_900_000, "cosine 0.99", measured(104)),
    ]
    assert [line.split("  ")[0] for line in demo.table(rows)] == [
        "variant",
        demo.BASELINE,
        "torch_ext-bf16 *",
        "onnx-int8",
    ]
    assert demo.faster_than_chosen(rows) == "", "within noise"
    rows[2] = demo.Row("onnx-int8", 22_900_000, "cosine 0.99", measured(120))
    assert demo.faster_than_chosen(rows) == "onnx-int8"
    assert demo.faster_than_chosen(rows[:1]) == ""


def test_start_line_is_that_of_the_server(demo: ModuleType) -> None:
    choice = Choice(
        "onnx-int8", "measurement", {"onnx-int8": 82.9, "b": 58.4}, {"c": "its bound is missed (min 1 < 2)"}
    )
    line = (
        f"serving name (feature-extraction) on http://127.0.0.1:80 variant=onnx-int8 threads=2 isa=x-1.2 ({choice})\n"
    )
    started = demo.read_start(f"a warning\n{line}more\n")
    assert started == demo.Started("http://127.0.0.1:80", "onnx-int8", str(choice))
    assert demo.read_start(line[:-1]) is None, "the line is not complete"
    assert demo.read_start("serving folder on http://127.0.0.1:80\n") == demo.Started("http://127.0.0.1:80")


def test_only_what_others_compute_counts_as_theirs(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 7.0, 50.0), (112.0, 9.0, 55.0)])
    monkeypatch.setattr(demo.Neighbours, "_read", staticmethod(lambda: next(readings)))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with demo.Neighbours() as neighbours:
        pass
    # 12 s of CPU in all, 2 s of them its own, in 5 s on 4 CPUs.
    assert neighbours.share == pytest.approx(0.5)


def test_children_are_its_own(demo: ModuleType) -> None:
    busy_s, own_s, at_s = demo.Neighbours._read()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    after_busy_s, after_own_s, after_at_s = demo.Neighbours._read()
    # The kernel counts in ticks.
    assert after_own_s - own_s >= 0.48
    assert after_busy_s - busy_s >= 0.48
    assert after_at_s > at_s
