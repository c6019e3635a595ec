"""The bundle: one folder that holds everything the server needs to run a model, described by its `manifest.json`.

`python -m deploy export` writes it, `python -m deploy serve` reads it. This package needs the standard library only, so
that a server that runs ONNX Runtime loads neither torch nor transformers for it.

| module | part |
|---|---|
| `manifest` | the whole: `Manifest`, reading and writing it |
| `fields` | its parts, the names that are allowed, and how JSON becomes each of them |
| `measured` | variants, their accuracy and speed |
| `stages` | what comes behind the encoder: linear stages, sparse pooling |
| `files` | the files beside it: names, sizes, digests |
| `config` | whether the manifest agrees with the model's own configuration |
"""

from __future__ import annotations

from deploy.bundle.config import OFFSET_POSITIONS, check_config
from deploy.bundle.fields import (
    ACTIVATIONS,
    CONFIG_FILE,
    DEFAULT_VARIANTS,
    ENGINES,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    POOLING_MODES,
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
    VariantKind,
)
from deploy.bundle.files import FileEntry, file_entry, owned_files
from deploy.bundle.manifest import Manifest, load_manifest, write_manifest
from deploy.bundle.measured import Accuracy, Speed, Variant
from deploy.bundle.stages import DENSE_ACTIVATIONS, DENSE_FILE, Dense, Role, Sparse, TokenVectors

__all__ = [
    "ACTIVATIONS",
    "CONFIG_FILE",
    "DEFAULT_VARIANTS",
    "DENSE_ACTIVATIONS",
    "DENSE_FILE",
    "ENGINES",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "OFFSET_POSITIONS",
    "POOLING_MODES",
    "PROBLEM_TYPES",
    "TASKS",
    "TOKENIZER_FILE",
    "TRUNCATION_SIDES",
    "VARIANTS",
    "Accuracy",
    "BundleError",
    "Dense",
    "FileEntry",
    "Machine",
    "Manifest",
    "ModelInfo",
    "Pooling",
    "Prompts",
    "Reader",
    "Role",
    "Sparse",
    "TokenVectors",
    "SpecialToken",
    "Speed",
    "Variant",
    "VariantKind",
    "check_config",
    "file_entry",
    "load_manifest",
    "owned_files",
    "write_manifest",
]
