"""The bill of materials of an image, as CycloneDX JSON: python sbom.py NAME VERSION ROOT FOLDER...

Lists the Python packages that are installed in FOLDERs, and Debian's packages of the base image, whose root is ROOT.
Needs the package cyclonedx-python-lib. The result is the same for the same packages: no serial number, no time.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL


def python_packages(folders: Sequence[str]) -> Iterator[PackageURL]:
    """Packages with metadata in folders."""
    for found in importlib.metadata.distributions(path=list(folders)):
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        yield PackageURL("pypi", None, name, found.version)


def debian_packages(root: Path) -> Iterator[PackageURL]:
    """Packages that dpkg has installed below a root; of images without dpkg, the files in status.d."""
    database = root / "var/lib/dpkg"
    files = [database / "status", *sorted((database / "status.d").glob("*"))]
    for path in files:
        if not path.is_file() or path.suffix == ".md5sums":
            continue
        for paragraph in path.read_text(errors="replace").split("\n\n"):
            fields = dict(re.findall(r"^(Package|Version|Architecture|Status): (.*)$", paragraph, re.MULTILINE))
            if {"Package", "Version"} <= fields.keys() and fields.get("Status", "installed").endswith("installed"):
                qualifiers = {"arch": fields["Architecture"]} if "Architecture" in fields else {}
                yield PackageURL("deb", "debian", fields["Package"], fields["Version"], qualifiers)


def bill(name: str, version: str, packages: Iterator[PackageURL] | Sequence[PackageURL]) -> dict[str, Any]:
    """The document.

    Args:
        name: Of the image.
        version: Of the image.
        packages: What is in it; each is listed once.
    """
    bom = Bom()
    bom.metadata.component = Component(name=name, version=version, type=ComponentType.CONTAINER, bom_ref=name)
    for url in {str(url): url for url in packages}.values():
        bom.components.add(
            Component(name=url.name, version=url.version, type=ComponentType.LIBRARY, purl=url, bom_ref=str(url))
        )
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["serialNumber"], document["metadata"]["timestamp"]
    return document


def main(argv: Sequence[str]) -> int:
    """Prints the document."""
    if len(argv) < 4:
        print("usage: python sbom.py NAME VERSION ROOT FOLDER...", file=sys.stderr)
        return 2
    name, version, root, *folders = argv
    packages = [*python_packages(folders), *debian_packages(Path(root))]
    if not any(url.type == "pypi" for url in packages):
        print(f"sbom: expected Python packages in {', '.join(folders)}, found none", file=sys.stderr)
        return 1
    print(json.dumps(bill(name, version, packages), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
