"""Options and environment of text-embeddings-inference (TEI), as other names of ours.

A compose file or a chart that was written for it works with the name of the image changed. What has a counterpart here
is set; what has none is accepted, with one line that says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bundle import BundleError, Manifest, Prompts
from ..extras import how_to_install
from ..options import origin, positive
from .limits.bounds import Settings

__all__ = ["POOLINGS", "add_tei_options", "fit_manifest", "settle_tei_options"]


def _flag(text: str) -> bool:
    known = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}
    return known[text.lower()]


@dataclass(frozen=True)
class _Option:
    """An option of TEI.

    Attributes:
        ours: Where our options have it; None: nowhere.
        told: What the help says; None: the option of ours that it stands for, or that it has no effect.
        kind: Makes a value of its text.
        expected: What errors say of it.
        environment: Whether the variable of its name is read, too.
        added: Whether it is no option of ours by the same name.
        flag: Whether it may stand without a value.
    """

    ours: str | None = None
    kind: Callable[[str], Any] = str
    expected: str = "a text"
    environment: bool = True
    added: bool = True
    flag: bool = False
    told: str | None = None


_NUMBER: dict[str, Any] = {"kind": positive, "expected": "a number from 1"}
_BOOLEAN: dict[str, Any] = {"kind": _flag, "expected": "true or false", "flag": True}
_OPTIONS: Mapping[str, _Option] = {
    "--model-id": _Option("model", told="MODEL"),
    "--served-model-name": _Option("served_model_name", told="name that answers and clients use for MODEL"),
    "--hostname": _Option("host", environment=False),  # Containers set the variable to their name.
    "--max-batch-tokens": _Option("max_batch_tokens", **_NUMBER, added=False),
    "--max-batch-requests": _Option("max_batch_requests", **_NUMBER, told="texts in a batch (default: any)"),
    "--max-concurrent-requests": _Option(
        "max_concurrent_requests", **_NUMBER, told="requests that may wait or run; more are answered with 429"
    ),
    "--max-client-batch-size": _Option("max_inputs", **_NUMBER),
    "--payload-limit": _Option("max_body_bytes", **_NUMBER),
    "--tokenization-workers": _Option("tokenization_workers", **_NUMBER, told="threads that tokenize"),
    "--auto-truncate": _Option(
        "auto_truncate", **_BOOLEAN, told="false: refuse texts above the model's limit, in place of cutting them"
    ),
    "--default-prompt": _Option("default_prompt", told="text before every text"),
    "--default-prompt-name": _Option("default_prompt_name", told="the same, by the name of a prompt of the model"),
    "--pooling": _Option("pooling", told="has to be that of the model"),
    "--dtype": _Option("dtype", told="float32 or bfloat16: the variant of that type; others as without --variant"),
    "--api-key": _Option("api_key", added=False),
    "--cors-allow-origin": _Option(
        "cors_allow_origin",
        lambda text: [origin(part.strip()) for part in text.split(",")],
        "* or origins such as https://app.example.com",
        added=False,
    ),
    "--json-output": _Option("json_output", **_BOOLEAN, told="write the log as JSON"),
    "--revision": _Option(),
    "--dense-path": _Option(),
    "--uds-path": _Option(environment=False),
    "--hf-token": _Option(environment=False),
    "--hf-api-token": _Option(environment=False),
    "--huggingface-hub-cache": _Option(environment=False),
    "--disable-spans": _Option(**_BOOLEAN),
    "--otlp-endpoint": _Option(
        "otlp_endpoint", told="collector of OpenTelemetry that gets spans; needs the extra otel"
    ),
    "--otlp-service-name": _Option(
        "otlp_service_name", told=f"name of the server in spans (default: {Settings.otlp_service_name})"
    ),
    "--prometheus-port": _Option(),
}

_DEFAULTS: Mapping[str, Any] = {
    "served_model_name": Settings.served_model_name,
    "max_batch_requests": Settings.max_batch_requests,
    "max_concurrent_requests": Settings.max_concurrent_requests,
    "tokenization_workers": Settings.tokenization_workers,
    "auto_truncate": Settings.auto_truncate,
    "default_prompt": None,
    "default_prompt_name": None,
    "pooling": None,
    "dtype": None,
    "json_output": False,
    "otlp_endpoint": Settings.otlp_endpoint,
    "otlp_service_name": Settings.otlp_service_name,
}
"""Those that are no options of ours by another name."""

POOLINGS: Mapping[str, str] = {"last-token": "lasttoken"}
"""Our poolings by TEI's names; the others are called alike."""

_VARIANTS = {"float32": ("torch_ext-fp32", "onnx-fp32"), "bfloat16": ("torch_ext-bf16",)}


def _variable(name: str) -> str:
    return name.strip("-").replace("-", "_").upper()


