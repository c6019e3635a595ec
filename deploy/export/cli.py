"""The command line of `python -m deploy export`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.bundle import DEFAULT_VARIANTS, POOLING_MODES, TASKS, VARIANTS, BundleError
from deploy.export.errors import ExportError, Interrupted, first_line, is_disk_full
from deploy.extras import missing, python_command
from deploy.folder.errors import FolderError
from deploy.options import model_name, positive
from deploy.tasks.bounds import BOUND_NAMES
from deploy.texts import TextsError

if TYPE_CHECKING:
    from deploy.bundle import Manifest
    from deploy.folder.source import Source

__all__ = ["main"]

_DESCRIPTION = """\
Prepare a model for serving: one folder (bundle) with bf16 and int8 encoders for torch_ext, int8 and fp32 ONNX models,
the tokenizer and a manifest. Every variant is compared with transformers in fp32 on real text, and one that misses its
accuracy bound is refused. The folder appears complete or not at all.
"""

_EPILOG = """\
default bounds, feature-extraction (cosine per text): fp32 mean and min 0.99999; bf16 mean 0.9999, min 0.9995;
onnx-int8 mean 0.985; torch_ext-int8 mean 0.996, min 0.99. Classification and fill-mask: share of texts with
the same best label or token (mean), probabilities (max_prob_diff), relative error of the logits (logit_error); with one
label also the rank correlation of the texts (rank_correlation; no default). Token classification: share of tokens with
the same label (mean of the texts), F1 of entities (entity_f1; no default), probabilities and logits as above. Question
answering: share of texts with the same answer, probabilities and logits. Linear
layers that would make torch_ext-int8 miss its bounds, or --accuracy, are found by measurement and stay in bf16; those
of onnx-int8 in fp32.

examples:
  python -m deploy export sentence-transformers/all-MiniLM-L6-v2 -o bundle
  python -m deploy export ./my-classifier -o bundle --texts samples.txt --variants torch_ext-bf16,onnx-fp32
  python -m deploy export ./my-model -o bundle --force --bound onnx-int8.mean=0.98
  python -m deploy export ./my-model -o bundle --texts samples.txt --accuracy 0.998

