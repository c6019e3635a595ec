"""What all benchmarks write."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import report


def test_markdown_pads_and_escapes() -> None:
    text = report.markdown(["name", "value"], [["a|b", 1.5], ["c", None]])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1, text
    assert re.fullmatch(r"\| -+ \| -+: \|", lines[1])
    assert r"a\|b" in lines[2]
    assert lines[3].replace(" ", "") == "|c||"


def test_commands_in_results_say_nothing_of_where_files_are() -> None:
    words = ["python", "benchmarks/encoder.py", "--model", "/home/me/my models/a b", "--output", "results"]
    assert report.command_line(words) == "python benchmarks/encoder.py --model 'a b' --output results"


def test_markdown_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match=r"expected 2 cells in every row, got \[2, 1\]"):
        report.markdown(["a", "b"], [["only one"]])


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "passed"),
    [
        (1.8, 1.8, True, True),
        (1.79, 1.8, True, False),
        (0.6, 0.6, False, True),
        (0.61, 0.6, False, False),
        (None, 1.0, True, False),
        (None, 1.0, False, False),
        (math.nan, 1.0, True, False),
        (math.nan, 1.0, False, False),
    ],
)
def test_bars(value: float | None, limit: float, at_least: bool, passed: bool) -> None:
    bar = report.Bar("speed", value, limit, at_least)
    assert bar.passed is passed
    assert bar.line().startswith("pass" if passed else "FAIL")
    assert ("at least" in bar.line()) is at_least


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n", "Some CPU @ 2 GHz"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd4f\n", "Neoverse V2"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xfff\n", "part 0xfff"),
        ("CPU implementer\t: 0xc0\nCPU part\t: 0xd4f\n", "implementer 0xc0"),
    ],
)
def test_cpu_name(cpuinfo: str, name: str) -> None:
    assert name in report.cpu_name(cpuinfo)


def test_commit_says_what_differs(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        settings = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *settings, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert report.commit(tmp_path) == "unknown"
    git("init", "--quiet")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for file in (tmp_path / "code", results / "table.md"):
        file.write_text("one")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    assert git("rev-parse", "HEAD").startswith(report.commit(tmp_path))
    (results / "table.md").write_text("two")
    assert not report.commit(tmp_path).endswith("+changes")
    (tmp_path / "code").write_text("two")
    assert report.commit(tmp_path).endswith("+changes")


def test_write_makes_four_files_that_repeat(tmp_path: Path) -> None:
    panels = [
        report.Panel("speed", "texts/s", ["ours", "theirs"], {"median": [3.0, 1.0], "most": [4.0, None]}),
        report.Panel("one", "ms", ["ours"], {"median": [0.001]}, logarithmic=True),
    ]
    data = {"bars": [report.Bar("speed", 3.0, 2.0)]}
    first = report.write(tmp_path / "a" / "stem", "# table", data, panels, "title")
    second = report.write(tmp_path / "b" / "stem", "# table", data, panels, "title")
    assert [path.name for path in first] == ["stem.md", "stem.json", "stem.svg", "stem.png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert json.loads(first[1].read_text())["bars"][0]["passed"] is True
    svg = first[2].read_text()
    for text in ("theirs", "texts/s", "title"):
        assert text in svg
    assert first[3].read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_missing_values(tmp_path: Path) -> None:
    panel = report.Panel("speed", "texts/s", ["a", "b"], {"median": [1.0]})
    with pytest.raises(ValueError, match="speed: expected 2 values of median, got 1"):
        report.plot([panel], "title", tmp_path / "stem")
