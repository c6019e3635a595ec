"""docker-bake.hcl, make images and the Dockerfiles name the same images."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from .dockerfile import Dockerfile

ROOT = Path(__file__).resolve().parents[2]
BAKE = (ROOT / "docker-bake.hcl").read_text()
TARGETS = {
    name: dict(re.findall(r'^  (\w+) *= *"([^"]*)"$', body, re.MULTILINE))
    for name, body in re.findall(r'^target "([\w-]+)" \{\n(.*?)^\}', BAKE, re.MULTILINE | re.DOTALL)
}
IMAGES = ("server", "server-all", "loadtest", "wheel")


def test_all_images_are_baked() -> None:
    assert set(TARGETS) == {"common", *IMAGES}
    (group,) = re.findall(r'^group "default" \{\n  targets = \[(.*)\]', BAKE, re.MULTILINE)
    assert re.findall(r'"([^"]+)"', group) == ["server", "server-all", "loadtest"]
    assert 'platforms = ["linux/amd64", "linux/arm64"]' in BAKE
    assert "type=provenance,mode=max" in BAKE


@pytest.mark.parametrize("name", IMAGES)
def test_dockerfiles_have_the_stages(name: str) -> None:
    target = TARGETS[name]
    dockerfile = Dockerfile.read(ROOT / target["dockerfile"])
    assert dockerfile.stage(target["target"]).name == name
    arguments = re.findall(r"^    (\w+) +=", BAKE, re.MULTILINE)
    assert all(re.search(rf"^ARG {argument}\b", dockerfile.text, re.MULTILINE) for argument in arguments)


def test_bases_take_digests() -> None:
    """Each base that a Dockerfile names has a variable for its digest, and no target sets a base without it."""
    bases = {
        base
        for path in (ROOT / "dockerfiles").glob("*.Dockerfile")
        for stage in Dockerfile.read(path).stages
        for base in re.findall(r"^\$\{(\w+)\}$", stage.base)
    }
    assert bases == {"BASE_IMAGE", "BUILD_IMAGE"}
    variables = re.findall(r'^variable "(\w+)"', BAKE, re.MULTILINE)
    for base in bases:
        digest = base.replace("IMAGE", "DIGEST")
        assert {base, digest} <= set(variables)
        assert re.findall(rf"^ +{base} += (.*)$", BAKE, re.MULTILINE) == [f'join("@", compact([{base}, {digest}]))']


def make_images(tmp_path: Path, *names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script with a client that prints its arguments."""
    client = tmp_path / "docker"
    client.write_text('#!/bin/sh\necho "$@"\n')
    client.chmod(0o755)
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "images.sh"), *names],
        env={"PATH": os.environ["PATH"], "DOCKER": str(client), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_images_of_this_machine(tmp_path: Path) -> None:
    result = make_images(tmp_path, BASE_IMAGE="base@sha256:1", PLATFORM="linux/arm64")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name, line in zip(("server", "server-all", "loadtest"), lines, strict=True):
        assert f"--file {TARGETS[name]['dockerfile']} --target {name} " in line
        assert f"--tag torch-ext-{name} " in line
        assert "--build-arg BASE_IMAGE=base@sha256:1" in line
        assert "--platform linux/arm64" in line
    assert "--output dist" in make_images(tmp_path, "wheel").stdout
    assert "expected server, server-all, loadtest or wheel" in make_images(tmp_path, "other").stderr
