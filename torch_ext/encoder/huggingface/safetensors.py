"""Files of safetensors, mapped: nothing is read but headers, until somebody looks at a weight."""

from __future__ import annotations

import json
import mmap
import os
import stat
import struct
import sys
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch_ext.encoder.places import encoder_files

__all__ = [
    "LFS_ADVICE",
    "WEIGHTS_FILE",
    "WEIGHTS_INDEX",
    "StoredTensor",
    "files_of_index",
    "find_weights",
    "is_lfs_pointer",
    "map_weights",
    "parse_object",
]

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

# Files that can hold code, or that other libraries read.
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")

_LFS_BEGINNING = b"version https://git-lfs"

LFS_ADVICE = "a pointer of Git LFS, not the file itself; run git lfs pull in the folder, or download the model again"
"""What to do about a file that git cloned without Git LFS."""

_MAX_HEADER_BYTES = 100_000_000  # as the format has it

_ELEMENT_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}

# The high bytes of elements with a full exponent, but for its last bit in fp32 and bf16.
_FULL_EXPONENT: Mapping[str, bytes] = {
    "F32": b"\x7f\xff",
    "F16": bytes((*range(0x7C, 0x80), *range(0xFC, 0x100))),
    "BF16": b"\x7f\xff",
}

_CHUNK_BYTES = 1 << 20


def is_lfs_pointer(data: bytes) -> bool:
    """Whether the content of a file is a pointer of Git LFS: three lines of text.

    Args:
        data: the content, or how it begins.
    """
    return data.startswith(_LFS_BEGINNING)


