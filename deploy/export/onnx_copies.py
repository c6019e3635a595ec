"""ONNX models written with few copies of the model in memory.

To learn shapes, ONNX Runtime's quantizer copies the model, writes the copy, and loads that again, twice, while what it
began with stays in memory: five times the weights. Shapes follow from the graph without the weights. And of each weight
it makes two copies to quantize it, which for an embedding table is most of the model: here the model has no weights,
which are mapped from its file.

torch's exporter makes one message of protobuf of the graph with all weights, a string of that, and reads the string
once more: three times the weights. Parts of a message may follow one another in a file, so the weights are written
behind the graph, one by one, from where they are; and read one by one, where `onnx.load` has the file beside the model.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = [
    "ROUND_FUNCTION",
    "SHAPE_FUNCTION",
    "WRITE_FUNCTIONS",
    "load",
    "load_graph",
    "one_copy",
    "streamed_weights",
    "weightless",
    "with_shapes",
]

SHAPE_FUNCTION = "save_and_reload_model_with_shape_infer"
"""A private name of the modules below: the quantizer has no option for it."""

ROUND_FUNCTION = "quantize_nparray"
"""A private name of `quant_utils`: it makes four copies of what it rounds, an embedding table for one."""

WRITE_FUNCTIONS = ("_export_onnx", "_export_file")
"""Private names of torch's exporter, a method of its graph and a function of `onnx_proto_utils`."""

_LARGEST_BYTES = 1_900_000_000
"""protobuf ends at 2 GiB: torch writes larger models with a file for each weight."""

_WITH_LENGTH = 2
"""The wire type of fields of protobuf whose length follows: texts, messages."""

_PIECE = 1 << 20
"""Numbers that are rounded at a time."""

_SMALL_BYTES = 4096
"""Constants that may be shapes."""


def with_shapes(model: Any) -> Any:
    """Adds the shapes of all values to an `onnx.ModelProto`, in place, and returns it."""
    import onnx
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    bare = onnx.ModelProto()
    bare.ir_version = model.ir_version
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    graph = bare.graph
    graph.name = model.graph.name
    for field in ("node", "input", "output"):
        getattr(graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _SMALL_BYTES and not _is_elsewhere(tensor):
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    inferred = onnx.shape_inference.infer_shapes(bare)
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)
    add_infer_metadata(model)
    return model


