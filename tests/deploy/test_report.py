"""report.html: one file that loads nothing, and says what the manifest says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deploy.bundle import Manifest, load_manifest
from deploy.export.page import REPORT_FILE, render

VOID = {"meta", "line", "rect", "circle", "polyline"}


class Balanced(HTMLParser):
    """Reads a page; every element is closed in its turn.

    Attributes:
        text: What a reader sees.
        open: Elements that are open.
        links: What is loaded, or leads elsewhere.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [f"{name}={value}" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def manifest(tiny_bundle: Callable[..., Path]) -> Manifest:
    return load_manifest(tiny_bundle("bert", "feature-extraction"))


def test_it_is_in_the_bundle(manifest: Manifest) -> None:
    assert REPORT_FILE in manifest.files
    page = manifest.path(REPORT_FILE).read_text(encoding="utf-8")
    read = Balanced(page)
    assert read.open == []
    assert read.links == []
    assert not re.search(r"https?:|url\(|@import|<script", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    for name, variant in manifest.variants.items():
        assert variant.accuracy is not None
        assert name in read.text
        assert f"{variant.accuracy.mean:.6f}" in read.text
    assert page.count("<polyline") == len(manifest.variants)
    assert all(version in read.text for version in manifest.created_with.values())


def test_what_was_tried_and_names_that_are_html(manifest: Manifest) -> None:
    names = {"name": "<script>alert(1)</script>", "architecture": "A&B"}
    tries = [{"layers_in_fp32": 0, "mean": 0.5, "min": 0.1, "missed": "mean cosine 0.5 < 0.9"}]
    layers = [{"names": ["layers.<0>"], "damage": 0.25, "kept": True}]
    variants = {
        name: dataclasses.replace(item, quantization={"tries": tries} if "onnx" in name else {"layers": layers})
        for name, item in manifest.variants.items()
    }
    page = render(
        dataclasses.replace(
            manifest,
            model=dataclasses.replace(manifest.model, **names),
            variants=variants,
            verification={**manifest.verification, "left_out": {"onnx-fp32": "too <large>"}},
        )
    )
    read = Balanced(page)
    assert read.open == []
    assert "<script" not in page
    for text in ("<script>alert(1)</script>", "too <large>", "mean cosine 0.5 < 0.9", "layers.<0>", "0.250000"):
        assert text in read.text


def test_nothing_measured(manifest: Manifest) -> None:
    """Bundles of before, and folders that were not exported, have neither figures nor texts."""
    variants = {
        name: dataclasses.replace(item, accuracy=None, speed=None, kernels=None, bytes=0)
        for name, item in manifest.variants.items()
    }
    page = render(dataclasses.replace(manifest, variants=variants, verification={}, machine=None))
    assert Balanced(page).open == []
    assert "<svg" not in page
