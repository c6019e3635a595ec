"""Result cards: their form, their pages, and what is said where something is missing."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import card, card_form
from benchmarks.card_page import card_page, index_page
from torch_ext.machine import Machine

ROOT = Path(__file__).resolve().parents[2]


def example(**machine: Any) -> dict[str, Any]:
    """A card of an ARM machine."""
    return {
        "form": card_form.NAME,
        "machine": {
            "arm": True,
            "emulated": False,
            "architecture": "aarch64",
            "cpu": "Neoverse <V2>",
            "features": ["bf16", "i8mm"],
            "cpus": 4,
            "memory_mb": 7900,
            "page_bytes": 4096,
            "instance": "c8g.xlarge",
            "firmware": "unknown",
            "price_per_hour": 0.36,
            "currency": "USD",
            **machine,
        },
        "model": "all-MiniLM-L6-v2",
        "date": "2026-01-01 00:00 UTC",
        "commit": "0123456789",
        "system": "Linux 6.12",
        "python": "3.12.3",
        "versions": {"torch": "2.10.0"},
        "quick": False,
        "parts": {
            "doctor": None,
            "encoder": {
                "threads": 4,
                "mean_tokens": 50,
                "quick": False,
                "rows": [
                    {"name": "PyTorch fp32", "texts_per_s": 100.0, "latency_ms": 7.0, "cosine_mean": None},
                    {"name": "torch_ext bf16", "texts_per_s": 400.0, "latency_ms": 0.7, "cosine_mean": 0.99998},
                ],
                "left_out": ["PyTorch <bf16>"],
                "command": "python benchmarks/encoder.py",
                "versions": {},
            },
            "accuracy": None,
            "knee": {"slo_p95_ms": 100, "variant": "torch_ext-int8", "texts_per_s": 200.0},
        },
        "not_run": {"doctor": "left out by --skip", "accuracy": "exit code 2: <broken>"},
    }


def accuracy(engines: dict[str, Any]) -> dict[str, Any]:
    return {"texts": 5, "pairs": 5, "engines": engines, "missed": []}


def test_a_card_has_its_form() -> None:
    assert card_form.check_card(example()) == []
    found = example()
    found["parts"]["accuracy"] = accuracy({"a": {"cosine": 1.0}, "b": {"cosine": 0.9}})
    assert card_form.check_card(found) == []


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a card."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from places(inner, (*path, key))


def test_whatever_has_the_form_has_a_page() -> None:
    """Cards come from users: one value of each kind, at every place."""
    whole = example()
    whole["parts"]["accuracy"] = accuracy({"a": {"cosine": 1.0}, "b": {"cosine": 0.9}})
    finding = {"name": "n", "status": "OK", "detail": "d", "advice": "a"}
    whole["parts"]["doctor"] = {"status": "OK", "findings": [finding], "isa": "neon"}
    whole["not_run"] = {}
    for path in places(whole):
        for value in (None, 0, -1, 5, True, "", "<b>", [], {}, [1], {"a": 1}, {"a": {}}, math.nan, math.inf):
            found = copy.deepcopy(whole)
            *parents, last = path
            functools.reduce(lambda at, key: at[key], parents, found)[last] = value
            if not card_form.check_card(found):
                assert "<b>" not in card_page(found) + index_page({"x": found}), path


def test_the_knee_of_a_card_is_what_was_answered() -> None:
    """Not what arrived: a server that refuses some requests answers fewer."""
    found = {
        "knee_per_s": 80.0,
        "points": [
            {"rate": 80.0, "kept": False, "texts_per_s": 60.0},
            {"rate": 80.0, "kept": True, "texts_per_s": 78.5},
            {"rate": 100.0, "kept": True, "texts_per_s": 99.0},
        ],
    }
    assert card.texts_at_knee(found) == 78.5
    assert card.texts_at_knee({"knee_per_s": None, "points": []}) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("commit"), "card lacks commit"),
        (lambda found: found.update(surprise=1), "card must not contain {'surprise'} properties"),
        (lambda found: found["machine"].update(cpus="4"), "card.machine.cpus must be integer"),
        (
            lambda found: found["parts"]["knee"].update(texts_per_s=-1),
            "card.parts.knee.texts_per_s must be bigger than or equal to 0",
        ),
        (lambda found: found["not_run"].update(doctor=5), "card.not_run.doctor must be string"),
        (lambda found: found["machine"].update(price_per_hour=-1), "card.machine.price_per_hour must be bigger than 0"),
        (lambda found: found["machine"].update(price_per_hour=math.nan), "price_per_hour: expected a finite number"),
        (lambda found: found["parts"]["encoder"]["rows"][0].update(texts_per_s=0), "texts_per_s must be bigger than 0"),
        (lambda found: found["parts"].update(accuracy=accuracy({"a": 5})), "engines.a must be object"),
        (lambda found: found["parts"].update(accuracy=accuracy({"a": {"cosine": "x"}})), "cosine must be number"),
        (
            lambda found: found["parts"].update(accuracy=accuracy({"a": {"cosine": 1.0}, "b": {"recall": 1.0}})),
            "expected the same measures of each engine",
        ),
        (lambda found: found["not_run"].pop("doctor"), "expected the reason why doctor is missing"),
        (lambda found: found.update(form="other"), "card.form must be one of"),
    ],
)
def test_a_wrong_card_is_refused(change: Any, message: str) -> None:
    found = example()
    change(found)
    assert message in "; ".join(card_form.check_card(found))


def text_of(page: str) -> str:
    return re.sub(r"<[^>]+>", " ", page)


def test_results_stand_beside_their_baseline() -> None:
    page = card_page(example())
    row = re.search(r'<tr class="ours"><td>torch_ext bf16</td>(.*?)</tr>', page)
    assert row is not None
    # texts/s, tokens/s per core, ratio, latency, cosine, and 0.36 / 3600 / 400 * 1e6.
    assert re.findall(r">([^<]+)</td>", row[1]) == ["400", "5,000", "4.00x", "0.7", "0.99998", "0.25"]
    assert "Neoverse &lt;V2&gt;" in page
    assert "exit code 2: &lt;broken&gt;" in page
    assert "too long: PyTorch &lt;bf16&gt;." in page
    assert "Not ARM" not in page
    assert not re.search(r"<script|https?://|src=", page), "it needs no network"


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"arm": False, "architecture": "x86_64"}, "Not ARM: measured on x86_64."),
        ({"emulated": True}, "Emulated: times mean nothing."),
        ({"features": ["asimddp"]}, "This CPU lacks bf16 or i8mm instructions."),
    ],
)
def test_what_a_reader_has_to_know_is_said(machine: dict[str, Any], said: str) -> None:
    assert said in card_page(example(**machine))
    assert said in text_of(index_page({"a": example(**machine)}))


def test_no_price_no_cost() -> None:
    found = example(price_per_hour=None)
    assert card_form.check_card(found) == []
    assert "not given" in card_page(found)


def test_index_lists_the_fastest_per_core_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = example(cpu="slow")
    slow["parts"]["encoder"]["rows"][1]["texts_per_s"] = 150.0
    nothing = example(cpu="nothing")
    nothing["parts"]["encoder"] = nothing["parts"]["knee"] = None
    nothing["not_run"] |= {"encoder": "x", "knee": "x"}
    for name, found in {"a-slow": slow, "b-fast": example(), "c-nothing": nothing}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert card.index(tmp_path) == 0
    page = (tmp_path / "index.html").read_text()
    assert re.findall(r'href="([^"]+)"', page) == ["b-fast.html", "a-slow.html", "c-nothing.html"]
    assert all((tmp_path / f"{name}.html").exists() for name in ("a-slow", "b-fast", "c-nothing"))
    (tmp_path / "d.json").write_text("{}")
    (tmp_path / "e.json").write_text("{")
    assert card.index(tmp_path) == 1
    printed = capsys.readouterr().err
    assert "d.json: card lacks" in printed
    assert f"card: cannot read {tmp_path / 'e.json'}" in printed
    assert 'href="javascript%3Ax%23.html"' in index_page({"javascript:x#": example()})


def test_cards_that_were_handed_in_are_right_and_listed() -> None:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(card.CARDS.glob("*.json"))}
    for stem, one in found.items():
        assert card_form.check_card(one) == [], stem
    assert (card.CARDS / "index.html").read_text() == index_page(found) + "\n", "run benchmarks/card.py index"


def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = copy.deepcopy(example())
    head["parts"]["encoder"]["rows"][1]["texts_per_s"] = 440.0
    for name, found in {"base": example(), "head": head, "other": example(cpu="other")}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert card.main(["compare", str(tmp_path / "base.json"), str(tmp_path / "head.json")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"torch_ext bf16 *\| *400 *\| *440 *\| *\+10\.0%", said)
    assert card.main(["compare", str(tmp_path / "base.json"), str(tmp_path / "other.json")]) == 1
    assert "different CPUs" in capsys.readouterr().out
    (tmp_path / "bad.json").write_text("{")
    for wrong in ("bad", "missing"):
        assert card.main(["compare", str(tmp_path / "base.json"), str(tmp_path / f"{wrong}.json")]) == 2
        assert f"card: cannot read {tmp_path / wrong}.json" in capsys.readouterr().err
    # Rows that only one card has are shown, and what makes a difference meaningless is said.
    head["quick"], head["parts"]["encoder"]["rows"][1]["name"] = True, "torch_ext int8"
    head["parts"]["knee"].update(slo_p95_ms=50, variant="torch_ext-bf16")
    (tmp_path / "head.json").write_text(json.dumps(head))
    assert card.main(["compare", str(tmp_path / "base.json"), str(tmp_path / "head.json")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"torch_ext bf16 *\| *400 *\| *missing", said)
    assert re.search(r"torch_ext int8 *\| *missing *\| *440", said)
    assert "Quick cards" in said
    assert "The knees are of different limits (100 and 50)" in said
    assert "The knees are of different variants" in said
    head["parts"]["encoder"]["threads"] = 64
    (tmp_path / "head.json").write_text(json.dumps(head))
    assert card.main(["compare", str(tmp_path / "base.json"), str(tmp_path / "head.json")]) == 1
    assert "different numbers of threads" in capsys.readouterr().out


def test_the_machine_says_what_it_is(tmp_path: Path) -> None:
    files = {
        "sys/class/dmi/id/sys_vendor": "Amazon EC2",
        "sys/class/dmi/id/product_name": "c8g.xlarge",
        "proc/cpuinfo": "Features\t: fp asimddp bf16 i8mm sve2\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f",
        "proc/meminfo": "MemTotal:        8000000 kB",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    machine = Machine(tmp_path, environ={}, affinity=4, architecture="aarch64", page_bytes=65536)
    found = card.identity(machine, "", 0.2, "EUR")
    assert (found["arm"], found["instance"], found["firmware"]) == (True, "c8g.xlarge", "Amazon EC2 c8g.xlarge")
    assert found["features"] == ["asimddp", "bf16", "i8mm", "sve2"]
    assert found["cpu"].startswith("Neoverse V2")
    assert card.identity(machine, "mine", None, "USD")["instance"] == "mine"
    (tmp_path / "sys/class/dmi/id/product_name").write_text("Virtual Machine\n")
    assert card.identity(machine, "", None, "USD")["instance"] == "unknown"


def test_what_cannot_run_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> dict[str, Any]:
        raise RuntimeError(f"no {folder}/file")

    monkeypatch.setattr(card, "doctor", broken)
    skipped = [word for part in ("encoder", "accuracy", "knee") for word in ("--skip", part)]
    assert card.main(["collect", "-o", str(tmp_path / "c"), *skipped]) == 1
    found = json.loads((tmp_path / "c.json").read_text())
    assert card_form.check_card(found) == []
    assert found["not_run"] == {
        "doctor": "no FOLDER/file",
        **dict.fromkeys(("encoder", "accuracy", "knee"), "left out by --skip"),
    }
    assert "<h2>Not run</h2>" in (tmp_path / "c.html").read_text()


@pytest.mark.parametrize("name", ["arm64", "x86-64"])
def test_workflows_run_targets_that_exist(name: str) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yaml").read_text())
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert workflow["permissions"] == {"contents": "read"}
    asked = set()
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        assert job["runs-on"].endswith("-arm") is (name == "arm64")
        for step in job["steps"]:
            asked |= set(re.findall(r"^ *make (?:-C \S+ )?([a-z0-9-]+)", step.get("run", ""), re.MULTILINE))
    assert asked <= targets
    assert "test" in asked
