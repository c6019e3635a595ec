"""Real text from the standard library, and text from files."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import texts

ROOT = Path(__file__).resolve().parents[2]


def test_the_sample_is_real_ragged_and_large_enough() -> None:
    found = texts.docstrings()
    assert len(found) >= 4000
    assert len(set(found)) == len(found)
    sample = texts.sample(2000)
    lengths = sorted(map(len, sample))
    assert lengths[0] < 30
    assert 60 < lengths[1000] < 300
    assert lengths[-1] > 1500
    # A docstring that everybody knows, as Python itself has it.
    assert any(text.startswith("Serialize ``obj`` to a JSON formatted ``str``.") for text in found)
    assert all(text == text.strip() and len(text) >= texts.MIN_CHARS for text in found)


def test_the_sample_is_the_same_in_every_process() -> None:
    code = "import deploy.texts, hashlib; print(hashlib.sha256(repr(deploy.texts.sample(50)).encode()).hexdigest())"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # Another one than this process has.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert done.stdout.strip() == hashlib.sha256(repr(texts.sample(50)).encode()).hexdigest()
    assert texts.sample(50) == texts.sample(200)[:50]
    assert texts.sample(50) != texts.sample(50, seed=1)


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_a_count_that_is_not_there(count: int) -> None:
    with pytest.raises(texts.TextsError, match="expected a count of texts between 1 and"):
        texts.sample(count)


def test_texts_of_files(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_bytes("\ufeffFirst\r\n\n  second \nümlaut".encode())
    assert texts.load_texts(lines) == ["First", "second", "ümlaut"]
    assert texts.load_texts(lines, limit=2) == ["First", "second"]
    objects = tmp_path / "a.jsonl"
    objects.write_text('"plain"\n{"id": 1, "text": "of an\\nobject"}\n\n{"text": "  "}\n', encoding="utf-8")
    assert texts.load_texts(objects) == ["plain", "of an\nobject"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "no texts in"),
        ("a.txt", b"\xff\xfe", "expected UTF-8"),
        ("a.jsonl", b'"good"\n{', "line 2: expected JSON"),
        ("a.jsonl", b'{"txt": "x"}', 'line 1: expected a JSON string, or an object with a string in its field "text"'),
        ("a.jsonl", b"3", "line 1: expected a JSON string"),
        ("a.jsonl", b'"\\ud800"', "line 1: expected Unicode text, got a lone surrogate"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(texts.TextsError, match=message):
        texts.load_texts(tmp_path / name)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(texts.TextsError, match="No such file"):
        texts.load_texts(tmp_path / "missing.txt")
    with pytest.raises(texts.TextsError, match="cannot read texts"):
        texts.load_texts(tmp_path)
