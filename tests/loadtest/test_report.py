"""The page on some results: it loads nothing, names everything, and is well-formed; charts and costs are right."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_openloop import a_result

from loadtest.measure import Objectives
from loadtest.openloop.charts import Line, bars, lines
from loadtest.openloop.commands import main
from loadtest.openloop.prices import Price, cost_per_million, read_prices
from loadtest.openloop.report import Source, _over_time, choose_prices, report_data
from loadtest.openloop.schema import KNEE_FORMAT, write_result
from loadtest.options import CannotStartError

EXAMPLE = Path(__file__).resolve().parents[2] / "loadtest" / "prices.example.json"


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects the attributes that could load something."""

    VOID = frozenset({"meta", "line", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [
            f"{name}={value}" for name, value in attributes if name in ("src", "href", "srcset", "xlink:href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("results")
    found = {
        "steps": a_result(Objectives(p99_ms=500.0), shape="steps", rate=20.0, rate_to=160.0, steps=4, duration_s=40.0),
        "one <b>": a_result(Objectives(p99_ms=500.0), rate=20.0, duration_s=12.0),
    }
    for name, result in found.items():
        write_result(folder / f"{name}.json", result)
    return [str(folder / f"{name}.json") for name in found]


def test_the_page_loads_nothing_and_has_every_part(results: list[str], tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"currency": "EUR", "instances": {"box": {"per_hour": 0.36, "note": "today"}}}))
    page, data = tmp_path / "page.html", tmp_path / "page.json"
    assert main(["report", *results, "-o", str(page), "--json", str(data), "--prices", str(prices)]) == 0
    text = page.read_text(encoding="utf-8")
    assert Page(text).loads == []
    assert "http" not in re.sub(r"http://h\b", "", text)
    assert "@import" not in text
    assert "url(" not in text
    for expected in ("one &lt;b&gt;", "knee of steps", "p95", "limit of p99", "infer", "EUR", "today", "Hollow points"):
        assert expected in text, expected
    assert "prefers-color-scheme: dark" in text
    assert "one <b>" not in text.replace("\\u003c", "<").partition('id="data"')[0]
    inside = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert inside is not None
    written = json.loads(data.read_text())
    assert json.loads(inside[1]) == written
    first, second = written["results"]
    assert first["knee_per_s"] == pytest.approx(113.3, rel=0.01)
    # 0.36 an hour are 0.0001 a second.
    assert second["cost"]["per_million_texts"] == pytest.approx(100 / second["best_kept"]["texts_per_s"])


def test_results_without_answers_and_without_prices(tmp_path: Path) -> None:
    result = a_result(server={"service_s": 1.0, "full": 1}, rate=5.0, duration_s=4.0)
    result["series"] = [{**second, "latency": [], "good": 0} for second in result["series"]]
    write_result(tmp_path / "run.json", result)
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "run.json"), "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert Page(text).loads == []
    assert "Nothing to draw" in text
    assert "No prices" in text


def test_every_shape_has_its_numbers_on_the_page(tmp_path: Path) -> None:
    """Also where the rate changed, which gives no point, and where everything came at once."""
    spike = a_result(shape="spike", rate=20.0, rate_to=60.0, spike_every_s=4.0, spike_s=1.0, duration_s=12.0)
    at_once = a_result(shape="at-once", count=50)
    for name, result in (("spike", spike), ("once", at_once)):
        write_result(tmp_path / f"{name}.json", result)
    page = tmp_path / "page.html"
    assert main(["report", *(str(tmp_path / f"{name}.json") for name in ("spike", "once")), "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    (row,) = re.findall(r"<tr><td>spike</td>.*?</tr>", text)
    cells = re.findall(r"<td>([^<]*)</td>", row)
    summary = spike["summary"]
    assert cells[2:4] == [f"{summary['requests_per_s']:.4g}", f"{summary['texts_per_s']:.4g}"]
    assert cells[4:7] == [f"{summary['latency_ms'][name]:.4g}" for name in ("p50", "p95", "p99")]
    assert "<h3>once</h3><p>All requests were to start at once.</p>" in text


def test_a_last_group_of_seconds_is_not_diluted() -> None:
    """600 s are drawn by twos; of 601, the last stands alone."""
    result = a_result(rate=2.0, process="constant", duration_s=601.0)
    drawn = _over_time(Source("long", result))
    path = re.findall(r'<path class="line s0" d="([^"]*)"', drawn)[-1]
    heights = [float(point.split(" ")[1]) for point in re.split("[ML]", path)[1:]]
    assert heights[-1] == pytest.approx(heights[-2], abs=1)


def test_points_without_neighbours_are_dots() -> None:
    found = lines("x", [Line("a", [(0, 1.0), (1, None), (2, 3.0), (3, 4.0)])], x_label="x", y_label="y")
    assert found.count('class="line dot s0"') == 1
    assert 'class="line dot' not in lines("x", [Line("a", [(0, 1.0), (1, 2.0)])], x_label="x", y_label="y")


def test_a_trial_above_the_knee_was_lucky(tmp_path: Path) -> None:
    points = [{**a_result(rate=rate, duration_s=12.0)["points"][0], "rate": rate} for rate in (20.0, 40.0, 60.0)]
    result = a_result(rate=20.0, duration_s=12.0)
    shared = ("created", "command", "versions", "machine", "settings", "objectives", "server", "workers")
    knee = {name: result[name] for name in shared} | {"format": KNEE_FORMAT, "points": points, "messages": []}
    knee |= {"knee_per_s": 40.0, "missed_per_s": 60.0, "void": [], "exit_code": 0}
    write_result(tmp_path / "knee.json", knee)
    (row,) = report_data([Source("knee", knee)])["results"]
    assert row["best_kept"] == points[1]


def test_prices_are_the_users(tmp_path: Path, results: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # The example has none: a forgotten one is refused, and never counts as free.
    assert main(["report", *results, "-o", str(tmp_path / "x.html"), "--prices", str(EXAMPLE)]) == 2
    assert "Prices are yours to fill in" in capsys.readouterr().err
    named = '"instances": {"a": {"per_hour": 1}}'
    for content in (f"{{{named}}}", f'{{"currency": 5, {named}}}', f'{{"currency": " ", {named}}}'):
        (tmp_path / "p.json").write_text(content)
        with pytest.raises(CannotStartError, match='--prices: expected "currency" in'):
            read_prices(tmp_path / "p.json")
    for content in ("[]", '{"instances": {}}', '{"instances": {"a": {"per_hour": 0}}}', "{"):
        (tmp_path / "p.json").write_text(content)
        with pytest.raises(CannotStartError, match="--prices"):
            read_prices(tmp_path / "p.json")
    assert cost_per_million(Price("a", 3.6, "EUR"), 0.0) is None


def test_each_result_has_its_machine() -> None:
    one, two = Price("one", 1.0, "EUR"), Price("two", 2.0, "EUR")
    assert choose_prices([], [], 2) == [None, None]
    with pytest.raises(CannotStartError, match="--instance: expected --prices"):
        choose_prices([], ["one"], 2)
    assert choose_prices([one], [], 2) == [one, one]
    assert choose_prices([one, two], ["two"], 2) == [two, two]
    assert choose_prices([one, two], ["two", "one"], 2) == [two, one]
    for wanted in ([], ["three"], ["one", "two", "one"]):
        with pytest.raises(CannotStartError, match="--instance: expected the machine that was measured"):
            choose_prices([one, two], wanted, 2)


def test_charts_stay_within_their_frame() -> None:
    line = Line("a", [(0, 0.5), (10, None), (20, 3000.0)], [False, False, True])
    for log in (True, False):
        text = lines("t", [line], x_label="x", y_label="y", log=log, marks=[(25, "m")], limit=(100.0, "l"))
        Page(text)
        places = [float(x) for x in re.findall(r' (?:cx|x1|x2|x)="([\d.]+)"', text)]
        heights = [float(y) for y in re.findall(r' (?:cy|y1|y2|y)="([\d.]+)"', text)]
        assert all(0 <= x <= 720 for x in places)
        assert all(0 <= y <= 300 for y in heights)
        assert text.count("<circle") == 2
    assert lines("t", [Line("a", [(1, 5.0)])], x_label="x", y_label="y")
    # Within less than a factor of two there is one power's multiple, and still an axis to read.
    narrow = lines("t", [Line("a", [(0, 6.0), (1, 9.0)])], x_label="x", y_label="y", log=True)
    assert narrow.count('class="grid"') >= 3
    rows: list[tuple[str, Any]] = [("run", [("queue", 1.0), ("infer", 3.0)])]
    assert "width:75.00%" in bars("t", rows, unit="ms")
