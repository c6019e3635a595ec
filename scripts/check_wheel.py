"""Checks that wheels run on every system of manylinux_2_28, and names them so: python scripts/check_wheel.py WHEEL...

Every library of a wheel may ask for glibc 2.28 and GLIBCXX 3.4.25 at most: those of AlmaLinux 8, older than those of
Debian 11, Ubuntu 20.04 and Amazon Linux 2023. ``linux_x86_64`` in the name becomes ``manylinux_2_28_x86_64``. Exit
code 1 if a library asks for more. Needs binutils' readelf, of any architecture, and the package wheel.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

FLOORS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
PLATFORM = "manylinux_2_28"


def find_readelf() -> str:
    """Binutils' program; it reads files of every architecture.

    Raises:
        SystemExit: There is none.
    """
    names = ("readelf", "aarch64-linux-gnu-readelf", "x86_64-linux-gnu-readelf")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise SystemExit("check_wheel: no readelf: install binutils (Debian, Ubuntu: apt-get install binutils)")
    return found


def too_new(version_info: str) -> list[str]:
    """Versions of symbols that manylinux_2_28 lacks.

    Args:
        version_info: What ``readelf --version-info`` prints of a library.
    """
    needed = set(re.findall(r"Name: ([A-Z]+)_([0-9.]+)\s", version_info))
    return sorted(
        f"{name}_{version}"
        for name, version in needed
        if name in FLOORS and tuple(map(int, version.split("."))) > FLOORS[name]
    )


def check(wheel: Path) -> list[str]:
    """What is wrong with a wheel, a line for each library."""
    readelf, found = find_readelf(), []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        libraries = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
        if not libraries:
            found.append(f"{wheel.name}: expected libraries, found none")
        for name in libraries:
            path = archive.extract(name, folder)
            said = subprocess.run(
                [readelf, "--wide", "--version-info", path],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "LC_ALL": "C"},
            ).stdout
            if "Version needs section" not in said:
                found.append(f"{wheel.name}: {name}: readelf finds no versions of symbols")
            if newer := too_new(said):
                found.append(f"{wheel.name}: {name} needs {', '.join(newer)}, which {PLATFORM} lacks")
    return found


def name_platform(wheel: Path) -> Path:
    """Renames a wheel, and its tag inside; returns its new path."""
    match = re.fullmatch(r"linux_(\w+)", wheel.stem.rsplit("-", 1)[1])
    if match is None:
        return wheel
    tag = f"{PLATFORM}_{match[1]}"
    command = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, str(wheel)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return wheel.with_name(name)


def main(argv: Sequence[str]) -> int:
    """Checks all wheels, names those that are right, and prints their paths; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python scripts/check_wheel.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    code = 0
    for wheel in parser.parse_args(argv).wheels:
        if not zipfile.is_zipfile(wheel):
            found_there = "another file" if wheel.exists() else "nothing"
            print(f"check_wheel: {wheel}: expected a wheel, found {found_there}", file=sys.stderr)
            code = 2
            continue
        if found := check(wheel):
            print("\n".join(f"check_wheel: {line}" for line in found), file=sys.stderr)
            code = 1
        else:
            print(name_platform(wheel))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
