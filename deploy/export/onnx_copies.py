"""ONNX models written with few copies of the model in memory.

To learn shapes, ONNX Runtime's quantizer copies the model, writes the copy, and loads that again, twice, while what it
began with stays in memory: five times the weights. Shapes follow from the graph without the weights.

torch's exporter makes one message of protobuf of the graph with all weights, a string of that, and reads the string
once more: three times the weights. Parts of a message may follow one another in a file, so the weights are written
behind the graph, one by one, from where they are; and read one by one, where `onnx.load` has the file beside the model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
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
        if tensor.ByteSize() <= _SMALL_BYTES:
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
    """Lets the quantizer learn shapes by `with_shapes`, read models by `load`, and round tensors in pieces."""
    import onnx
    from onnxruntime.quantization import base_quantizer, onnx_quantizer, quant_utils

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

    with (
        _replaced(base_quantizer, SHAPE_FUNCTION, with_shapes),
        _replaced(onnx_quantizer, SHAPE_FUNCTION, with_shapes),
        _replaced(quant_utils, ROUND_FUNCTION, in_pieces),
        _loading(),
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
def _loading() -> Iterator[None]:
    """Lets `onnx.load` read files by `load`."""
    import onnx

    before = onnx.load

    def replacement(path: Any, *arguments: Any, **named: Any) -> Any:
        if arguments or named.keys() > {"load_external_data"} or not isinstance(path, (str, os.PathLike)):
            return before(path, *arguments, **named)
        return load(Path(path), **named)

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
    import onnx

    model = onnx.ModelProto()
    with path.open("rb") as file:
        for part in _parts(file):
            read = onnx.ModelProto.FromString(part)
            for tensor in read.graph.initializer:
                if len(tensor.raw_data) > _SMALL_BYTES:
                    tensor.ClearField("raw_data")
            model.MergeFrom(read)
    return model.graph


def _parts(file: BinaryIO) -> Iterator[bytes]:
    """The fields of a message, each with its key. Of models they are numbers, texts and messages."""
    while key := _read_varint(file):
        number = _read_varint(file)
        length = (
            sum((byte & 127) << 7 * place for place, byte in enumerate(number)) if key[0] & 7 == _WITH_LENGTH else 0
        )
        yield b"".join((key, number, file.read(length)))


def _read_varint(file: BinaryIO) -> bytes:
    """What `_varint` writes; nothing at the end of the file."""
    result = file.read(1)
    while result and result[-1] > 127:
        result += file.read(1)
    return result


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
