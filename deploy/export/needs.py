"""What an export needs of the machine: libraries, memory, room on the disk, threads."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Collection, Iterator, Sequence

from deploy.bundle import VARIANTS
from deploy.export.errors import ExportError, first_line
from deploy.export.progress import megabytes
from deploy.extras import how_to_install
from deploy.folder.source import Source
from deploy.machine import available_memory_bytes

__all__ = ["check_disk", "import_libraries", "memory_note", "onnx_missing", "threads"]

_ONNX_PACKAGES = {"optimum": "optimum-onnx", "onnx": "onnx", "onnxruntime": "onnxruntime"}
"""Modules that ONNX variants are written with, and the packages that hold them."""
_ONNX_EXTRA = how_to_install("export-onnx")


def onnx_missing() -> str | None:
    """Why no ONNX variant can be written here; None if all packages are there. Imports none of them."""
    for module, package in _ONNX_PACKAGES.items():
        try:
            found = importlib.util.find_spec(module) is not None
            importlib.metadata.version(package)
        except (ImportError, ValueError):
            found = False
        if not found:
            return f"ONNX variants need {package}, which is not installed ({_ONNX_EXTRA})"
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("optimum-onnx") or ():
        wanted = Requirement(text)
        if wanted.name == "transformers" and wanted.marker is None:
            installed = importlib.metadata.version("transformers")
            if not wanted.specifier.contains(installed, prereleases=True):
                return (
                    f"ONNX variants need transformers{wanted.specifier}, and {installed} is installed ({_ONNX_EXTRA})"
                )
    return None


def _packages_missing(error: ImportError) -> ExportError:
    return ExportError(f"export needs more packages ({first_line(error)}): {how_to_install('export')}")


def import_libraries(names: Sequence[str]) -> None:
    """Imports the libraries that an export needs; a missing one is an error before any work is done."""
    try:
        import tokenizers
        import torch
        import transformers

        del tokenizers, torch, transformers
    except ImportError as error:
        raise _packages_missing(error) from error
    if any(VARIANTS[name].engine == "onnxruntime" for name in names):
        try:
            import onnx
            import onnxruntime
            import optimum.exporters.onnx
            import optimum.onnxruntime

            del onnx, onnxruntime, optimum
        except ImportError as error:
            raise ExportError(f"ONNX variants need more packages ({first_line(error)}): {_ONNX_EXTRA}") from error
    if any(VARIANTS[name].engine in ("torch_ext", "torch") for name in names):
        try:
            import torch_ext.ops  # The package alone imports without torch and its library.

            del torch_ext
        except ImportError as error:
            left = ",".join(name for name in VARIANTS if VARIANTS[name].engine == "onnxruntime")
            raise ExportError(f"{first_line(error, 600)}; or leave it out with --variants {left}") from error


def memory_note(source: Source) -> str | None:
    """The note for the user if less memory is free than an export needs at its peak; else None."""
    # Measured: 1.9 times the weights in fp32 for BERT-base, 2.7 for MiniLM, and pages of files; files may be in fp16.
    required = 5 * source.weights_bytes + (1 << 30)
    available = available_memory_bytes()
    if available is None or available >= required:
        return None
    return f"about {megabytes(required)} of memory are needed, {megabytes(available)} are free"


def check_disk(source: Source, parameters: int, variants: Collection[str], target: object, free_bytes: int) -> None:
    """Checks that what an export needs at its peak, estimated, fits on the disk.

    Args:
        source: What the model's folder says.
        parameters: Number of the model's parameters.
        variants: Names of the variants to write.
        target: Folder to write, for the message.
        free_bytes: Room on its disk.

    Raises:
        ExportError: It does not.
    """
    # torch_ext-int8 has tables in bf16, and maybe layers; what is no linear layer or table stays in fp32 in a program.
    per_parameter = {
        "torch_ext-bf16": 2.0,
        "torch_ext-int8": 2.0,
        "torch_ext-fp32": 4.0,
        "torch-export-bf16": 4.0,
        "onnx-fp32": 4.0,
        "onnx-int8": 1.3,
    }
    names = set(variants) | ({"onnx-fp32"} if "onnx-int8" in variants else set())
    # Tokenizers and graphs take some megabytes. The model itself is in a file while it is needed, in fp32.
    total = (4.0 + sum(per_parameter[name] for name in names)) * parameters
    tokenizer = sum(path.stat().st_size for path in source.folder.glob("*.json") if path.is_file())
    required = int(total * 1.03) + 2 * tokenizer + (4 << 20)
    if free_bytes < required:
        raise ExportError(
            f"-o {target}: about {megabytes(required)} are needed there, {megabytes(free_bytes)} are free; make room, "
            "choose another disk, or write fewer --variants"
        )


@contextlib.contextmanager
def threads(count: int) -> Iterator[int]:
    """Lets torch use `count` threads, and afterwards as many as before."""
    try:
        import torch
    except ImportError as error:
        raise _packages_missing(error) from error
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
