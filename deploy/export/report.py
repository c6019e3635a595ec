"""What an export says at its end: the manifest, and the table on the terminal."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.bundle import (
    CONFIG_FILE,
    DENSE_FILE,
    MANIFEST_FILE,
    TASKS,
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
from deploy.export.errors import ExportError
from deploy.export.page import write_page
from deploy.export.progress import megabytes
from deploy.export.tokenizer import Tokens
from deploy.export.write_onnx import files_of
from deploy.folder.source import Source
from deploy.folder.token_vectors import read_token_vectors
from deploy.machine import machine
from deploy.onnx_session import kernels
from deploy.tasks import TaskError
from deploy.tasks.bounds import SHOWN

__all__ = ["Findings", "describe_model", "make_manifest", "print_table"]


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


def describe_model(folder: Path, source: Source, tokens: Tokens, config: Any) -> Manifest:
    """The manifest as far as it is known before any variant is made: enough to open engines with.

    Args:
        folder: Folder of the bundle.
        source: What the model's folder says.
        tokens: The model's tokenizer.
        config: The model's configuration in transformers.

    Raises:
        ExportError: The model's files do not fit its task.
    """
    where = source.folder / CONFIG_FILE
    try:
        fields = TASKS[source.task].read(source)
    except TaskError as error:
        raise ExportError(f"{where}: {error}") from error
    labels = fields.get("labels")
    if labels is not None and len(labels) != config.num_labels:
        raise ExportError(f"{where}: {len(labels)} labels, but {config.num_labels} logits")
    return Manifest(
        root=folder,
        model=ModelInfo(source.name, source.revision, source.architecture),
        created_with=_versions(),
        task=source.task,
        hidden_size=int(config.hidden_size),
        max_tokens=tokens.max_tokens,
        truncation_side=tokens.truncation_side,
        token_types=tokens.token_types,
        cleans_up=tokens.cleans_up,
        pooling=source.pooling,
        sparse=source.sparse,
        token_vectors=read_token_vectors(source, tokens.token_id, tokens.special),
        prompts=source.prompts,
        special_tokens=tokens.special,
        vocab_size=int(config.vocab_size),
        machine=machine(),
        files={},
        variants={},
        **{"labels": None, "problem_type": None, **fields},
    )


def make_manifest(draft: Manifest, findings: Mapping[str, Findings], verification: Mapping[str, Any]) -> Manifest:
    """Writes the manifest of a folder in which all other files are complete, and reads it back.

    Args:
        draft: What `describe_model` gave.
        findings: By variant.
        verification: How accuracy was measured.
    """
    folder = draft.root
    manifest = replace(
        draft,
        variants={name: _variant(name, folder, found) for name, found in findings.items()},
        verification=verification,
    )
    write_page(manifest)
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST_FILE)
    write_manifest(replace(manifest, files={path.name: file_entry(path) for path in paths}))
    return load_manifest(folder, verify=True)


def _variant(name: str, folder: Path, found: Findings) -> Variant:
    kind = VARIANTS[name]
    paths = files_of(folder, name)
    if kind.engine != "torch_ext" and (folder / DENSE_FILE).is_file():
        paths.append(folder / DENSE_FILE)
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

    isa = str(isa_report()["isa"])
    return f"torch-{importlib.metadata.version('torch')}, {isa}" if kind.engine == "torch" else isa


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
    accuracies = {name: known for name, variant in manifest.variants.items() if (known := variant.accuracy) is not None}
    metric = next(iter(accuracies.values())).metric
    measured = {item for accuracy in accuracies.values() for item in accuracy.details}
    shown = {item: title for item, title in SHOWN.items() if item in measured}
    rows = [("variant", "size", f"{metric} mean", "min", *shown.values(), "texts/s")]
    for name, accuracy in accuracies.items():
        variant = manifest.variants[name]
        speed = f"{variant.speed.texts_per_s:.0f}" if variant.speed else "-"
        figures = (f"{accuracy.details[item]:.6f}" if item in accuracy.details else "-" for item in shown)
        rows.append((name, megabytes(variant.bytes), f"{accuracy.mean:.6f}", f"{accuracy.min:.6f}", *figures, speed))
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
    if (own := texts.get("eval")) is not None:
        print(f"\n--eval: {own['metric']} on {own['examples']} examples ({own['file']})", end="")
        print(f"; transformers fp32 {own['reference']:.6f}", end="")
    print(f"\nmeasured on {manifest.machine}{speed}")
