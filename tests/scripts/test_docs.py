"""The documentation: links lead somewhere, pages are found, commands exist, and the README stays short."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from loadtest.openloop.options import OBJECTIVES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT)
    for folder in ("", "docs", "dockerfiles", "benchmarks/results")
    for path in (ROOT / folder).glob("*.md")
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ +(.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = without_code((ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), f"{page}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors(there), f"{page}: {target} names no heading of {there.name}"


def test_every_page_is_listed() -> None:
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in listed, f"docs/README.md lacks {page.name}"
        assert f"](docs/{page.name})" in README, f"README.md lacks {page.name}"


def test_pages_begin_with_what_they_are_for() -> None:
    for page in PAGES:
        if page.parts[0] != "benchmarks" and page.name != "CHANGELOG.md":
            title, first = (ROOT / page).read_text(encoding="utf-8").split("\n\n")[:2]
            assert title.startswith("# ")
            assert not first.startswith(("|", "```", "-", "#", "!")), f"{page}: begins without a sentence"
            assert first.rstrip(" .").count(" ") > 5


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", text, re.MULTILINE):
            assert name in targets, f"{page}: make {name} is no target"


TOP = ("benchmarks", "deploy", "docs", "dockerfiles", "examples", "loadtest", "scripts", "tests", "torch_ext")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_exist(page: Path) -> None:
    """Whatever looks like a file or folder of the checkout, in text and in commands; `*` and `{a,b}` as in a shell."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(rf"(?<![\w./-])(?:{'|'.join(TOP)})/[\w./*{{}},-]*[\w*/}}]", text):
        if text[: match.start()].endswith(("](", "torch-ext:")):
            continue  # Links have a test of their own.
        named = match[0]
        inner = re.search(r"\{([^}]*)\}", named)
        for path in [named] if inner is None else [named.replace(inner[0], part) for part in inner[1].split(",")]:
            assert list(ROOT.glob(path.rstrip("/"))), f"{page}: there is no {path}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_exist(page: Path) -> None:
    """Modules that `python -m` starts, scripts, and the subcommands of `deploy`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:deploy|torch_ext|loadtest|benchmarks)[\w.]*)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page}: python -m {module}"
    for script in re.findall(r"python ((?:benchmarks|scripts|tests)/\S+\.py)", text):
        assert (ROOT / script).exists(), f"{page}: python {script}"
    commands = (ROOT / "deploy" / "__main__.py").read_text(encoding="utf-8")
    for command in re.findall(r"python -m deploy ([a-z]+)", text):
        assert f'"{command}"' in commands, f"{page}: python -m deploy {command}"


def test_options_of_the_load_test_are_listed() -> None:
    """Locust prints its help before it reads the load test's file."""
    page = (ROOT / "docs" / "load-test.md").read_text(encoding="utf-8")
    options = re.findall(r'^ +(?:\w+\.)?\w+\(?\s*"(--[a-z0-9-]+)"|^ +"(--[a-z0-9-]+)",$',
                         (ROOT / "loadtest" / "options.py").read_text(encoding="utf-8"), re.MULTILINE)  # fmt: skip
    names = {first or second for first, second in options}
    assert {"--task", "--slo-p95-ms", "--think-time-s", "--api-key"} <= names
    for name in names:
        assert f"`{name}`" in page, f"docs/load-test.md lacks {name}"


def test_first_screen() -> None:
    """One sentence, counts before times, a few lines to install and use, CPUs and limits, then links."""
    assert len(README.splitlines()) <= 120
    order = ["counted under emulation", "Measured on", "pip install dist/", "make demo` |", "make test` |", "| CPU |",
             "**Limits.**", "## Documentation"]  # fmt: skip
    places = [README.index(part) for part in order]
    assert places == sorted(places)
    code = "".join(re.findall(r"^```\w+\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    assert len([line for line in code.splitlines() if line]) <= 6


# What stays in the foreground until it is stopped.
SERVERS = re.compile(
    r"-m deploy (serve|run) |(?<!\S)serve run |^docker run (?!.*(--detach|-d |--entrypoint|imagetools))"
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_server_is_not_waited_for(page: Path) -> None:
    """Who pastes a block into a shell would wait at the server; the next command says that it goes into another one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```sh(?:ell)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        for line, after in itertools.pairwise(lines):
            if SERVERS.search(line) and not after.startswith("#"):
                assert "another shell" in after or re.search(r"# +or (so|an|with)\b", after), f"{page}: {after}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_shell_blocks_are_shell(page: Path) -> None:
    for block in re.findall(
        r"^ *```sh(?:ell)?\n(.*?)^ *```$", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL
    ):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page}: {done.stderr}{block}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_python_blocks_are_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL):
        compile(block, str(page), "exec")


def test_endpoints_are_listed() -> None:
    from deploy.server.api import ROUTES

    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    table = page[page.index("## Endpoints") : page.index("Answers of TEI's routes")]
    for route in ROUTES:
        path = route.path.replace("/versions/{version}", "").replace("/versions/1", "")
        assert f"`{path}`" in table or f" {path}`" in table, f"docs/serving.md lacks {route.path}"


# Of docker, kubectl, Locust and curl, in blocks of these pages.
FOREIGN = {"--platform", "--read-only", "--csv", "--html", "--headless", "--master", "--worker", "--entrypoint",
           "--expect-workers-max-wait", "--unix-socket", "--detach"}  # fmt: skip


@pytest.mark.parametrize("name", ["serving.md", "export.md", "load-test.md", "tools.md"])
def test_options_exist(name: str) -> None:
    known = set(FOREIGN)
    for folder in ("deploy", "loadtest"):
        for path in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'"(--[a-z][a-z0-9-]+)"', path.read_text(encoding="utf-8")))
    known |= {f"--slo-{limit.replace('_', '-')}" for limit in OBJECTIVES}
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= known


def test_what_the_load_test_and_the_examples_write_is_ignored() -> None:
    """`git add .` after an afternoon with the documentation commits no keys and no results."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            for name in re.findall(r"(?:-o |--file |--json |--tls-cert |--tls-key |>)([\w.-]+)(?=\s|$)", block):
                kept = [f"/{name}", f"/{name}/", f"/*{Path(name).suffix}"]
                assert any(line in ignored for line in kept), f"{page} writes {name}, which .gitignore lacks"
