"""`python -m deploy verify`: whether a bundle is whole, and as accurate and as fast here as where it was exported.

The reference is a variant of the bundle in fp32, or the model's own folder, which torch_ext reads without transformers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.bundle import Accuracy, Manifest, Speed, check_config, load_manifest
from deploy.engines.engine import Engine
from deploy.options import positive, seconds
from deploy.tools.command import (
    ToolError,
    chosen_variants,
    make_parser,
    read_items,
    run,
    table,
    texts_of,
    usable_threads,
)

__all__ = ["main"]

_REFERENCES = ("torch_ext-fp32", "onnx-fp32")
_BATCH = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        0 if everything holds, 2 if a file differs or a variant misses a bound of its manifest.
    """
    parser = make_parser(
        "verify",
        "Compare every file of a bundle with its SHA-256, and measure accuracy and speed of its variants again, on\n"
        "this machine. The reference is the bundle's fp32 variant, or the model that --model names.",
    )
    parser.add_argument("--model", dest="original", metavar="FOLDER", type=Path, help="compare with this model in fp32")
    parser.add_argument("--variants", metavar="A,B", help="default: all of the bundle")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="texts to run on: one per line, or .jsonl")
    parser.add_argument("--max-texts", type=positive, default=256, metavar="N", help="default 256")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: what this process may use")
    parser.add_argument(
        "--speed-seconds", type=seconds, default=1.5, metavar="S", help="per variant; 0: not (default 1.5)"
    )
    return run(parser, _verify, argv)


def _verify(arguments: argparse.Namespace) -> int:
    manifest = load_manifest(arguments.model, verify=True)
    check_config(manifest)
    from deploy.engines.batch import batches
    from deploy.engines.open import open_engine
    from deploy.export.accuracy import Result, Verification
    from deploy.export.verify import measure
    from deploy.tasks import open_task

    threads = usable_threads(arguments.threads)
    names = chosen_variants(manifest, arguments.variants)
    texts, source = texts_of(arguments.texts, arguments.max_texts)
    items = read_items(manifest, texts)
    verification = Verification(batches(items, _BATCH), open_task(manifest))
    against, engine = _reference(manifest, arguments.original, threads)
    if engine is not None:
        verification.remember(engine)
    found: dict[str, tuple[Result | None, Speed | None]] = {}
    for name in names:
        variant = manifest.variants[name]
        engine = open_engine(manifest, variant, threads)
        result = None
        if against is not None and name != against:
            result = verification.check(engine, variant.accuracy.bound if variant.accuracy else {})
        else:
            verification.answers(engine)  # Memory is allocated, and code is warm, before it is timed.
        found[name] = result, measure(engine, verification.work, arguments.speed_seconds, threads)
    missed = [f"{name}: {result}" for name, (result, _) in found.items() if result is not None and result.missed]
    if arguments.json:
        report: dict[str, Any] = {
            "bundle": str(manifest.root),
            "files": len(manifest.files),
            "reference": against,
            "texts": len(items),
            "source": source,
            "missed": missed,
            "variants": {
                name: {
                    "accuracy": None if result is None else _figures(result.accuracy),
                    "texts_per_s": None if speed is None else speed.texts_per_s,
                }
                for name, (result, speed) in found.items()
            },
        }
        print(json.dumps(report, indent=2))
    else:
        _print(manifest, found, against, f"{len(items)} texts ({source})", threads)
    for line in missed:
        if not arguments.json:
            print(f"missed: {line}")
    return 2 if missed else 0


def _reference(manifest: Manifest, original: Path | None, threads: int) -> tuple[str | None, Engine | None]:
    """What variants are compared with, by name; None where there is nothing."""
    from deploy.engines.open import open_engine
    from deploy.tasks import open_task

    if original is not None:
        if not original.is_dir():
            raise ToolError(f"--model {original}: no such folder")
        from deploy.engines.torch_ext import TorchExtEngine
        from deploy.folder.sentence import read_sentence_files

        folder = read_sentence_files(original).folder
        return str(original), TorchExtEngine.load(folder, "fp32", threads, open_task(manifest))
    name = next((name for name in _REFERENCES if name in manifest.variants), None)
    return name, None if name is None else open_engine(manifest, manifest.variants[name], threads)


def _figures(accuracy: Accuracy) -> dict[str, Any]:
    return {"metric": accuracy.metric, "mean": accuracy.mean, "min": accuracy.min, **accuracy.details}


def _print(manifest: Manifest, found: Any, against: str | None, texts: str, threads: int) -> None:
    metric = next((known.metric for item in manifest.variants.values() if (known := item.accuracy)), "accuracy")
    rows = [["variant", f"{metric} mean", "at export", "min", "at export", "texts/s", "at export"]]
    for name, (result, speed) in found.items():
        variant = manifest.variants[name]
        pair = (None if result is None else result.accuracy, variant.accuracy)
        rows.append(
            [
                name,
                *("-" if accuracy is None else f"{accuracy.mean:.6f}" for accuracy in pair),
                *("-" if accuracy is None else f"{accuracy.min:.6f}" for accuracy in pair),
                *("-" if item is None else f"{item.texts_per_s:.0f}" for item in (speed, variant.speed)),
            ]
        )
    print(f"{manifest.root}: {len(manifest.files)} files as the manifest has them")
    print(table(rows))
    if against is None:
        print("no variant in fp32 to compare with: pass --model FOLDER, the model that was exported")
    else:
        print(f"against {against} on {texts}, {threads} threads")
    print(f"exported on {manifest.machine or 'an unknown machine'}")
