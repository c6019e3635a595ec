"""The bundle: one folder that holds everything the server needs to run a model, described by its `manifest.json`.

`python -m deploy export` writes it, `python -m deploy serve` reads it. This module needs the standard library only, so
that a server that runs ONNX Runtime loads neither torch nor transformers for it.

A reader ignores fields that it does not know; a manifest whose meaning changed gets a new `format_version`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "CONFIG_FILE",
    "ENGINES",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "POOLING_MODES",
    "PROBLEM_TYPES",
    "TASKS",
    "TOKENIZER_FILE",
    "VARIANTS",
    "Accuracy",
    "BundleError",
    "FileEntry",
    "Machine",
    "Manifest",
    "ModelInfo",
    "Pooling",
    "SpecialToken",
    "Speed",
    "Variant",
    "VariantKind",
    "file_entry",
    "load_manifest",
    "owned_files",
    "write_manifest",
]

FORMAT = "torch-ext-bundle"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "config.json"

TASKS = ("feature-extraction", "text-classification", "fill-mask")
POOLING_MODES = ("mean", "cls", "max")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
ENGINES = ("torch_ext", "onnxruntime")

_MAX_MANIFEST_BYTES = 16 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BundleError(ValueError):
    """A folder is not a usable bundle; the message says what was expected, what was found, and what to do."""


@dataclass(frozen=True)
class VariantKind:
    """What a variant is made of: the file that holds it, the engine that runs it, and the dtype of its weights."""

    file: str
    engine: str
    dtype: str


VARIANTS: Mapping[str, VariantKind] = {
    "torch_ext-bf16": VariantKind("encoder_bf16.safetensors", "torch_ext", "bf16"),
    "torch_ext-int8": VariantKind("encoder_int8.safetensors", "torch_ext", "int8"),
    "onnx-int8": VariantKind("model_int8.onnx", "onnxruntime", "int8"),
    "onnx-fp32": VariantKind("model.onnx", "onnxruntime", "fp32"),
    "torch-fp32": VariantKind("encoder_fp32.safetensors", "torch_ext", "fp32"),
}
"""Every variant that an export writes, in the order in which a server tries them."""


@dataclass(frozen=True)
class ModelInfo:
    """Where the weights come from.

    Attributes:
        name: Name that the server reports.
        revision: Commit on the hub, or None for a folder.
        architecture: Class name of transformers, such as `BertModel`.
    """

    name: str
    revision: str | None
    architecture: str


@dataclass(frozen=True)
class Pooling:
    """How hidden states become one embedding per text.

    Attributes:
        mode: One of `POOLING_MODES`.
        normalize: Whether embeddings are divided by their L2 norm.
        source: What decided that: a file of the model, an option, or the default.
    """

    mode: str
    normalize: bool
    source: str | None = None


@dataclass(frozen=True)
class SpecialToken:
    """One special token of the tokenizer."""

    id: int
    token: str


@dataclass(frozen=True)
class FileEntry:
    """What a file of the bundle has to be.

    Attributes:
        sha256: 64 lower-case hexadecimal digits.
        bytes: Size.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Machine:
    """Where the figures of a manifest were measured.

    Attributes:
        cpu: Name of the CPU.
        architecture: As `platform.machine` spells it.
        instruction_sets: What it has of the instructions that kernels for bf16 and int8 use, in the kernel's names:
            `avx2`, `avx512_vnni`, `i8mm`.
    """

    cpu: str
    architecture: str
    instruction_sets: tuple[str, ...]

    def __str__(self) -> str:
        """Such as `AMD EPYC (x86_64: avx2 fma)`."""
        return f"{self.cpu} ({self.architecture}: {' '.join(self.instruction_sets) or 'none that matter'})"


