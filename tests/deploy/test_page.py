"""The page at `/`, in a real browser: every task asked, by keyboard, in light and dark, within its own policy.

Screenshots are kept in the folder that `TORCH_EXT_SCREENSHOTS` names, else in the test's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.browser import Browser, Page, browser
from tests.deploy.test_server_bundles import serving

pytestmark = pytest.mark.browser

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return Path(os.environ.get("TORCH_EXT_SCREENSHOTS") or tmp_path)


def good(page: Page, url: str) -> None:
    """The page has no fault, and asked nobody but its server."""
    assert page.faults() == []
    assert all(asked.startswith((url, "data:")) for asked in page.asked())


def answered(page: Page) -> None:
    page.wait("!byId('ask').disabled && byId('status').textContent !== ''")
    assert page.eval("byId('status').className") == "good", page.eval("byId('status').textContent")


# What a model is asked about, and what has to be seen then.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "rerank": ("text-classification", {"num_labels": 1}, "document.querySelectorAll('.bar').length === 3"),
    "classify": (
        "text-classification",
        {"num_labels": 3},
        "[...document.querySelectorAll('.bar output')].reduce((sum, node) => sum + Number(node.textContent), 0) > 0.98",
    ),
    "entities": ("token-classification", {"num_labels": 3}, "document.querySelectorAll('mark small').length > 0"),
    "answer": (
        "question-answering",
        {},
        "document.querySelectorAll('mark').length === 1 && document.querySelectorAll('.bar').length === 3",
    ),
    "fill": (
        "fill-mask",
        {},
        "document.querySelectorAll('mark').length === 1 && !output.textContent.includes('[MASK]')",
    ),
    "sparse": ("sparse-embedding", {}, "document.querySelectorAll('.bar').length > 3"),
}


@pytest.mark.parametrize("name", CASES)
def test_tasks(name: str, chromium: Browser, tiny_model: ModelMaker, pictures: Path) -> None:
    task, settings, seen = CASES[name]
    model = tiny_model("bert", task, **settings)
    with serving(model, "--task", task, "--variant", "torch_ext-fp32") as server:
        page = Page(chromium)
        for dark in (False, True):
            page.open(f"http://127.0.0.1:{server.port}/", dark)
            page.wait("byId('fields').children.length > 0")
            page.eval("byId('ask').click()")
            answered(page)
            assert page.eval(seen), page.eval("byId('output').innerHTML")
            assert page.eval("document.documentElement.scrollWidth <= innerWidth")
            assert not page.eval("byId('key').checkVisibility()")  # No key is asked for.
            good(page, f"http://127.0.0.1:{server.port}")
            page.screenshot(pictures / f"{name}-{'dark' if dark else 'light'}.png")
        assert server.stop()[0] == 0


def test_similarity_by_keyboard_with_plots(chromium: Browser, minilm_model: Path, pictures: Path) -> None:
    with serving(minilm_model, "--api-key", "sesame", "--root-path", "/here") as server:
        url = f"http://127.0.0.1:{server.port}/here"
        page = Page(chromium)
        page.open(f"{url}/")
        page.wait("byId('fields').children.length > 0")
        # All that can be used is reached by the tabulator, in the order in which it is seen.
        reached = []
        for _ in range(6):
            page.key("Tab", 9)
            reached.append(
                page.eval("document.activeElement.id || document.activeElement.textContent.trim() || 'texts'")
            )
        assert reached == ["API", "OpenAPI", "Metrics", "texts", "key", "ask"]
        # Without its key it is refused, and says so; errors are text, whatever is in them.
        page.key("Enter", 13, text="\r")
        page.wait("byId('status').className === 'bad'")
        assert "401" in page.eval("byId('status').textContent")
        page.eval("byId('key').focus()")
        page.type("sesame")
        page.eval("document.querySelector('textarea').select(), document.querySelector('textarea').focus()")
        page.type("<b>A server answers.</b>\nIt replies.\nA fish swims.\nWhales live in the sea.")
        page.key("Enter", 13, modifiers=2)
        answered(page)
        cells = page.eval("[...document.querySelectorAll('td')].map((cell) => Number(cell.textContent))")
        assert len(cells) == 16
        assert cells[0] == cells[5] == cells[10] == cells[15] == 1
        assert cells[1] == cells[4] > cells[2]  # The server is like what replies, and less like a fish.
        assert cells[11] == cells[14] > cells[3]
        assert page.eval("document.querySelector('tbody th').title") == "<b>A server answers.</b>"
        assert page.eval("document.querySelectorAll('output b').length") == 0
        # The plots move.
        body = json.dumps(json.dumps({"model": "m", "input": ["A text."] * 3}))
        question = (
            f"fetch('v1/embeddings', {{method: 'POST', headers: {{authorization: 'Bearer sesame'}}, body: {body}}})"
        )
        plot = "document.querySelectorAll('svg path:not(.second)')[5].getAttribute('d')"
        page.wait(f"{question}.then(() => /L/.test({plot}))")
        labels = page.eval("[...document.querySelectorAll('svg')].map((plot) => plot.getAttribute('aria-label'))")
        assert [label.partition(":")[0] for label in labels] == ["Requests", "Latency p50, p95", "Batch", "Tokens"]
        assert not any("nothing measured" in label for label in labels)
        page.wait(
            "document.querySelectorAll('svg')[1].getAttribute('aria-label') === 'Latency p50, p95: no requests now'"
        )
        # All but the refusal that was asked for.
        assert [fault for fault in page.faults() if "401" not in fault] == []
        assert all(asked.startswith((url, "data:")) for asked in page.asked())
        page.screenshot(pictures / "similarity-light.png")
        for width, name in ((1200, "similarity-dark"), (420, "similarity-narrow")):
            page.resize(width, 800)
            page.open(f"{url}/", dark=True)
            page.wait("byId('fields').children.length > 0")
            page.eval("byId('key').value = 'sesame', byId('ask').click()")
            answered(page)
            assert page.eval("document.documentElement.scrollWidth <= innerWidth")
            page.wait("document.querySelectorAll('.value')[0].textContent.endsWith('/s')")
            page.screenshot(pictures / f"{name}.png")
        assert server.stop()[0] == 0


def test_description(chromium: Browser, tiny_model: ModelMaker, pictures: Path) -> None:
    with serving(tiny_model("bert", "fill-mask"), "--variant", "torch_ext-fp32") as server:
        page = Page(chromium)
        page.open(f"http://127.0.0.1:{server.port}/docs#api_fill_mask")
        page.wait("document.querySelectorAll('details').length > 20")
        page.eval("document.querySelector('#api_fill_mask button').click()")
        page.wait("document.querySelector('#api_fill_mask pre') !== null")
        assert "token_id" in page.eval("document.querySelector('#api_fill_mask pre').textContent")
        good(page, f"http://127.0.0.1:{server.port}")
        # What the page does not bring is refused: a script that got into it would not run.
        refused = page.eval(
            "new Promise((tell) => {"
            " document.addEventListener('securitypolicyviolation', (event) => tell(event.effectiveDirective));"
            " const node = document.createElement('script'); node.textContent = 'window.got = 1';"
            " document.body.append(node) })"
        )
        assert refused.startswith("script-src")
        assert page.eval("window.got === undefined")
        page.screenshot(pictures / "api.png")
        assert server.stop()[0] == 0
