"""What a manifest says, field by field: names that are allowed, the parts of it, and how JSON becomes each of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from deploy.tasks import TASKS
from deploy.tasks.text_classification import ACTIVATIONS, PROBLEM_TYPES

__all__ = [
    "ACTIVATIONS",
    "CONFIG_FILE",
    "DEFAULT_VARIANTS",
    "ENGINES",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "POOLING_MODES",
    "PROBLEM_TYPES",
    "TASKS",
    "TOKENIZER_FILE",
    "TRUNCATION_SIDES",
    "VARIANTS",
    "BundleError",
    "Machine",
    "ModelInfo",
    "Pooling",
    "Prompts",
    "Reader",
    "SpecialToken",
    "VariantKind",
]

FORMAT = "torch-ext-bundle"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "config.json"

POOLING_MODES = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""As sentence-transformers names them: `mean_sqrt_len_tokens` is the sum of a text's hidden states by the root of their
number, `weightedmean` weighs them by their position from 1, `lasttoken` is that of the last token."""
TRUNCATION_SIDES = ("right", "left")
ENGINES = ("torch_ext", "torch", "onnxruntime")


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
    "torch-export-bf16": VariantKind("program_bf16.pt2", "torch", "bf16"),
    "onnx-int8": VariantKind("model_int8.onnx", "onnxruntime", "int8"),
    "onnx-fp32": VariantKind("model.onnx", "onnxruntime", "fp32"),
    "torch_ext-fp32": VariantKind("encoder_fp32.safetensors", "torch_ext", "fp32"),
}
"""Every variant that an export writes, in the order in which a server tries them."""

DEFAULT_VARIANTS = tuple(name for name, kind in VARIANTS.items() if kind.engine != "torch")
"""Those that an export writes unless it is told otherwise. A program of torch.export takes the place of torch_ext's
variants where torch_ext's encoder does not run the model."""


class Reader:
    """Reads typed fields of a JSON object; every error names the field.

    Attributes:
        where: What errors call the object.
        value: The object.

    Raises:
        BundleError: A value is missing, or of another kind; every method raises it.
    """

    def __init__(self, where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected a JSON object, got {_kind(value)}")
        self.where = where
        self.value: dict[str, Any] = value

    def get(self, name: str, *types: type, optional: bool = False) -> Any:
        """The value of a field, of one of the types; None where it is optional and absent or null."""
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
        """A string."""
        return str(self.get(name, str))

    def number(self, name: str) -> float:
        """A finite number."""
        return float(self.get(name, int, float))

    def count(self, name: str, least: int = 0) -> int:
        """An integer of at least `least`."""
        value = int(self.get(name, int))
        if value < least:
            raise BundleError(f"{self.where}.{name}: expected at least {least}, got {value}")
        return value

    def choice(self, name: str, choices: Collection[str], default: str | None = None) -> str:
        """One of `choices`; `default`, if there is one, where the field is absent or null."""
        if default is not None and self.value.get(name) is None:
            return default
        value = self.string(name)
        if value not in choices:
            raise BundleError(f"{self.where}.{name}: expected one of {', '.join(choices)}, got {value!r}")
        return value

    def child(self, name: str, optional: bool = False) -> Reader:
        """The reader of an object; of an empty one where it is optional and absent or null."""
        value = {} if optional and self.value.get(name) is None else self.get(name, dict)
        return Reader(f"{self.where}.{name}", value)

    def strings(self, name: str) -> tuple[str, ...]:
        """An array of strings."""
        value = self.get(name, list)
        if not all(isinstance(item, str) for item in value):
            raise BundleError(f"{self.where}.{name}: expected an array of strings")
        return tuple(value)

    def floats(self, name: str) -> tuple[float, ...]:
        """An array of finite numbers; none where the field is absent or null."""
        values = self.get(name, list, optional=True) or []
        return tuple(Reader(f"{self.where}.{name}", {"0": value}).number("0") for value in values)

    def numbers(self) -> dict[str, float]:
        """All fields, each a finite number."""
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

    @classmethod
    def read(cls, reader: Reader) -> ModelInfo:
        """Reads its JSON object."""
        return cls(reader.string("name"), reader.get("revision", str, optional=True), reader.string("architecture"))


@dataclass(frozen=True)
class Pooling:
    """How hidden states become one embedding per text.

    Attributes:
        mode: One of `POOLING_MODES`, or several joined by `+`, whose vectors stand side by side.
        normalize: Whether embeddings are divided by their L2 norm.
        source: What decided that: a file of the model, an option, or the default.
        dimensions: Leading dimensions that embeddings keep, before they are normalized; None: all.
        include_prompt: Whether the tokens of a prompt count.
    """

    mode: str
    normalize: bool
    source: str | None = None
    dimensions: int | None = None
    include_prompt: bool = True

    @property
    def modes(self) -> list[str]:
        """Each of its modes."""
        return self.mode.split("+")

    @classmethod
    def read(cls, reader: Reader) -> Pooling:
        """Reads its JSON object."""
        mode = reader.string("mode")
        if not set(mode.split("+")) <= set(POOLING_MODES):
            reader.choice("mode", POOLING_MODES)
        return cls(
            mode,
            reader.get("normalize", bool),
            reader.get("source", str, optional=True),
            None if reader.value.get("dimensions") is None else reader.count("dimensions", 1),
            reader.get("include_prompt", bool, optional=True) is not False,
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        result = asdict(self)
        if self.dimensions is None:
            del result["dimensions"]
        if self.include_prompt:
            del result["include_prompt"]
        return result


@dataclass(frozen=True)
class Prompts:
    """Texts that a model was trained to see before its inputs.

    Attributes:
        texts: Prompts by name, such as `query`.
        default: Name of the one that is put before an input for which none is asked; None: no prompt then.
    """

    texts: Mapping[str, str]
    default: str | None = None

    @property
    def default_text(self) -> str:
        """What is put before an input for which no prompt is asked; empty: nothing."""
        return "" if self.default is None else self.texts[self.default]

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {"default": self.default, "texts": dict(self.texts)}

    @classmethod
    def read(cls, reader: Reader) -> Prompts:
        """Reads its JSON object."""
        texts = reader.child("texts")
        named = {name: texts.string(name) for name in texts.value}
        default = reader.get("default", str, optional=True)
        if default is not None and default not in named:
            wanted = f"one of {', '.join(named)}" if named else "one of the texts, and there are none"
            raise BundleError(f"{reader.where}.default: expected {wanted}, got {default!r}")
        return cls(named, default)


@dataclass(frozen=True)
class SpecialToken:
    """One special token of the tokenizer."""

    id: int
    token: str

    @classmethod
    def read(cls, reader: Reader) -> SpecialToken:
        """Reads its JSON object."""
        return cls(reader.count("id"), reader.string("token"))


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

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets)}

    @classmethod
    def read(cls, reader: Reader) -> Machine:
        """Reads its JSON object."""
        return cls(reader.string("cpu"), reader.string("architecture"), reader.strings("instruction_sets"))