@dataclass(frozen=True)
class Accuracy:
    """A variant compared with transformers in fp32 on real text.

    Attributes:
        metric: `cosine` (feature-extraction, per text), `agreement` (text-classification: same best label;
            fill-mask: same best token) or `closeness` (regression: 1 less the relative error).
        mean: Mean of the metric over the texts.
        min: Worst text.
        texts: How many texts were compared.
        bound: Bounds that the variant had to keep, by name (`mean`, `min`, `max_prob_diff`).
        details: Other measured figures by name, such as `max_prob_diff`.
    """

    metric: str
    mean: float
    min: float
    texts: int
    bound: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """A quick measurement on the machine that exported; it says nothing about another machine.

    Attributes:
        texts_per_s: Texts per second, tokenisation not included.
        threads: Threads of the engine.
        cpu: Name of the CPU.
        batch: Texts per batch, sorted by length.
    """

    texts_per_s: float
    threads: int
    cpu: str
    batch: int


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        name: Key in the manifest, such as `torch_ext-bf16`.
        file: Name of its weights file in the bundle.
        engine: One of `ENGINES`.
        dtype: `bf16`, `fp32` or `int8`.
        bytes: Size of everything that this variant loads.
        accuracy: Comparison with fp32.
        speed: Quick measurement, or None.
        extra_files: Other files of the bundle that it needs (external weights of an ONNX model above 2 GiB).
        quantization: What was measured to find the layers that int8 would damage too much: `kept_bf16`, names of those
            that stayed in bf16; `layers`, the damage of each; mean and min cosine with all in `int8`, all in `bf16`,
            and as `chosen`. Empty for a variant that is not quantized in this way.
        kernels: What computed `accuracy` and `speed`: the instruction set that torch_ext chose, or ONNX Runtime's
            version and how it multiplies int8. None in bundles that were written before this field existed.
    """

    name: str
    file: str
    engine: str
    dtype: str
    bytes: int
    accuracy: Accuracy
    speed: Speed | None = None
    extra_files: tuple[str, ...] = ()
    quantization: Mapping[str, Any] = field(default_factory=dict)
    kernels: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest, checked.

    Attributes:
        root: Folder of the bundle.
        model: Where the weights come from.
        created_with: Versions of the libraries that wrote the bundle, by name.
        task: One of `TASKS`.
        hidden_size: Width of the hidden states, and of embeddings.
        max_tokens: Longest input in tokens, special tokens included.
        pooling: How embeddings are made; None unless `task` is feature-extraction.
        labels: Names of the classes in the order of the logits; None unless `task` is text-classification.
        problem_type: One of `PROBLEM_TYPES`; None unless `task` is text-classification.
        special_tokens: `pad`, `mask`, `cls`, `sep`; None for one that the tokenizer does not have.
        files: What every file has to be, by name.
        variants: Variants by name.
        verification: How accuracy was measured: `texts`, `source`, `mean_tokens`.
        machine: Where accuracy and speed of every variant were measured; None in bundles that were written before this
            field existed.
    """

    root: Path
    model: ModelInfo
    created_with: Mapping[str, str]
    task: str
    hidden_size: int
    max_tokens: int
    pooling: Pooling | None
    labels: tuple[str, ...] | None
    problem_type: str | None
    special_tokens: Mapping[str, SpecialToken | None]
    files: Mapping[str, FileEntry]
    variants: Mapping[str, Variant]
    verification: Mapping[str, Any] = field(default_factory=dict)
    machine: Machine | None = None

    def path(self, name: str) -> Path:
        """Path of a file of the bundle; `name` has to be listed in `files`."""
        if name not in self.files:
            raise BundleError(f"{self.root}: no file {name!r} in this bundle; it has {', '.join(sorted(self.files))}")
        return self.root / name

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer, without truncation and padding."""
        return self.path(TOKENIZER_FILE)

    def variant(self, name: str) -> Variant:
        """The variant called `name`.

        Raises:
            BundleError: The bundle was exported without it.
        """
        if name not in self.variants:
            raise BundleError(
                f"{self.root}: no variant {name!r} in this bundle; choose one of {', '.join(self.variants)}, "
                f"or export the model again with --variants {name}"
            )
        return self.variants[name]

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written."""

        def token(value: SpecialToken | None) -> dict[str, Any] | None:
            return None if value is None else {"id": value.id, "token": value.token}

        def variant(value: Variant) -> dict[str, Any]:
            accuracy = value.accuracy
            result: dict[str, Any] = {
                "file": value.file,
                "engine": value.engine,
                "dtype": value.dtype,
                "bytes": value.bytes,
                "accuracy": {
                    "metric": accuracy.metric,
                    "mean": accuracy.mean,
                    "min": accuracy.min,
                    "texts": accuracy.texts,
                    "bound": dict(accuracy.bound),
                    "details": dict(accuracy.details),
                },
                "speed": None,
                "extra_files": list(value.extra_files),
            }
            if value.quantization:
                result["quantization"] = dict(value.quantization)
            if value.kernels is not None:
                result["kernels"] = value.kernels
            if value.speed is not None:
                result["speed"] = {
                    "texts_per_s": value.speed.texts_per_s,
                    "threads": value.speed.threads,
                    "cpu": value.speed.cpu,
                    "batch": value.speed.batch,
                }
            return result

        pooling = self.pooling
        result: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": {
                "name": self.model.name,
                "revision": self.model.revision,
                "architecture": self.model.architecture,
            },
            "created_with": dict(self.created_with),
            "task": self.task,
            "hidden_size": self.hidden_size,
            "limits": {"max_tokens": self.max_tokens},
            "pooling": None
            if pooling is None
            else {"mode": pooling.mode, "normalize": pooling.normalize, "source": pooling.source},
            "labels": None if self.labels is None else list(self.labels),
            "problem_type": self.problem_type,
            "special_tokens": {name: token(value) for name, value in self.special_tokens.items()},
            "verification": dict(self.verification),
            "files": {
                name: {"sha256": entry.sha256, "bytes": entry.bytes} for name, entry in sorted(self.files.items())
            },
            "variants": {name: variant(value) for name, value in self.variants.items()},
        }
        if self.machine is not None:
            result["machine"] = {
                "cpu": self.machine.cpu,
                "architecture": self.machine.architecture,
                "instruction_sets": list(self.machine.instruction_sets),
            }
        return result


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    size = 0
    buffer = bytearray(1 << 20)
    with path.open("rb") as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return FileEntry(digest.hexdigest(), size)