def add_tei_options(parser: argparse.ArgumentParser) -> None:
    """Adds TEI's options to ours."""
    group = parser.add_argument_group(
        "text-embeddings-inference", "its options, also from the environment (MODEL_ID, MAX_BATCH_TOKENS ...)"
    )
    for name, option in _OPTIONS.items():
        if option.added:
            told = f"as --{option.ours.replace('_', '-')}" if option.ours and option.ours not in _DEFAULTS else None
            few: dict[str, Any] = {"nargs": "?", "const": "true"} if option.flag else {}
            group.add_argument(
                name,
                dest=f"tei {name}",
                metavar="VALUE",
                help=option.told or told or "no effect",
                **few,
            )
    parser.set_defaults(**_DEFAULTS)


def settle_tei_options(
    parser: argparse.ArgumentParser, argv: Sequence[str], arguments: argparse.Namespace, env: Mapping[str, str]
) -> argparse.Namespace:
    """Gives our options the values of TEI's; an option goes before the environment, and ours before TEI's.

    Args:
        parser: Of all options.
        argv: What it has read.
        arguments: What it made of it; changed.
        env: The environment.

    Returns:
        The same, with what was given and has no effect in `idle`.
    """
    idle: list[str] = []
    given = _given(parser, argv)
    if arguments.model is not None:
        given.add("model")
    if arguments.api_key:  # From an option, or a variable of ours.
        given.add("api_key")
    for name, option in _OPTIONS.items():
        source, text = name, getattr(arguments, f"tei {name}", None)
        others = name == "--model-id" and arguments.models  # An option goes before the environment.
        if text is None and option.environment and not others:
            source, text = _variable(name), env.get(_variable(name)) or None
        if text is None:
            continue
        if option.ours is None:
            idle.append(source)
            continue
        try:
            value = option.kind(text)
        except (ValueError, KeyError, argparse.ArgumentTypeError):
            parser.error(f"{source}: expected {option.expected}, got {text[:80]!r}")
        if option.ours not in given:
            setattr(arguments, option.ours, value)
    if arguments.default_prompt is not None and arguments.default_prompt_name is not None:
        parser.error("--default-prompt and --default-prompt-name: expected one of them, got both")
    if arguments.model is None and not arguments.models:
        parser.error("expected MODEL (or --model-id, or MODEL_ID of the environment), got none")
    if arguments.model is None and arguments.served_model_name is not None:
        parser.error("--served-model-name: expected MODEL, which it names, got --model, which has its name")
    if arguments.dtype is not None and arguments.dtype not in _VARIANTS:
        idle.append(f"--dtype {arguments.dtype}")
    if arguments.otlp_endpoint is not None and not _can_trace():
        idle.append(f"--otlp-endpoint ({how_to_install('otel')})")
        arguments.otlp_endpoint = None
    arguments.idle = idle
    return arguments


def _can_trace() -> bool:
    """Whether the packages are there that send spans."""
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc") is not None
    except ModuleNotFoundError:
        return False


def _given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """Where the options are kept that were given, abbreviated ones, too; `argv` has no errors."""
    kept = {option: action.dest for action in parser._actions for option in action.option_strings}
    words = [word.partition("=")[0] for word in argv if word.startswith("--") and word != "--"]
    found = (
        [word] if word in kept else [option for option in kept if option.startswith(word)]  # There is one.
        for word in words
    )
    return {kept[option] for options in found for option in options}


def fit_manifest(manifest: Manifest, arguments: argparse.Namespace) -> Manifest:
    """The manifest of a bundle with the prompt that TEI's options name; also chooses a variant by `--dtype`.

    Raises:
        BundleError: The bundle is for another pooling, or has no such prompt.
    """
    asked = arguments.pooling
    if asked is not None and manifest.pooling is not None and manifest.pooling.mode != POOLINGS.get(asked, asked):
        raise BundleError(
            f"--pooling {asked}: the bundle was made and verified with {manifest.pooling.mode}; export the model again "
            "with this pooling, or leave the option out"
        )
    if arguments.dtype is not None and arguments.variant in (None, "auto"):
        for variant in _VARIANTS.get(arguments.dtype, ()):
            if variant in manifest.variants:
                arguments.variant = variant
                break
    texts = {} if manifest.prompts is None else dict(manifest.prompts.texts)
    name: str | None = arguments.default_prompt_name
    text: str | None = arguments.default_prompt
    if text is not None:
        name = next((known for known, prompt in texts.items() if prompt == text), "default prompt")
        texts[name] = text
    if name is None:
        return manifest
    if name not in texts:
        known = ", ".join(texts) or "none"
        raise BundleError(f"--default-prompt-name {name}: expected one of the bundle's prompts ({known})")
    return dataclasses.replace(manifest, prompts=Prompts(texts, name))
