"""The images' bills of materials."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not there")

SCRIPT = Path(__file__).resolve().parents[2] / "dockerfiles" / "sbom.py"


def bill(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "an-image", "1.2", str(root), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base image's root, and a folder of packages."""
    root, packages = tmp_path / "root", tmp_path / "packages"
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text(
        "Package: bash\nStatus: install ok installed\nArchitecture: arm64\nVersion: 5.2-1\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: arm64\nVersion: 1\n\n"
    )
    info = packages / "Some_Package-3.4.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Some_Package\nVersion: 3.4\n")
    return root, packages


def test_what_is_installed_is_listed(folders: tuple[Path, Path]) -> None:
    result = bill(*folders)
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["name"] == "an-image"
    assert document["metadata"]["component"]["type"] == "container"
    assert {item["purl"] for item in document["components"]} == {
        "pkg:pypi/some-package@3.4",
        "pkg:deb/debian/bash@5.2-1?arch=arm64",
    }
    assert bill(*folders).stdout == result.stdout, "the same packages give the same document"


def test_a_folder_without_packages_is_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = bill(folders[0], tmp_path / "other")
    assert result.returncode == 1
    assert "expected Python packages" in result.stderr