def write_manifest(manifest: Manifest) -> Path:
    """Writes `manifest.json` into `manifest.root` and returns its path.

    Raises:
        BundleError: The manifest would not be accepted by `load_manifest`.
        OSError: It cannot be written.
    """
    value = manifest.to_json()
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise BundleError(f"{manifest.root / MANIFEST_FILE}: expected finite numbers ({error})") from error
    _parse(manifest.root, json.loads(text))
    path = manifest.root / MANIFEST_FILE
    path.write_text(text, encoding="utf-8")
    return path


def _read_json(root: Path) -> Any:
    """The content of a folder's manifest, unchecked."""
    path = root / MANIFEST_FILE
    if not root.is_dir():
        kind = "a file" if root.exists() else "no such folder"
        raise BundleError(f"{root}: expected the folder of a bundle, found {kind}; make one with: {_HOW_TO_EXPORT}")
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: expected at most {_MAX_MANIFEST_BYTES} bytes, got {path.stat().st_size}")
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{root}: not a bundle (no {MANIFEST_FILE}); make one with: {_HOW_TO_EXPORT}") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path}: expected JSON in UTF-8 ({error}); export the model again") from error
    return value


def owned_files(folder: Path) -> frozenset[str]:
    """Names of the files that a bundle's manifest owns, its own included; what else the folder holds is somebody's.

    Neither the files nor the rest of the manifest are checked: a damaged bundle, or one of another version, owns its
    files, too.

    Args:
        folder: Folder of the bundle.

    Raises:
        BundleError: The folder is not a bundle, or the manifest names files outside of it.
    """
    top = _Reader(str(folder / MANIFEST_FILE), _read_json(folder))
    _check_format(top)
    files = top.child("files")
    return frozenset({MANIFEST_FILE, *(_check_file_name(files.where, name) for name in files.value)})