@contextlib.contextmanager
def one_copy() -> Iterator[None]:
    """Lets the quantizer learn shapes by `with_shapes`, read weights from the file, and round tensors in pieces."""
    import onnx
    from onnx import numpy_helper
    from onnxruntime.quantization import base_quantizer, onnx_quantizer, quant_utils
    from onnxruntime.quantization.onnx_model import ONNXModel

    round_all = getattr(quant_utils, ROUND_FUNCTION, None)
    kinds = {onnx.TensorProto.INT8: np.int8, onnx.TensorProto.UINT8: np.uint8}

    def in_pieces(kind: Any, array: Any, scale: Any, *rest: Any, **named: Any) -> Any:
        assert round_all is not None
        if array.ndim != 1 or np.size(scale) != 1 or array.size <= _PIECE or kind not in kinds:
            return round_all(kind, array, scale, *rest, **named)
        result = np.empty(array.size, kinds[kind])
        for begin in range(0, array.size, _PIECE):
            piece = slice(begin, begin + _PIECE)
            result[piece] = round_all(kind, array[piece], scale, *rest, **named)
        return result

    weights: dict[str, np.ndarray[Any, Any]] = {}
    to_array, save = numpy_helper.to_array, ONNXModel.save_model_to_file

    def read(path: Path, load_external_data: bool = True) -> Any:
        model, mapped = weightless(path)
        if any(map(_is_elsewhere, model.graph.initializer)) and not mapped:
            return load(path, load_external_data)
        weights.update(mapped)
        return model

    def array(tensor: Any, *rest: Any, **named: Any) -> Any:
        return weights[tensor.name] if _is_elsewhere(tensor) else to_array(tensor, *rest, **named)

    def save_filled(self: Any, *arguments: Any, **named: Any) -> None:
        for tensor in self.model.graph.initializer:
            if _is_elsewhere(tensor):
                tensor.ClearField("data_location")
                tensor.raw_data = weights[tensor.name].tobytes()
        save(self, *arguments, **named)

    with (
        _replaced(base_quantizer, SHAPE_FUNCTION, with_shapes),
        _replaced(onnx_quantizer, SHAPE_FUNCTION, with_shapes),
        _replaced(quant_utils, ROUND_FUNCTION, in_pieces),
        _replaced(numpy_helper, "to_array", array),
        _replaced(ONNXModel, "save_model_to_file", save_filled),
        _loading(read),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute, if there is one of that name."""
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _loading(read: Callable[..., Any] | None = None) -> Iterator[None]:
    """Lets `onnx.load` read files by `load`, or by `read`."""
    import onnx

    read = read or load

    before = onnx.load

    def replacement(path: Any, *arguments: Any, **named: Any) -> Any:
        if arguments or named.keys() > {"load_external_data"} or not isinstance(path, (str, os.PathLike)):
            return before(path, *arguments, **named)
        return read(Path(path), **named)

    with _replaced(onnx, "load", replacement):
        yield


def load(path: Path, load_external_data: bool = True) -> Any:
    """Reads an `onnx.ModelProto` with little more memory than it takes."""
    import onnx

    model = onnx.ModelProto()
    with path.open("rb") as file:
        for part in _parts(file):
            model.MergeFromString(part)
    if load_external_data:
        onnx.load_external_data_for_model(model, str(path.parent))
    return model


def load_graph(path: Path) -> Any:
    """Reads the graph of a model, with names, types and shapes of its weights instead of their values."""
    return weightless(path)[0].graph


class _Array(np.ndarray[Any, Any]):
    """An array whose flat form is a view of it."""

    def flatten(self, *order: Any) -> Any:
        return self.reshape(-1)


def weightless(path: Path) -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
    """Reads an `onnx.ModelProto` whose large weights stay in its file.

    Args:
        path: The file.

    Returns:
        The model, in which these weights are said to be elsewhere; and by name their values, mapped and read-only,
        without those of weights in a file beside the model.
    """
    import onnx

    places: dict[str, tuple[int, int]] = {}

    def stripped(file: BinaryIO, end: int, kind: Any, inner: Sequence[str]) -> bytes:
        """A message that ends at `end`, without the weights, which are in the fields `inner`, one in another."""
        number = kind.DESCRIPTOR.fields_by_name[inner[0]].number
        kinds = {"graph": onnx.GraphProto, "initializer": onnx.TensorProto}
        result = bytearray()
        while (start := file.tell()) < end:
            key, size = _value(_read_varint(file)), _value(_read_varint(file))
            begin = file.tell()
            stop = begin + size if key & 7 == _WITH_LENGTH else begin
            if key >> 3 != number or (inner == ["raw_data"] and size <= _SMALL_BYTES):
                file.seek(start)
                result += file.read(stop - start)
            elif inner == ["raw_data"]:
                places[""] = begin, size
                file.seek(stop)
            else:
                content = stripped(file, stop, kinds[inner[0]], inner[1:])
                if "" in places:
                    tensor = onnx.TensorProto.FromString(content)
                    places[tensor.name] = places.pop("")
                    tensor.data_location = onnx.TensorProto.EXTERNAL
                    content = tensor.SerializeToString()
                result += _key(kind, inner[0]) + _varint(len(content)) + content
        return bytes(result)

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        model = onnx.ModelProto.FromString(stripped(file, size, onnx.ModelProto, ["graph", "initializer", "raw_data"]))
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if places else None
    values: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in model.graph.initializer:
        if pages is not None and tensor.name in places:
            offset, length = places[tensor.name]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            flat = np.frombuffer(pages, dtype, length // dtype.itemsize, offset)
            values[tensor.name] = flat.reshape(tuple(tensor.dims)).view(_Array)
    return model, values


def _is_elsewhere(tensor: Any) -> bool:
    """Whether a model has no values of a weight."""
    return bool(tensor.data_location == type(tensor).EXTERNAL)


def _parts(file: BinaryIO) -> Iterator[bytes]:
    """The fields of a message, each with its key. Of models they are numbers, texts and messages."""
    while key := _read_varint(file):
        number = _read_varint(file)
        length = _value(number) if key[0] & 7 == _WITH_LENGTH else 0
        yield b"".join((key, number, file.read(length)))


def _read_varint(file: BinaryIO) -> bytes:
    """What `_varint` writes; nothing at the end of the file."""
    result = file.read(1)
    while result and result[-1] > 127:
        result += file.read(1)
    return result


def _value(number: bytes) -> int:
    """The number that `_varint` wrote."""
    return sum((byte & 127) << 7 * place for place, byte in enumerate(number))


@contextlib.contextmanager
def streamed_weights(written: Callable[[], object]) -> Iterator[None]:
    """Lets torch's exporter write weights one by one, and calls `written` after every file."""
    import torch
    from torch.onnx._internal.torchscript_exporter import onnx_proto_utils as utils

    graph: Any = torch._C.Graph
    method, function = WRITE_FUNCTIONS
    if not (hasattr(graph, method) and hasattr(utils, function)):
        yield
        return
    export, write_file = getattr(graph, method), getattr(utils, function)
    weights: dict[str, torch.Tensor] = {}

    def export_graph(self: Any, parameters: Mapping[str, torch.Tensor], *arguments: Any) -> tuple[Any, ...]:
        weights.clear()
        if sum(tensor.nbytes for tensor in parameters.values()) <= _LARGEST_BYTES:
            weights.update(parameters)
        # Without values, weights are inputs of the graph.
        return tuple(export(self, {} if weights else parameters, *arguments))

    def write(model: bytes, path: Any, parts: Mapping[str, bytes]) -> None:
        if weights:
            with open(path, "wb") as file:
                _write_with_weights(file, model, weights)
            weights.clear()
        else:
            write_file(model, path, parts)
        written()

    with _replaced(graph, method, export_graph), _replaced(utils, function, write), _loading():
        yield


def _write_with_weights(file: BinaryIO, serialized: bytes, weights: Mapping[str, Any]) -> None:
    """Writes a model, and behind it the weights that are inputs of it, as constants."""
    import onnx
    import torch

    model = onnx.load_model_from_string(serialized)
    constants = []
    for item in list(model.graph.input):
        if item.name in weights:
            elements = item.type.tensor_type.elem_type
            dims = list(weights[item.name].shape)
            constants.append(onnx.TensorProto(name=item.name, data_type=elements, dims=dims))
            model.graph.input.remove(item)
    file.write(model.SerializeToString())
    for constant in constants:
        values = weights[constant.name].detach().contiguous()
        head = constant.SerializeToString()
        tail = _key(onnx.TensorProto, "raw_data") + _varint(values.nbytes)
        size = len(head) + len(tail) + values.nbytes
        initializer = _key(onnx.GraphProto, "initializer") + _varint(size)
        graph = _key(onnx.ModelProto, "graph") + _varint(len(initializer) + size)
        file.write(b"".join((graph, initializer, head, tail)))
        file.write(memoryview(values.reshape(-1).view(torch.uint8).numpy()))


def _key(message: Any, field: str) -> bytes:
    """How protobuf marks a field whose length follows."""
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | _WITH_LENGTH)


def _varint(value: int) -> bytes:
    """A number, as protobuf writes it: 7 bits in a byte, the lowest first."""
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)
