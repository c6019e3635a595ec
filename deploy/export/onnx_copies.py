"""ONNX Runtime's quantizer with one copy of the model in memory.

To learn shapes it copies the model, writes the copy, and loads that again, twice, while what it began with stays in
memory: five times the weights. Shapes follow from the graph without the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["SHAPE_FUNCTION", "one_copy", "with_shapes"]

SHAPE_FUNCTION = "save_and_reload_model_with_shape_infer"
"""A private name of the modules below: the quantizer has no option for it."""

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
    """Lets the quantizer learn shapes by `with_shapes`."""
    from onnxruntime.quantization import base_quantizer, onnx_quantizer

    modules: tuple[Any, ...] = (base_quantizer, onnx_quantizer)
    before = [(module, getattr(module, SHAPE_FUNCTION)) for module in modules if hasattr(module, SHAPE_FUNCTION)]
    try:
        for module, _ in before:
            setattr(module, SHAPE_FUNCTION, with_shapes)
        yield
    finally:
        for module, function in before:
            setattr(module, SHAPE_FUNCTION, function)