def load_manifest(folder: str | Path, verify: bool = True, variants: Collection[str] | None = None) -> Manifest:
    """Reads and checks a bundle.

    Args:
        folder: Folder of the bundle.
        verify: Also compares the SHA-256 of every file that is needed (about 1 s per GB). Existence and size are always
            checked.
        variants: Names of the variants that will be used; only their files, the tokenizer and the config have to be
            there. None: every file of the manifest has to be there.

    Raises:
        BundleError: Not a bundle, a newer format, a field that is missing or wrong, a file name that leads out of the
            folder, or a file that is missing or differs from the manifest.
    """
    root = Path(folder)
    manifest = _parse(root, _read_json(root))

    needed = set(manifest.files)
    if variants is not None:
        needed = {TOKENIZER_FILE, CONFIG_FILE}
        for name in variants:
            variant = manifest.variant(name)
            needed.update((variant.file, *variant.extra_files))
    for name in sorted(needed):
        _check_file(root / name, manifest.files[name], verify)
    return manifest


_HOW_TO_EXPORT = "python -m deploy export MODEL -o DIR"


def _check_file(path: Path, entry: FileEntry, verify: bool) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path}: expected a regular file; copy or export the bundle again")
        if status.st_size != entry.bytes:
            raise BundleError(
                f"{path}: expected {entry.bytes} bytes, got {status.st_size}; the file is truncated or was replaced: "
                "copy or export the bundle again"
            )
        if verify and (found := file_entry(path)).sha256 != entry.sha256:
            raise BundleError(
                f"{path}: expected SHA-256 {entry.sha256}, got {found.sha256}; the file was changed after the export: "
                "copy or export the bundle again"
            )
    except FileNotFoundError:
        raise BundleError(f"{path}: listed in the manifest but missing; copy or export the bundle again") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Reader:
    """Reads typed fields of a JSON object; every error names the field."""

    def __init__(self, where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected a JSON object, got {_kind(value)}")
        self.where = where
        self.value: dict[str, Any] = value

    def get(self, name: str, *types: type, optional: bool = False) -> Any:
        value = self.value.get(name)
        if value is None and optional:
            return None
        # bool is a subclass of int, and 1 is a fine float.
        right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            wanted = " or ".join(_NAMES[item] for item in types)
            found = _kind(value) if name in self.value else "nothing"
            raise BundleError(f"{self.where}.{name}: expected {wanted}, got {found}")
        return value

    def string(self, name: str) -> str:
        return str(self.get(name, str))

    def number(self, name: str) -> float:
        return float(self.get(name, int, float))

    def count(self, name: str, least: int = 0) -> int:
        value = int(self.get(name, int))
        if value < least:
            raise BundleError(f"{self.where}.{name}: expected at least {least}, got {value}")
        return value

    def choice(self, name: str, choices: Collection[str]) -> str:
        value = self.string(name)
        if value not in choices:
            raise BundleError(f"{self.where}.{name}: expected one of {', '.join(choices)}, got {value!r}")
        return value

    def child(self, name: str, optional: bool = False) -> _Reader:
        value = {} if optional and self.value.get(name) is None else self.get(name, dict)
        return _Reader(f"{self.where}.{name}", value)

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.get(name, list)
        if not all(isinstance(item, str) for item in value):
            raise BundleError(f"{self.where}.{name}: expected an array of strings")
        return tuple(value)

    def numbers(self) -> dict[str, float]:
        return {name: self.number(name) for name in self.value}


_NAMES: Mapping[type, str] = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "an integer",
    list: "an array",
    str: "a string",
}


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def _check_file_name(where: str, name: str) -> str:
    """Accepts plain names only: nothing that leads out of the folder, nor a hidden file."""
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST_FILE:
        raise BundleError(f"{where}: expected the plain name of a file in the bundle, got {name!r}; refused")
    return name


def _check_format(top: _Reader) -> None:
    found = top.value.get("format")
    if found != FORMAT:
        raise BundleError(f"{top.where}: expected format {FORMAT!r}, got {found!r}; this is not a bundle")


