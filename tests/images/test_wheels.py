"""The wheels of both architectures, as files: name, content, and what their libraries ask of the system.

``TORCH_EXT_WHEELS`` names the folder they lie in; ``.ci/run wheels`` builds them.
"""

from __future__ import annotations

import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

# The kernel's name of the architecture, as in the wheel's, and readelf's.
MACHINES = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}

# manylinux_2_17's glibc and manylinux_2_28's libstdc++: older than every system that torch runs on.
FLOORS = {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@pytest.fixture(params=MACHINES, name="machine")
def fixture_machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def wheel(machine: str) -> Path:
    folder = os.environ.get("TORCH_EXT_WHEELS")
    if not folder:
        pytest.skip("TORCH_EXT_WHEELS is not set: .ci/run wheels builds them and sets it")
    found = sorted(Path(folder).glob(f"torch_ext-*{machine}.whl"))
    assert len(found) == 1, f"expected one wheel for {machine} in {folder}, found {found}"
    return found[0]


# The libraries of the package, and what each needs besides the system's.
LIBRARIES = {
    "torch_ext/_C.abi3.so": {"libtorch_cpu.so"},
    "torch_ext/_runtime.abi3.so": {"libtorch_ext_runtime.so"},
    "torch_ext/libtorch_ext_runtime.so": set(),
}


@pytest.fixture(params=LIBRARIES, name="name")
def fixture_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def library(wheel: Path, name: str, tmp_path: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(name, tmp_path))


def readelf(option: str, path: Path) -> str:
    return subprocess.run(
        ["readelf", "--wide", option, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    ).stdout


def test_one_wheel_serves_every_python(wheel: Path, machine: str) -> None:
    assert re.fullmatch(rf"torch_ext-[0-9.]+-cp310-abi3-(linux|manylinux_2_\d+)_{machine}\.whl", wheel.name)


def test_nothing_but_the_package_is_installed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"torch_ext"}
    assert {name for name in names if name.endswith(".so")} == set(LIBRARIES)
    assert {"torch_ext/py.typed", "torch_ext/_runtime.pyi"} <= set(names)
    assert [name for name in names if name.endswith(".h")] == ["torch_ext/include/torch_ext_runtime.h"]
    assert not [name for name in names if name.endswith((".cpp", ".inl", ".map", ".pyc"))]


def test_nothing_is_installed_with_it_unasked(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist:")]
    assert any(re.match(r"Requires-Dist: torch\b.*extra == .torch.", line) for line in needed)
    assert [line for line in needed if "extra ==" not in line] == []


def test_the_library_is_for_the_wheels_architecture(library: Path, machine: str) -> None:
    found = re.search(r"Machine:\s+(.*)", readelf("--file-header", library))
    assert found is not None
    assert found[1].strip() == MACHINES[machine]


def test_the_library_needs_what_it_should(library: Path, name: str) -> None:
    dynamic = readelf("--dynamic", library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert LIBRARIES[name] <= needed
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
    assert needed <= {*LIBRARIES[name], *system, "ld-linux-aarch64.so.1", "ld-linux-x86-64.so.2"}
    # The module finds its library beside itself, wherever that is.
    runpath = re.findall(r"\(RUNPATH\).*\[(.*)\]", dynamic)
    assert runpath == (["$ORIGIN"] if "libtorch_ext_runtime.so" in needed else [])


def test_the_runtime_shows_its_c_interface_alone(library: Path, name: str) -> None:
    symbols = re.findall(r"GLOBAL\s+DEFAULT\s+\d+ (\S+)$", readelf("--dyn-syms", library), re.MULTILINE)
    shown = {"torch_ext/_runtime.abi3.so": "PyInit__runtime", "torch_ext/libtorch_ext_runtime.so": "txr_.*"}
    assert symbols or name == "torch_ext/_C.abi3.so"
    assert [symbol for symbol in symbols if not re.fullmatch(shown.get(name, ""), symbol)] == []


def test_the_library_runs_on_old_systems(library: Path) -> None:
    versions = re.findall(r"Name: ([A-Z]+)_([0-9.]+)\s", readelf("--version-info", library))
    assert versions
    for name, version in versions:
        assert tuple(map(int, version.split("."))) <= FLOORS[name], f"{name}_{version}"
