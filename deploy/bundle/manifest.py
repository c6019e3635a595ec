"""The manifest: what one folder holds that the server needs to run a model.

A reader ignores fields that it does not know; a manifest whose meaning changed gets a new `format_version`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploy.bundle.fields import (
    ACTIVATIONS,
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    PROBLEM_TYPES,
    TASKS,
    TOKENIZER_FILE,
    TRUNCATION_SIDES,
    VARIANTS,
    BundleError,
    Machine,
    ModelInfo,
    Pooling,
    Prompts,
    Reader,
    SpecialToken,
)
from deploy.bundle.files import FileEntry, check_file, check_file_name, check_format, read_json
from deploy.bundle.measured import Variant
from deploy.bundle.stages import Dense, Sparse, TokenVectors

__all__ = ["Manifest", "load_manifest", "write_manifest"]


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest, checked.

    Attributes:
        root: Folder of the bundle.
        model: Where the weights come from.
        created_with: Versions of the libraries that wrote the bundle, by name.
        task: One of `TASKS`.
        hidden_size: Width of the hidden states.
        max_tokens: Longest input in tokens, special tokens included.
        pooling: How embeddings are made; None unless the task needs it, as for the fields of labels.
        prompts: Texts that go before inputs, one of them maybe by default; None: none, as in bundles that were written
            before this field existed.
        labels: Names of the classes in the order of the logits.
        problem_type: One of `PROBLEM_TYPES`.
        activation: What makes scores of the logits, one of `ACTIVATIONS`; None in bundles that were written before this
            field existed, where `problem_type` decides alone.
        truncation_side: From which side longer texts are cut, one of `TRUNCATION_SIDES`.
        special_tokens: `pad`, `mask`, `cls`, `sep`, `unk`; None for one that the tokenizer does not have. Bundles that
            were written before it was a field have no `unk`.
        files: What every file has to be, by name.
        variants: Variants by name.
        verification: How accuracy was measured: `texts`, `source`, `mean_tokens`.
        machine: Where accuracy and speed of every variant were measured; None in bundles that were written before this
            field existed.
        vocab_size: Number of token ids; None in bundles that were written before this field existed.
        dense: Linear stages between pooling and norm of embeddings.
        sparse: How sparse vectors are made; None unless the task needs it.
        token_vectors: Which tokens have a vector; None unless the task needs it.
        token_types: Whether the model is given the token types of pairs of texts; else all are 0.
        cleans_up: Whether texts of token ids lose the spaces before marks.
        tokenizer_json: Content of the tokenizer of a folder that was not exported, which lists no files; None: it is in
            `tokenizer_path`.
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
    prompts: Prompts | None = None
    activation: str | None = None
    truncation_side: str = "right"
    vocab_size: int | None = None
    token_types: bool = True
    cleans_up: bool = False
    sparse: Sparse | None = None
    tokenizer_json: str | None = None
    dense: tuple[Dense, ...] = ()
    token_vectors: TokenVectors | None = None

    @property
    def width(self) -> int:
        """Of embeddings."""
        parts = 1 if self.pooling is None else len(self.pooling.modes)
        width = self.dense[-1].outputs if self.dense else self.hidden_size * parts
        kept = None if self.pooling is None else self.pooling.dimensions
        return width if kept is None else min(width, kept)

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
            BundleError: The bundle was exported without it, the model was not exported, or no variant has this name.
        """
        if name not in self.variants:
            where, how = "in this bundle", f"export the model again with --variants {name}"
            if all(variant.accuracy is None for variant in self.variants.values()):
                where, how = "of a model that was not exported", "export it: python -m deploy export MODEL -o DIR"
            end = f", or {how}" if name in VARIANTS else ""
            raise BundleError(
                f"{self.root}: no variant {name!r} {where}; choose one of {', '.join(self.variants)}{end}"
            )
        return self.variants[name]

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written."""
        limits: dict[str, Any] = {"max_tokens": self.max_tokens}
        if self.truncation_side != "right":
            limits["truncation_side"] = self.truncation_side
        result: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": asdict(self.model),
            "created_with": dict(self.created_with),
            "task": self.task,
            "hidden_size": self.hidden_size,
            "limits": limits,
            "pooling": None if self.pooling is None else self.pooling.to_json(),
            "labels": None if self.labels is None else list(self.labels),
            "problem_type": self.problem_type,
            "special_tokens": {
                name: None if value is None else asdict(value) for name, value in self.special_tokens.items()
            },
            "verification": dict(self.verification),
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "variants": {name: value.to_json() for name, value in self.variants.items()},
        }
        if self.activation is not None:
            result["activation"] = self.activation
        if self.vocab_size is not None:
            result["vocab_size"] = self.vocab_size
        if self.dense:
            result["dense"] = [stage.to_json() for stage in self.dense]
        if self.sparse is not None:
            result["sparse"] = self.sparse.to_json()
        if self.token_vectors is not None:
            result["token_vectors"] = self.token_vectors.to_json()
        if not self.token_types:
            result["token_types"] = False
        if self.cleans_up:
            result["cleans_up"] = True
        if self.prompts is not None:
            result["prompts"] = self.prompts.to_json()
        if self.machine is not None:
            result["machine"] = self.machine.to_json()
        return result


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
    manifest = _parse(root, read_json(root))

    needed = set(manifest.files)
    if variants is not None:
        needed = {TOKENIZER_FILE, CONFIG_FILE}
        for name in variants:
            variant = manifest.variant(name)
            needed.update((variant.file, *variant.extra_files))
    for name in sorted(needed):
        check_file(root / name, manifest.files[name], verify)
    return manifest


def _parse(root: Path, value: Any) -> Manifest:
    top = Reader(str(root / MANIFEST_FILE), value)
    check_format(top)
    version = top.count("format_version", 1)
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{top.where}: expected format_version {FORMAT_VERSION}, got {version}; export the model again with this "
            "version, or use the version that wrote it"
        )
    task = top.choice("task", TASKS)
    files = _read_files(top.child("files"))
    needs = TASKS[task].needs
    labels: tuple[str, ...] | None = None
    if needs.labels:
        labels = top.strings("labels")
        if not labels:
            raise BundleError(f"{top.where}.labels: expected at least one label")
    versions, limits = top.child("created_with"), top.child("limits")
    return Manifest(
        root=root,
        model=ModelInfo.read(top.child("model")),
        created_with={name: versions.string(name) for name in versions.value},
        task=task,
        hidden_size=top.count("hidden_size", 1),
        max_tokens=limits.count("max_tokens", 1),
        truncation_side=limits.choice("truncation_side", TRUNCATION_SIDES, default="right"),
        pooling=Pooling.read(top.child("pooling")) if needs.pooling else None,
        prompts=Prompts.read(top.child("prompts")) if top.value.get("prompts") is not None else None,
        labels=labels,
        problem_type=None if labels is None else top.choice("problem_type", PROBLEM_TYPES),
        activation=None
        if labels is None or top.value.get("activation") is None
        else top.choice("activation", ACTIVATIONS),
        special_tokens=_read_special_tokens(top.child("special_tokens"), task),
        files=files,
        variants=_read_variants(top.child("variants"), files),
        verification=top.child("verification", optional=True).value,
        machine=Machine.read(top.child("machine")) if top.value.get("machine") is not None else None,
        vocab_size=None if top.value.get("vocab_size") is None else top.count("vocab_size", 1),
        dense=_read_dense(top) if needs.pooling or needs.token_vectors else (),
        sparse=Sparse.read(top.child("sparse")) if needs.sparse else None,
        token_vectors=TokenVectors.read(top.child("token_vectors")) if needs.token_vectors else None,
        token_types=top.get("token_types", bool, optional=True) is not False,
        cleans_up=top.get("cleans_up", bool, optional=True) is True,
    )


def _read_dense(top: Reader) -> tuple[Dense, ...]:
    stages = top.get("dense", list, optional=True) or []
    return tuple(Dense.read(Reader(f"{top.where}.dense[{place}]", stage)) for place, stage in enumerate(stages))


def _read_files(listed: Reader) -> dict[str, FileEntry]:
    files = {check_file_name(listed.where, name): FileEntry.read(listed.child(name)) for name in listed.value}
    for name in (TOKENIZER_FILE, CONFIG_FILE):
        if name not in files:
            raise BundleError(f"{listed.where}: expected an entry for {name}")
    return files


def _read_special_tokens(special: Reader, task: str) -> dict[str, SpecialToken | None]:
    tokens: dict[str, SpecialToken | None] = {}
    for name in ("pad", "mask", "cls", "sep", *(("unk",) if "unk" in special.value else ())):
        reader = special.child(name, optional=True)
        tokens[name] = SpecialToken.read(reader) if reader.value else None
    if tokens["pad"] is None:
        raise BundleError(f"{special.where}.pad: expected a token; batches are padded with it")
    if TASKS[task].needs.mask_token and tokens["mask"] is None:
        raise BundleError(f"{special.where}.mask: expected a token; {task} needs one")
    return tokens


def _read_variants(described: Reader, files: Mapping[str, FileEntry]) -> dict[str, Variant]:
    variants: dict[str, Variant] = {}
    for name in described.value:
        reader = described.child(name)
        variants[name] = Variant.read(name, reader)
        for item in (variants[name].file, *variants[name].extra_files):
            check_file_name(reader.where, item)
            if item not in files:
                raise BundleError(f"{reader.where}: names the file {item!r}, which is not listed in files")
    if not variants:
        raise BundleError(f"{described.where}: expected at least one variant")
    return variants
