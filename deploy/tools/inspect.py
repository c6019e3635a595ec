"""`python -m deploy inspect`: what a bundle or a model's folder is: task, limits, variants, files. Loads no weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

from deploy.bundle import Manifest
from deploy.tasks.bounds import SHOWN
from deploy.tools.command import ToolError, make_parser, run, table

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        0, or 2 if it is neither a bundle nor a model.
    """
    parser = make_parser(
        "inspect",
        "Say what a bundle holds, or what would be served of a model's folder: task, limits, prompts, variants with\n"
        "their sizes, accuracy and speed, and files. No weights are loaded; `verify` compares hashes.",
        "folder of a bundle, or a model's folder",
    )
    return run(parser, _inspect, argv)


def _inspect(arguments: argparse.Namespace) -> int:
    manifest, exported = describe(arguments.model)
    if arguments.json:
        print(json.dumps(manifest.to_json(), indent=2, ensure_ascii=False))
        return 0
    print("\n".join(f"{name:<14}{value}" for name, value in _facts(manifest, exported)))
    print()
    print(table(_variants(manifest)))
    for name, variant in manifest.variants.items():
        kept = variant.quantization.get("kept_bf16")
        if kept:
            print(f"{name}: in bf16 {', '.join(map(str, kept))}")
    for name, reason in (manifest.verification.get("left_out") or {}).items():
        print(f"left out: {name}: {reason}")
    if exported:
        print()
        print(
            table(
                [("file", "bytes", "SHA-256")]
                + [(name, str(entry.bytes), entry.sha256[:16]) for name, entry in sorted(manifest.files.items())]
            )
        )
    return 0


def describe(model: str) -> tuple[Manifest, bool]:
    """The manifest of a bundle or a model's folder, and whether it is a bundle."""
    from deploy.server.process import UsageError
    from deploy.server.wanted import describe as describe_served

    try:
        return describe_served(model, None)
    except UsageError as error:
        raise ToolError(str(error)) from error


def _facts(manifest: Manifest, exported: bool) -> Iterator[tuple[str, str]]:
    model = manifest.model
    yield "model", f"{model.name} ({model.architecture}{f', {model.revision}' if model.revision else ''})"
    yield "kind", "bundle" if exported else "a model's folder, not exported"
    yield "task", manifest.task
    if manifest.pooling is not None:
        normalized = "normalized" if manifest.pooling.normalize else "not normalized"
        yield "embeddings", f"{manifest.width} dimensions, {manifest.pooling.mode} pooling, {normalized}"
    if manifest.labels is not None:
        names = ", ".join(manifest.labels[:6]) + (f", ... ({len(manifest.labels)})" if len(manifest.labels) > 6 else "")
        yield "labels", f"{names}; scores by {manifest.activation or manifest.problem_type}"
    if manifest.prompts is not None:
        for name, text in manifest.prompts.texts.items():
            yield "prompt", f"{name}: {text!r}{' (default)' if name == manifest.prompts.default else ''}"
    yield "longest input", f"{manifest.max_tokens} tokens, cut on the {manifest.truncation_side}"
    if manifest.verification.get("texts"):
        yield "verified on", f"{manifest.verification['texts']} texts ({manifest.verification.get('source')})"
    if manifest.machine is not None:
        yield "measured on", str(manifest.machine)
    if manifest.created_with:
        known = {name: version for name, version in manifest.created_with.items() if version != "unknown"}
        yield "made with", ", ".join(f"{name} {version}" for name, version in known.items())


def _variants(manifest: Manifest) -> list[list[str]]:
    from deploy.export.progress import megabytes

    measured = {item for variant in manifest.variants.values() if variant.accuracy for item in variant.accuracy.details}
    shown = {item: title for item, title in SHOWN.items() if item in measured}
    metric = next((known.metric for item in manifest.variants.values() if (known := item.accuracy)), "accuracy")
    rows = [["variant", "engine", "size", f"{metric} mean", "min", *shown.values(), "texts/s"]]
    for name, variant in manifest.variants.items():
        accuracy = variant.accuracy
        figures = [None if accuracy is None else accuracy.details.get(item) for item in shown]
        values = [accuracy and accuracy.mean, accuracy and accuracy.min, *figures]
        rows.append(
            [
                name,
                variant.engine,
                megabytes(variant.bytes) if variant.bytes else "-",
                *("-" if value is None else f"{value:.6f}" for value in values),
                "-" if variant.speed is None else f"{variant.speed.texts_per_s:.0f}",
            ]
        )
    return rows