class StoredTensor(NamedTuple):
    """A weight in a mapped file.

    Attributes:
        dtype: as safetensors name it: ``F32``, ``F16``, ``BF16``, or one that no encoder has, such as ``I64``.
        shape: its sizes.
        data: its elements, row after row.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def mapped(self) -> bool:
        """Whether its elements are in the file, from which they can be read again."""
        return isinstance(self.data.obj, mmap.mmap)

    def forget(self) -> None:
        """Takes the pages of its file out of memory. They are read again when somebody looks at them."""
        if isinstance(self.data.obj, mmap.mmap):
            self.data.obj.madvise(mmap.MADV_DONTNEED)

    def rows(self, begin: int, end: int) -> StoredTensor:
        """Some of its rows, in the same memory."""
        row_bytes = len(self.data) // self.shape[0]
        return StoredTensor(self.dtype, (end - begin, *self.shape[1:]), self.data[begin * row_bytes : end * row_bytes])

    def shifted(self, by: float) -> StoredTensor:
        """Its elements plus a number, in fp32."""
        if self.dtype == "BF16":
            halves = memoryview(self.data.tobytes()).cast("H")
            numbers: Any = array("f", b"".join((half << 16).to_bytes(4, sys.byteorder) for half in halves))
        else:
            numbers = struct.unpack(
                f"<{len(self.data) // _ELEMENT_BYTES[self.dtype]}{'e' if self.dtype == 'F16' else 'f'}", self.data
            )
        return StoredTensor("F32", self.shape, memoryview(array("f", [number + by for number in numbers])).cast("B"))

    def is_finite(self) -> bool:
        """Whether all elements are neither NaN nor infinite; of a floating-point dtype.

        Looks for bytes that have most of an exponent, all of its bits set, by C loops of Python. What was read of the
        file does not stay in memory.
        """
        size = _ELEMENT_BYTES[self.dtype]
        for start in range(0, len(self.data), _CHUNK_BYTES):
            chunk = bytes(self.data[start : start + _CHUNK_BYTES])
            self.forget()
            high = chunk[size - 1 :: size]
            for byte in _FULL_EXPONENT[self.dtype]:
                place = high.find(byte)
                while place >= 0:
                    # The last bit of the exponent of fp32 and bf16 is in the byte before.
                    if self.dtype == "F16" or chunk[size * place + size - 2] & 0x80:
                        return False
                    place = high.find(byte, place + 1)
        return True


def find_weights(folder: Path) -> Path:
    """The file that says where a folder's weights are: the weights themselves, or an index of several files.

    Raises:
        FileNotFoundError: there are none.
        ValueError: there are none but in formats that are not read.
    """
    for name in (WEIGHTS_FILE, WEIGHTS_INDEX):
        if (folder / name).is_file():
            return folder / name
    for name in _OTHER_WEIGHTS:
        if (folder / name).exists():
            why = "a pickle, which can run code, and" if ".bin" in name else "of another format, and"
            raise ValueError(
                f"{folder / name}: expected weights in {WEIGHTS_FILE}: this file is {why} is not opened; convert it "
                "with transformers: model.save_pretrained(folder, safe_serialization=True)"
            )
    missing = f"{folder}: no weights (neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX})"
    if files := encoder_files(folder):
        missing += (
            f", but what python -m deploy export wrote: open {files[0]} by torch_ext.runtime.Encoder.open, or by "
            "torch_ext.Encoder.load"
        )
    raise FileNotFoundError(missing)


def files_of_index(index: Path, weight_map: object) -> list[Path]:
    """The files that an index of several names, in the order of their names; none outside of its own folder.

    Args:
        index: the file.
        weight_map: what it has under this name: names of files by those of weights.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: the index is damaged, or names files elsewhere.
    """
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected weight_map, an object that names files, got {weight_map!r:.80}")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ValueError(f"{index}: weight_map: expected names of files beside it, got {name!r:.200}; refused")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, though {index.name} names it; copy the model again")
    return files


def map_weights(path: Path) -> dict[str, StoredTensor]:
    """The weights of a file, or of all files of an index, by name.

    Args:
        path: what :func:`find_weights` returned.

    Raises:
        FileNotFoundError: there is no such file, or the index names one that is not there.
        ValueError: a file is damaged, or the index names files elsewhere, or weights that are not where it says.
        OSError: a file cannot be read.
    """
    if path.name != WEIGHTS_INDEX:
        return _map_file(path)
    places: Any = parse_object(path.read_bytes(), f"{path}").get("weight_map")
    files = {file.name: _map_file(file) for file in files_of_index(path, places)}
    weights = {}
    for weight, name in places.items():
        if weight not in files[name]:
            raise ValueError(
                f"{path.parent / name}: no {weight}, which {path.name} says is there; copy the model again"
            )
        weights[weight] = files[name][weight]
    return weights


def parse_object(text: bytes | memoryview, where: str) -> dict[str, Any]:
    """The JSON object that a file's content is.

    Args:
        text: the content.
        where: the file, for errors.

    Raises:
        ValueError: it is none, or a pointer of Git LFS.
    """
    if is_lfs_pointer(bytes(text[: len(_LFS_BEGINNING)])):
        raise ValueError(f"{where}: {LFS_ADVICE}")
    try:
        value = json.loads(bytes(text).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _map_file(path: Path) -> dict[str, StoredTensor]:
    def sound(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{path} is damaged, or is not a safetensors file: {what}; copy the model again")

    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        sound(stat.S_ISREG(status.st_mode), "it is no regular file")
        size = status.st_size
        sound(size >= 8, f"it has {size} bytes")
        data = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
    if is_lfs_pointer(bytes(data[: len(_LFS_BEGINNING)])):
        raise ValueError(f"{path}: {LFS_ADVICE}")
    header_bytes = int.from_bytes(data[:8], "little")
    sound(
        header_bytes <= min(size - 8, _MAX_HEADER_BYTES),
        f"its header of {header_bytes} bytes does not fit {size} bytes",
    )
    try:
        header = parse_object(data[8 : 8 + header_bytes], "its header")
    except ValueError as error:
        sound(False, str(error))
        raise
    data = data[8 + header_bytes :]
    weights, places = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                f"{path} is damaged, or is not a safetensors file: its header does not describe {name:.200}"
            ) from None
        sound(
            all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)) and begin <= end,
            f"its header does not describe {name:.200}",
        )
        sound(end <= len(data), f"{name} ends at byte {end} of {len(data)}")
        places.append((begin, end))
        bytes_ = _ELEMENT_BYTES.get(dtype)
        if bytes_ is not None:
            for number in shape:
                bytes_ *= number
            sound(bytes_ == end - begin, f"{name} {list(shape)} takes {bytes_} bytes, its place has {end - begin}")
        weights[name] = StoredTensor(dtype, shape, data[begin:end])
    covered = 0
    for begin, end in sorted(places):
        sound(begin == covered, f"its tensors leave a gap or overlap at byte {min(begin, covered)}")
        covered = end
    sound(covered == len(data), f"its tensors end at byte {covered} of {len(data)}")
    return weights
