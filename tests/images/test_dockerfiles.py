"""What holds for every Dockerfile, read without an engine."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest

from .dockerfile import Dockerfile, Stage

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "dockerfiles").glob("*.Dockerfile"))
FINAL_STAGES = [
    (path, stage.name)
    for path in FILES
    for stage in Dockerfile.read(path).stages
    if stage.name in ("server", "server-all", "baked", "loadtest")
]


def test_there_are_dockerfiles_and_final_stages() -> None:
    assert {path.name for path in FILES} == {"server.Dockerfile", "loadtest.Dockerfile"}
    assert {name for _, name in FINAL_STAGES} == {"server", "server-all", "baked", "loadtest"}


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Dockerfile:
    return Dockerfile.read(request.param)


@pytest.fixture(params=FINAL_STAGES, ids=lambda final: final[1])
def final(request: pytest.FixtureRequest) -> tuple[str, list[Stage]]:
    path, name = request.param
    dockerfile = Dockerfile.read(path)
    return name, dockerfile.chain(dockerfile.stage(name))


def test_nothing_is_pulled_but_the_two_base_images(dockerfile: Dockerfile) -> None:
    named = {stage.name for stage in dockerfile.stages}
    assert {stage.base for stage in dockerfile.stages} <= named | {"scratch", "${BASE_IMAGE}", "${BUILD_IMAGE}"}
    assert [arg.value for arg in dockerfile.args] == [
        "BASE_IMAGE=python:3.11-slim-bookworm",
        "BUILD_IMAGE=${BASE_IMAGE}",
    ]
    copied_from = {i.flags["from"] for stage in dockerfile.stages for i in stage.instructions if "from" in i.flags}
    assert copied_from <= named
    assert not re.search(r"^#\s*syntax\s*=", dockerfile.text, re.MULTILINE | re.IGNORECASE)


def test_no_heredocs_and_no_hosts(dockerfile: Dockerfile) -> None:
    assert "<<" not in dockerfile.text
    hosts = re.findall(r"https?://([^/\s\"']+)", dockerfile.text)
    assert set(hosts) <= {"127.0.0.1:8000"}


def test_only_stages_of_the_build_machine_run_anything(dockerfile: Dockerfile) -> None:
    for stage in dockerfile.stages:
        if stage.values("RUN"):
            assert dockerfile.chain(stage)[-1].flags.get("platform") == "$BUILDPLATFORM", stage.name


def test_secrets_are_optional_and_leave_no_trace(dockerfile: Dockerfile) -> None:
    for stage in dockerfile.stages:
        assert not any("required" in value for value in stage.values("RUN"))
        if dockerfile.chain(stage)[-1].base == "${BASE_IMAGE}":
            assert not [arg for arg in stage.values("ARG") if arg.startswith("PIP_")], stage.name


def test_final_stages_run_as_a_numeric_user_that_is_not_root(final: tuple[str, list[Stage]]) -> None:
    _, chain = final
    users = [value for stage in reversed(chain) for value in stage.values("USER")]
    assert users, "no USER"
    uid, _, gid = users[-1].partition(":")
    assert int(uid) >= 1000
    assert int(gid) >= 1000


def test_final_stages_say_how_their_health_is_checked(final: tuple[str, list[Stage]]) -> None:
    name, chain = final
    checks = [value for stage in reversed(chain) for value in stage.values("HEALTHCHECK")]
    assert len(checks) == 1
    if name == "loadtest":
        assert checks == ["NONE"]
    else:
        start_period = re.search(r"--start-period=(\d+)s", checks[0])
        assert start_period is not None
        assert int(start_period[1]) >= 120, "a start takes half a minute under emulation"


def test_final_stages_start_without_a_shell(final: tuple[str, list[Stage]]) -> None:
    _, chain = final
    entry = [value for stage in chain for value in stage.values("ENTRYPOINT")]
    assert len(entry) == 1
    assert entry[0].startswith('["/app/init", "python", ')


def test_final_stages_are_labelled(final: tuple[str, list[Stage]]) -> None:
    _, chain = final
    labels = " ".join(value for stage in chain for value in stage.values("LABEL"))
    for key in ("title", "description", "licenses", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{key}=" in labels


def test_final_stages_carry_init_and_a_bill_of_materials(final: tuple[str, list[Stage]]) -> None:
    _, chain = final
    copied = [value for stage in chain for value in stage.values("COPY")]
    assert any(value.endswith(" /app/init init") for value in copied)
    assert any(value.endswith(" sbom.cdx.json") for value in copied)


def test_only_the_exporter_keeps_something(final: tuple[str, list[Stage]]) -> None:
    name, chain = final
    volumes = [value for stage in chain for value in stage.values("VOLUME")]
    assert volumes == (['["/data"]'] if name == "server-all" else [])


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves a path of the checkout out: the last pattern that matches it or a parent decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    result = False
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        globs = [bare, bare.removeprefix("**/")]
        if any(fnmatch.fnmatchcase(prefix, glob) for prefix in [*prefixes, parts[-1]] for glob in globs):
            result = not pattern.startswith("!")
    return result


def test_everything_that_is_copied_gets_into_the_build_context(dockerfile: Dockerfile) -> None:
    patterns = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    sources = [
        source
        for stage in dockerfile.stages
        for instruction in stage.instructions
        if instruction.name == "COPY" and "from" not in instruction.flags
        for source in instruction.words[:-1]
        if source not in ("wheelhouse*", "${BUNDLE}")
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), f"{source} is copied, but not there"
        assert not ignored(source, patterns), f"{source} is copied, but left out by .dockerignore"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("setup.py", False),
        ("deploy/server/app.py", False),
        ("wheelhouse/some.whl", False),
        ("bundle/manifest.json", False),
        (".git/config", True),
        (".venv/bin/python", True),
        ("deploy/__pycache__/x.pyc", True),
        ("torch_ext/_C.abi3.so", True),
        (".env", True),
    ],
)
def test_the_build_context_holds_what_the_images_need_and_no_more(path: str, expected: bool) -> None:
    patterns = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    assert ignored(path, patterns) is expected


def test_the_load_test_has_what_it_imports_of_the_server() -> None:
    copied = re.findall(r"deploy/\w+\.py", (ROOT / "dockerfiles" / "loadtest.Dockerfile").read_text(encoding="utf-8"))
    needed = {"deploy/__init__.py"}
    for path in [*(ROOT / "loadtest").rglob("*.py"), *(ROOT / name for name in copied)]:
        names = re.findall(r"^ *from deploy\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        needed |= {f"deploy/{name}.py" for name in names}
    assert set(copied) == needed
