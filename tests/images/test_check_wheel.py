"""scripts/check_wheel.py: what wheels of manylinux_2_28 may ask of a system, and their names."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_wheel.py"

INFO = """
Version needs section '.gnu.version_r' contains 2 entries:
 Addr: 0x0000000000000a10  Offset: 0x000a10  Link: 4 (.dynstr)
  000000: Version: 1  File: libc.so.6  Cnt: 1
  0x0010:   Name: GLIBC_{glibc}  Flags: none  Version: 4
  0x0020: Version: 1  File: libstdc++.so.6  Cnt: 1
  0x0030:   Name: GLIBCXX_{glibcxx}  Flags: none  Version: 5
"""


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("check_wheel", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("glibc", "glibcxx", "expected"),
    [
        ("2.28", "3.4.25", []),
        ("2.2.5", "3.4", []),
        ("2.29", "3.4.9", ["GLIBC_2.29"]),
        ("2.100", "3.4.29", ["GLIBCXX_3.4.29", "GLIBC_2.100"]),
    ],
)
def test_versions(script: Any, glibc: str, glibcxx: str, expected: list[str]) -> None:
    assert script.too_new(INFO.format(glibc=glibc, glibcxx=glibcxx)) == expected


def wheel(folder: Path, *libraries: Path) -> Path:
    path = folder / "some_package-1.0-cp310-abi3-linux_x86_64.whl"
    info = "some_package-1.0.dist-info"
    files = {f"some_package/{library.name}": library.read_bytes() for library in libraries}
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-abi3-linux_x86_64\n"
    files[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: some_package\nVersion: 1.0\n"
    digests = {name: urlsafe_b64encode(sha256(data).digest()).decode().rstrip("=") for name, data in files.items()}
    record = [f"{name},sha256={digests[name]},{len(data)}\n" for name, data in files.items()]
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_wheel_is_named_for_what_it_runs_on(tmp_path: Path) -> None:
    source, library = tmp_path / "a.c", tmp_path / "a.so"
    source.write_text('#include <stdio.h>\nvoid f(void) { puts("x"); }\n')
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    path = wheel(tmp_path, library)
    result = run(str(path))
    assert result.returncode == 0, result.stderr
    named = path.with_name("some_package-1.0-cp310-abi3-manylinux_2_28_x86_64.whl")
    assert Path(result.stdout.strip()) == named
    assert not path.exists()
    with zipfile.ZipFile(named) as archive:
        assert "Tag: cp310-abi3-manylinux_2_28_x86_64" in archive.read("some_package-1.0.dist-info/WHEEL").decode()
    assert run(str(named)).stdout.strip() == str(named), "a second time changes nothing"


def test_a_wheel_without_libraries_is_refused(tmp_path: Path) -> None:
    result = run(str(wheel(tmp_path)))
    assert result.returncode == 1
    assert "expected libraries, found none" in result.stderr
