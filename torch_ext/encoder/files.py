"""Files of encoders and heads: safetensors with unpacked weights, and the specifications as metadata."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from torch_ext.encoder.places import folder_advice
from torch_ext.encoder.spec import Dtype, EncoderSpec, HeadSpec, check_dtype, is_matrix, is_table
from torch_ext.encoder.weights import TABLE_DTYPES, check_weights

__all__ = ["has_part", "read", "save_unpacked", "stored_dtype", "write"]

FORMAT = "torch-ext-encoder"
FORMAT_VERSION = 1

# Architectures whose positions are counted over tokens other than padding. In files from before padding_id was a field
# it is the row before the first token's.
_COUNTED_WITHOUT_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")

Spec = TypeVar("Spec", EncoderSpec, HeadSpec)


def _safetensors() -> Any:
    """The library of the file format.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "safetensors":
            raise
        raise ImportError(
            "files of encoders need safetensors, which is not installed: pip install 'torch-ext[torch]'",
            name="safetensors",
        ) from error
    return safetensors


def write(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write beside ``path``, then rename: the file appears under its name only when it is complete.

    Raises:
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
    """
    save_file = _safetensors().torch.save_file

    name = str(path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp"))
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        # What the umask leaves of it. To ask for the umask is to set it, for all threads.
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        save_file(weights, name, {"format": FORMAT, "format_version": str(FORMAT_VERSION), **metadata})
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class _Head(Protocol):
    @property
    def spec(self) -> HeadSpec: ...

    @property
    def dtype(self) -> Dtype: ...

    def weights(self) -> Mapping[str, Tensor]: ...


def save_unpacked(
    path: Path, spec: EncoderSpec, weights: Mapping[str, Tensor], dtype: Dtype, head: _Head | None = None
) -> None:
    """Write the file that ``Encoder(spec, weights, dtype).save(path, head)`` writes, without packing the weights first.

    That takes a copy of them in memory; packed and unpacked again they are there three times.

    Args:
        path: the file; replaced if it exists.
        spec: what the encoder computes.
        weights: fp32 or bf16, by the names of ``spec.shapes()``.
        dtype: ``"bf16"`` or ``"fp32"``.
        head: a task head to go with it.

    Raises:
        ValueError: a name, shape or dtype is wrong, or ``head`` does not fit the encoder.
        OSError: the file cannot be written.
    """
    check_weights(spec, weights)
    if dtype not in ("bf16", "fp32"):
        raise ValueError(f"save_unpacked: expected dtype 'bf16' or 'fp32', got {dtype!r}")
    if head is not None and (not head.spec.fits(spec.hidden_size) or head.dtype != dtype):
        raise ValueError(
            f"save_unpacked: expected a head of hidden_size={spec.hidden_size}, {dtype}, got "
            f"{head.spec.hidden_size}, {head.dtype}"
        )
    converted: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        kind = TABLE_DTYPES[dtype] if is_matrix(name) or is_table(name) else torch.float32
        tensor = tensor.detach().to(kind).contiguous()
        # The format has no two names for one weight, and layers may share theirs.
        converted[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    metadata = {"encoder": json.dumps(dataclasses.asdict(spec))}
    if head is not None:
        converted.update(head.weights())
        metadata["head"] = json.dumps(dataclasses.asdict(head.spec))
    write(path, converted, {**metadata, "dtype": dtype})


def _open(path: Path) -> tuple[dict[str, str], Any]:
    """The metadata of a file, checked for format and version, and the open file."""
    safetensors = _safetensors()
    if path.is_dir():
        raise ValueError(folder_advice(path))
    if not path.is_file():
        raise FileNotFoundError(f"no encoder file {path}")
    try:
        file = safetensors.safe_open(str(path), framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or is not a safetensors file: {error}") from error
    metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by torch_ext.Encoder.save(): its metadata has no format {FORMAT!r}")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')}, this torch_ext reads {FORMAT_VERSION}: "
            "export the model again, or update torch-ext"
        )
    return metadata, file


def has_part(path: Path, part: str) -> bool:
    """Whether a file has an encoder or a head.

    Raises:
        FileNotFoundError, ValueError: as for :func:`read`.
    """
    return part in _open(path)[0]


def stored_dtype(path: Path) -> str:
    """What the encoder in a file was saved as.

    Raises:
        FileNotFoundError, ValueError: as for :func:`read`.
    """
    return _open(path)[0].get("dtype", "unknown")


def read(path: Path, part: str, spec_type: type[Spec], dtype: str) -> tuple[Spec, dict[str, Tensor]]:
    """The specification and weights of the encoder or head in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format or version, or holds less than what is asked for: bf16 where
            that is fp32, int8 where it is bf16.
    """
    check_dtype(dtype)
    metadata, file = _open(path)
    stored = metadata.get("dtype")
    # A head has no int8 weights, whatever the encoder beside it has.
    needed = {"fp32": ("fp32",), "bf16": ("fp32", "bf16"), "int8": ("fp32", "bf16", "int8")}[dtype]
    if stored not in needed and not (part == "head" and dtype == "bf16" and stored == "int8"):
        raise ValueError(f"{path} holds {stored} weights, {dtype} was asked for: load the {dtype} file instead")
    try:
        fields = dict(json.loads(metadata[part]))
        unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(spec_type)})
        if unknown:
            raise ValueError(f"this torch_ext does not know its fields {unknown}: update torch-ext")
        if fields.get("architecture") in _COUNTED_WITHOUT_PADDING:
            fields.setdefault("padding_id", fields["position_offset"] - 1)
        spec = spec_type(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no valid specification of the {part}: {error}") from error
    names: list[str] = file.keys()
    weights = {name: file.get_tensor(name) for name in names if name.startswith("head.") == (part == "head")}
    try:
        check_weights(spec, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return spec, weights
