"""Tensors of the Open Inference Protocol: in JSON, or in binary behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

from ..limits.bounds import exceeded
from .route import ApiError, encode
from .schemas import BOUND, bound

__all__ = [
    "HEADER_LENGTH",
    "InferInput",
    "InferOutput",
    "Tensor",
    "input_names",
    "marks_of",
    "read_texts",
    "split_body",
    "write_outputs",
]

HEADER_LENGTH = b"inference-header-content-length"
"""Header of a request or an answer whose JSON is followed by binary tensors: the length of the JSON."""

Parameters = dict[str, Any]


class InferInput(Struct):
    """A tensor of a request."""

    name: Annotated[str, bound("tensor name")]
    shape: Annotated[list[Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]], Meta(max_length=8)]
    datatype: Annotated[str, Meta(extra_json_schema={"const": "BYTES"})]
    data: Annotated[list[Any] | None, bound("tensor data")] = None
    parameters: Parameters | None = None


class InferOutput(Struct):
    """A tensor that is asked for."""

    name: Annotated[str, bound("output name")]
    parameters: Parameters | None = None


def input_names(task: str) -> list[str]:
    """Names of the tensors that a task takes."""
    return ["text", "text_pair"] if task in ("text-classification", "question-answering") else ["text"]


def marks_of(task: str, outputs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the OpenAPI document says of a task's tensors; that their shapes have to fit, a schema cannot say."""
    names = input_names(task)
    needed = names if task == "question-answering" else names[:1]
    text = {"type": "string", BOUND: {"fill-mask": "masked", "question-answering": "some text"}.get(task, "text")}
    rows = {"type": "array", "items": text}
    return {
        "tensors": {
            "minItems": len(needed),
            "maxItems": len(names),
            "allOf": [{"contains": {"properties": {"name": {"const": name}}}} for name in needed],
        },
        "tensor name": {"enum": names},
        "tensor data": {"anyOf": [rows, {"type": "array", "items": rows}, {"type": "null"}]},
        "output name": {"enum": list(outputs)},
    }


class Tensor:
    """A tensor of an answer.

    Attributes:
        name: Its name.
        datatype: `FP32` or `BYTES`.
        shape: Of all rows.
        values: About how many numbers and texts have to be written.
    """

    __slots__ = ("_rows", "datatype", "name", "shape", "values")

    def __init__(
        self, name: str, datatype: str, shape: Sequence[int], rows: Sequence[Any], values: int | None = None
    ) -> None:
        """Wraps.

        Args:
            name: Its name.
            datatype: `FP32`: rows are buffers of f32; `BYTES`: rows are lists of texts.
            shape: Of all rows.
            rows: One for each input.
            values: About how many numbers and texts have to be written; None: as many as the shape has.
        """
        self.name = name
        self.datatype = datatype
        self.shape = list(shape)
        self.values = math.prod(shape) if values is None else values
        self._rows = rows

    def json(self) -> bytes:
        """Its numbers or texts, without rows and without brackets."""
        of_row: Any = memoryview if self.datatype == "FP32" else list
        return b",".join([encode(of_row(row))[1:-1] for row in self._rows])

    def binary(self) -> bytes:
        """Its numbers in little-endian order, or its texts, each behind its length."""
        if self.datatype == "FP32":
            return b"".join(self._rows)
        texts = [text.encode() for row in self._rows for text in row]
        return b"".join(part for text in texts for part in (len(text).to_bytes(4, "little"), text))


def split_body(headers: Mapping[bytes, bytes], body: bytes) -> tuple[bytes, bytes]:
    """The JSON of a request, and the binary tensors behind it.

    Raises:
        ApiError: The header that tells where one ends is no such number.
    """
    told = headers.get(HEADER_LENGTH)
    if told is None:
        return body, b""
    if not (told.isdigit() and len(told) <= 12 and int(told) <= len(body)):
        raise ApiError(
            "invalid_request",
            f"Inference-Header-Content-Length: expected 0 to {len(body)}, the length of the body, got {told[:40]!r}",
        )
    return body[: int(told)], body[int(told) :]


def read_texts(inputs: Sequence[InferInput], tail: bytes, most: int) -> dict[str, list[str]]:
    """The texts of each input.

    Args:
        inputs: Of a request.
        tail: Its binary tensors, in the order of the inputs.
        most: How many texts an input may have.

    Raises:
        ApiError: An input is no list of texts, or differs from its shape.
    """
    found: dict[str, list[str]] = {}
    start = 0
    for given in inputs:
        where = f"input {given.name[:40]!r}"
        if given.datatype != "BYTES":
            raise ApiError("invalid_request", f"{where}: expected datatype BYTES, got {given.datatype[:20]}")
        count = math.prod(given.shape)
        if count > most:
            raise ApiError("too_large", exceeded("inputs", most, count, f"{where}: "))
        size = (given.parameters or {}).get("binary_data_size")
        if size is not None:
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(tail) - start:
                raise ApiError("invalid_request", f"{where}: expected {size} bytes, got {len(tail) - start}")
            texts = _texts(memoryview(tail)[start : start + size], count, where)
            start += size
        else:
            texts = _flat(given.data or [], where)
        if len(texts) != count:
            raise ApiError("invalid_request", f"{where}: expected {count} texts by its shape, got {len(texts)}")
        found[given.name] = texts
    if start != len(tail):
        raise ApiError("invalid_request", f"expected {start} bytes of binary tensors, got {len(tail)}")
    return found


def _flat(data: Sequence[Any], where: str) -> list[str]:
    texts: list[str] = []
    for item in data:
        if isinstance(item, list):
            texts += _flat(item, where)
        elif isinstance(item, str):
            texts.append(item)
        else:
            raise ApiError("invalid_request", f"{where}: expected texts, got {type(item).__name__}")
    return texts


def _texts(buffer: memoryview, count: int, where: str) -> list[str]:
    texts: list[str] = []
    start = 0
    while start < len(buffer) and len(texts) <= count:
        end = start + 4 + int.from_bytes(buffer[start : start + 4], "little")
        if start + 4 > len(buffer) or end > len(buffer):
            raise ApiError("invalid_request", f"{where}: a text is longer than the tensor")
        try:
            texts.append(str(buffer[start + 4 : end], "utf-8"))
        except UnicodeDecodeError:
            raise ApiError("invalid_request", f"{where}: expected UTF-8 in text {len(texts)}") from None
        start = end
    return texts


def write_outputs(body: dict[str, Any], tensors: Sequence[Tensor], binary: Sequence[bool]) -> tuple[bytes, int | None]:
    """The bytes of an answer.

    Args:
        body: The answer without `outputs`.
        tensors: Its outputs.
        binary: Which of them are sent in binary.

    Returns:
        The bytes, and the length of the JSON in them, where binary tensors follow it.
    """
    written = [encode(body)[:-1], b',"outputs":']
    parts: list[bytes] = []
    before = b"["
    for tensor, as_bytes in zip(tensors, binary, strict=True):
        output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if as_bytes:
            parts.append(tensor.binary())
            output["parameters"] = {"binary_data_size": len(parts[-1])}
            written += (before, encode(output))
        else:
            # Not encoded as a whole: that would hold the GIL.
            written += (before, encode(output)[:-1], b',"data":[', tensor.json(), b"]}")
        before = b","
    written.append(b"]}")
    return b"".join([*written, *parts]), sum(map(len, written)) if parts else None
