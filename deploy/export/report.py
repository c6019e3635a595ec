"""What an export says at its end: the manifest, and the table on the terminal."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle import (
    MANIFEST_FILE,
    VARIANTS,
    Manifest,
    ModelInfo,
    Speed,
    Variant,
    VariantKind,
    file_entry,
    load_manifest,
    write_manifest,
)
from deploy.export.accuracy import Result
from deploy.export.progress import megabytes
from deploy.export.source import Source
from deploy.export.tokenizer import Tokens
from deploy.export.write_onnx import files_of
from deploy.machine import machine
from deploy.onnx_session import kernels

__all__ = ["Findings", "make_manifest", "print_table"]


@dataclass(frozen=True)
class Findings:
    """What was measured of a variant.

    Attributes:
        result: Its accuracy.
        speed: Its speed, or None.
        quantization: How its layers were chosen, or nothing.
    """

    result: Result
    speed: Speed | None
    quantization: Mapping[str, Any]


def make_manifest(
    folder: Path,
    source: Source,
    tokens: Tokens,
    hidden_size: int,
    findings: Mapping[str, Findings],
    verification: Mapping[str, Any],
) -> Manifest:
    """Writes the manifest of a folder in which all other files are complete, and reads it back."""
    classifies = source.task == "text-classification"
    manifest = Manifest(
        root=folder,
        model=ModelInfo(source.name, source.revision, source.architecture),
        created_with=_versions(),
        task=source.task,
        hidden_size=hidden_size,
        max_tokens=tokens.max_tokens,
        truncation_side=tokens.truncation_side,
        pooling=source.pooling,
        prompts=source.prompts,
        labels=source.labels() if classifies else None,
        problem_type=source.problem_type() if classifies else None,
        activation=source.activation() if classifies else None,
        special_tokens=tokens.special,
        files={path.name: file_entry(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST_FILE},
        variants={name: _variant(name, folder, found) for name, found in findings.items()},
        verification=verification,
        machine=machine(),
    )
    write_manifest(manifest)
    return load_manifest(folder, verify=True)


def _variant(name: str, folder: Path, found: Findings) -> Variant:
    kind = VARIANTS[name]
    paths = files_of(folder, name)
    return Variant(
        name=name,
        file=kind.file,
        engine=kind.engine,
        dtype=kind.dtype,
        bytes=sum(path.stat().st_size for path in paths),
        accuracy=found.result.accuracy,
        speed=found.speed,
        extra_files=tuple(path.name for path in paths[1:]),
        quantization=found.quantization,
        kernels=_kernels(kind),
    )


def _kernels(kind: VariantKind) -> str:
    """What computed the figures of a variant on this machine."""
    if kind.engine == "onnxruntime":
        return kernels(kind.dtype)
    from torch_ext import isa_report

    return str(isa_report()["isa"])


def _versions() -> dict[str, str]:
    """Versions of what made the bundle."""
    result = {}
    names = {"torch": "torch", "transformers": "transformers", "optimum": "optimum-onnx", "onnxruntime": "onnxruntime"}
    for name, distribution in {**names, "onnx": "onnx", "tokenizers": "tokenizers"}.items():
        try:
            result[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "unknown"
    try:
        import torch_ext

        result["torch_ext"] = torch_ext.__version__
    except ImportError:
        result["torch_ext"] = "not installed"
    return result


def print_table(manifest: Manifest) -> None:
    """Prints accuracy, size and speed of every variant."""
    metric = next(iter(manifest.variants.values())).accuracy.metric
    rows = [("variant", "size", f"{metric} mean", "min", "texts/s")]
    for name, variant in manifest.variants.items():
        speed = f"{variant.speed.texts_per_s:.0f}" if variant.speed else "-"
        accuracy = variant.accuracy
        rows.append((name, megabytes(variant.bytes), f"{accuracy.mean:.6f}", f"{accuracy.min:.6f}", speed))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells))
    threads = next((variant.speed.threads for variant in manifest.variants.values() if variant.speed is not None), None)
    texts = manifest.verification
    print(f"against transformers fp32 on {texts['texts']} texts: {texts['source']}, ", end="")
    print(f"{texts['mean_tokens']} tokens on average", end="")
    if threads is not None:
        baseline = texts["reference_texts_per_s"]
        print(f"; it runs {baseline:.0f} texts/s", end="") if baseline else None
    speed = "" if threads is None else f"; texts/s: a quick measurement, {threads} threads"
    print(f"\nmeasured on {manifest.machine}{speed}")