def _parse(root: Path, value: Any) -> Manifest:
    top = _Reader(str(root / MANIFEST_FILE), value)
    _check_format(top)
    version = top.count("format_version", 1)
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{top.where}: expected format_version {FORMAT_VERSION}, got {version}; export the model again with this "
            "version, or use the version that wrote it"
        )
    task = top.choice("task", TASKS)
    model = top.child("model")

    files: dict[str, FileEntry] = {}
    listed = top.child("files")
    for name in listed.value:
        _check_file_name(listed.where, name)
        entry = listed.child(name)
        sha256 = entry.string("sha256")
        if not _SHA256.fullmatch(sha256):
            raise BundleError(f"{entry.where}.sha256: expected 64 hexadecimal digits, got {sha256!r}")
        files[name] = FileEntry(sha256, entry.count("bytes"))
    for name in (TOKENIZER_FILE, CONFIG_FILE):
        if name not in files:
            raise BundleError(f"{listed.where}: expected an entry for {name}")

    pooling: Pooling | None = None
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    if task == "feature-extraction":
        reader = top.child("pooling")
        pooling = Pooling(
            reader.choice("mode", POOLING_MODES),
            reader.get("normalize", bool),
            reader.get("source", str, optional=True),
        )
    elif task == "text-classification":
        labels = top.strings("labels")
        if not labels:
            raise BundleError(f"{top.where}.labels: expected at least one label")
        problem_type = top.choice("problem_type", PROBLEM_TYPES)

    tokens: dict[str, SpecialToken | None] = {}
    special = top.child("special_tokens")
    for name in ("pad", "mask", "cls", "sep"):
        reader = special.child(name, optional=True)
        tokens[name] = SpecialToken(reader.count("id"), reader.string("token")) if reader.value else None
    if tokens["pad"] is None:
        raise BundleError(f"{special.where}.pad: expected a token; batches are padded with it")
    if task == "fill-mask" and tokens["mask"] is None:
        raise BundleError(f"{special.where}.mask: expected a token; fill-mask needs one")

    variants: dict[str, Variant] = {}
    described = top.child("variants")
    for name in described.value:
        variants[name] = _parse_variant(name, described.child(name), files)
    if not variants:
        raise BundleError(f"{described.where}: expected at least one variant")

    machine: Machine | None = None
    if top.value.get("machine") is not None:
        reader = top.child("machine")
        machine = Machine(reader.string("cpu"), reader.string("architecture"), reader.strings("instruction_sets"))

    versions = top.child("created_with")
    return Manifest(
        root=root,
        model=ModelInfo(model.string("name"), model.get("revision", str, optional=True), model.string("architecture")),
        created_with={name: versions.string(name) for name in versions.value},
        task=task,
        hidden_size=top.count("hidden_size", 1),
        max_tokens=top.child("limits").count("max_tokens", 1),
        pooling=pooling,
        labels=labels,
        problem_type=problem_type,
        special_tokens=tokens,
        files=files,
        variants=variants,
        verification=top.child("verification", optional=True).value,
        machine=machine,
    )


def _parse_variant(name: str, reader: _Reader, files: Mapping[str, FileEntry]) -> Variant:
    extra = reader.strings("extra_files") if "extra_files" in reader.value else ()
    file = reader.string("file")
    for item in (file, *extra):
        _check_file_name(reader.where, item)
        if item not in files:
            raise BundleError(f"{reader.where}: names the file {item!r}, which is not listed in files")
    accuracy = reader.child("accuracy")
    speed = reader.child("speed", optional=True)
    return Variant(
        name=name,
        file=file,
        engine=reader.choice("engine", ENGINES),
        dtype=reader.string("dtype"),
        bytes=reader.count("bytes"),
        accuracy=Accuracy(
            metric=accuracy.string("metric"),
            mean=accuracy.number("mean"),
            min=accuracy.number("min"),
            texts=accuracy.count("texts", 1),
            bound=accuracy.child("bound", optional=True).numbers(),
            details=accuracy.child("details", optional=True).numbers(),
        ),
        speed=Speed(
            speed.number("texts_per_s"), speed.count("threads", 1), speed.string("cpu"), speed.count("batch", 1)
        )
        if speed.value
        else None,
        extra_files=extra,
        quantization=reader.child("quantization", optional=True).value,
        kernels=reader.get("kernels", str, optional=True),
    )