exit codes: 0 done, 1 a bug, 2 something you can put right (the message says what), 128 + n stopped by signal n.
"""


_PACKAGES = ("numpy", "safetensors", "tokenizers")
"""Those of the extra that are imported before `needs.import_libraries` looks for the rest."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy export",
        usage="%(prog)s MODEL -o DIR [OPTION ...]    (--help lists the options)",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", type=model_name, help="model folder, or id on the Hugging Face hub")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, type=_folder, help="folder to write")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace DIR if it is a bundle with nothing else in it (the old one stays on failure)",
    )
    parser.add_argument("--task", choices=TASKS, help="default: from the model's files")
    parser.add_argument(
        "--pooling", choices=POOLING_MODES, help="default: from the model's sentence-transformers files"
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="L2-normalize embeddings; default: as above",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest input; default: from the model's files")
    parser.add_argument("--name", help="name that the server reports; default: the hub id or the folder's name")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--variants",
        type=_variants,
        default=list(DEFAULT_VARIANTS),
        metavar="A,B",
        help=f"variants to write, of {','.join(VARIANTS)}; default: all that the model allows, torch-export-bf16 where "
        "it allows none of torch_ext's",
    )
    parser.add_argument("--texts", type=Path, metavar="FILE", help="texts to verify on: one per line, or .jsonl")
    parser.add_argument(
        "--eval",
        type=Path,
        dest="eval_file",
        metavar="FILE",
        help="measure each variant on examples of yours, too: .jsonl with text and label, query and positives, or "
        "tokens and tags",
    )
    parser.add_argument("--max-texts", type=positive, metavar="N", help="default: 256 built-in ones, or 2000 of FILE")
    parser.add_argument(
        "--bound",
        type=_bound,
        action="append",
        default=[],
        metavar="VARIANT.NAME=VALUE",
        help="change an accuracy bound",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="default: what this process may use")
    parser.add_argument(
        "--accuracy",
        type=_share,
        metavar="COSINE",
        help="mean cosine to fp32 that torch_ext-int8 has to reach, besides its bounds: of embeddings, or of each "
        "text's mean hidden state",
    )
    parser.add_argument(
        "--speed-seconds",
        type=float,
        default=1.5,
        metavar="S",
        help="measure each variant that long; 0: not (default 1.5)",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    return parser


def _folder(text: str) -> Path:
    if not text:  # Path would make the current directory of it.
        raise argparse.ArgumentTypeError("expected a folder, got an empty string")
    return Path(text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text}")
    return value


def _variants(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(VARIANTS)}, got {text!r}")
    return [name for name in VARIANTS if name in names]


def _bound(text: str) -> tuple[str, str, float]:
    where, _, number = text.partition("=")
    variant, _, name = where.rpartition(".")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if variant not in VARIANTS or name not in BOUND_NAMES or value != value:
        raise argparse.ArgumentTypeError(
            f"expected onnx-int8.mean=0.98, NAME one of {', '.join(BOUND_NAMES)}; got {text!r}"
        )
    return variant, name, value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the export.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit code; see the help.
    """
    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    from deploy.export.signals import interruptible

    try:
        with interruptible():
            manifest, elapsed_s = _run(options)
    except (FolderError, BundleError, TextsError) as error:
        return _fail(options, str(error), 2)
    except Interrupted as stop:
        name = signal.Signals(stop.signal).name
        return _fail(options, f"stopped by {name}; nothing was written to {options.output}", 128 + stop.signal)
    except MemoryError:
        return _fail(
            options,
            "out of memory; use a machine with 5 times the size of the weights",
            2,
        )
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
            return _fail(options, missing(error, "export"), 2)
        if is_disk_full(error):
            return _fail(
                options, f"-o {options.output}: the disk is full ({first_line(error)}); nothing was left there", 2
            )
        if isinstance(error, OSError):
            return _fail(options, f"-o {options.output}: {error}; nothing was left there", 2)
        kind = type(error).__name__
        return _fail(options, f"unexpected {kind}: {first_line(error)}; run again with --debug for the traceback", 1)
    if not options.quiet:  # The bundle is there by now, whether or not somebody reads this.
        _tell(options, manifest, elapsed_s)
    return 0


def _fail(options: argparse.Namespace, message: str, code: int) -> int:
    if options.debug:
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _tell(options: argparse.Namespace, manifest: Manifest, elapsed_s: float) -> None:
    from deploy.export.progress import megabytes
    from deploy.export.report import print_table

    print_table(manifest)
    size = megabytes(sum(entry.bytes for entry in manifest.files.values()))
    print(f"\n{options.output}: {size}, {len(manifest.variants)} variants, {elapsed_s:.0f} s. Serve it with:")
    print(f"  {shlex.quote(python_command())} -m deploy serve {shlex.quote(str(options.output))}")


def _run(options: argparse.Namespace) -> tuple[Manifest, float]:
    """Exports; returns what was written, and the seconds that it took."""
    # First the checks that need no model.
    _check_accuracy(options, options.variants)
    from deploy.export.staging import check_target
    from deploy.folder.hub import find_model
    from deploy.folder.source import read_source

    protected = [Path(options.model)] if os.path.isdir(options.model) else []
    target = check_target(options.output, options.force, protected)
    if options.texts is not None and not options.texts.is_file():
        raise TextsError(f"--texts {options.texts}: no such file")
    if options.eval_file is not None and not options.eval_file.is_file():
        raise ExportError(f"--eval {options.eval_file}: no such file")
    folder, name, revision = find_model(options.model, options.revision)
    source = read_source(
        folder, options.name or name, revision, options.task, options.pooling, options.normalize, options.max_tokens
    )
    bounds = _bounds(source, options)
    variants = _allowed(source.model_type, source.supported_by_torch_ext, options)
    _check_accuracy(options, variants)

    from deploy.export.options import Options
    from deploy.export.pipeline import export, step_count
    from deploy.export.progress import Progress

    progress = Progress(step_count(variants), silent=options.quiet)
    pooling = ""
    if source.pooling is not None:
        normalized = "normalized" if source.pooling.normalize else "not normalized"
        pooling = f", {source.pooling.mode} pooling, {normalized} ({source.pooling.source})"
    progress.say(f"export {source.name}: {source.architecture}, {source.task} ({source.task_source}){pooling}")
    manifest = export(
        source,
        target,
        Options(
            variants,
            bounds,
            options.texts,
            options.max_texts,
            options.threads,
            max(0.0, options.speed_seconds),
            options.force,
            options.accuracy,
            options.eval_file,
        ),
        progress,
    )
    return manifest, progress.elapsed_s


def _check_accuracy(options: argparse.Namespace, variants: Sequence[str]) -> None:
    if options.accuracy is not None and "torch_ext-int8" not in variants:
        raise ExportError(f"--accuracy is for torch_ext-int8, and the variants are {','.join(variants)}")


def _bounds(source: Source, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The bounds of `--bound`, by variant; only those whose figures are measured of the model."""
    bounds: dict[str, dict[str, float]] = {}
    for variant, name, value in options.bound:
        names = (*TASKS[source.task].bound_names(source), *(("eval",) if options.eval_file else ()))
        if name not in names:
            raise ExportError(
                f"--bound {variant}.{name}: expected a figure that is measured of {source.name} ({source.task}), one "
                f"of {', '.join(names)}"
            )
        bounds.setdefault(variant, {})[name] = value
    return bounds


def _allowed(model_type: str, torch_ext: bool, options: argparse.Namespace) -> list[str]:
    """The variants that this kind of model has, and this machine writes; asking for another one by name is an error."""
    from deploy.export.needs import onnx_missing

    names: list[str] = options.variants
    default = names == list(DEFAULT_VARIANTS)
    if not torch_ext:
        left = _without("torch_ext", names)
        # All of torch_ext's, as `deploy run` asks for them, is no choice of one.
        all_ours = set(DEFAULT_VARIANTS) - set(_without("torch_ext", DEFAULT_VARIANTS)) <= set(names)
        if all_ours:
            left = [name for name in VARIANTS if name in left or VARIANTS[name].engine == "torch"]
        if left != names and not all_ours:
            raise ExportError(
                f"torch_ext does not run {model_type} models yet; pass --variants "
                + ",".join(_without("torch_ext", VARIANTS))
            )
        if left != names:
            print(f"note: torch_ext does not run {model_type} models; writing {', '.join(left)}", file=sys.stderr)
        names = left
    left = _without("onnxruntime", names)
    if left != names and (reason := onnx_missing()) is not None:
        if not (default and left):
            hint = f", or pass --variants {','.join(_without('onnxruntime', DEFAULT_VARIANTS))}" if torch_ext else ""
            raise ExportError(f"{reason}{hint}")
        print(f"note: {reason}; writing {', '.join(left)}", file=sys.stderr)
        names = left
    return names


def _without(engine: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if VARIANTS[name].engine != engine]
