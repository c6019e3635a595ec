"""The ONNX variants: fp32 through optimum's exporter, int8 through its quantizer.

int8 is optimum's configuration for arm64: weights s8 symmetric per output channel, activations u8 per tensor, quantized
at run time. Products of activations with activations (attention scores and context) stay in fp32, as in ONNX Runtime's
own dynamic quantization: one scale for all probabilities of a batch costs accuracy, and they are little of the work.
"""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bundle import TASKS, VARIANTS
from deploy.engines.batch import Batch
from deploy.engines.padded import padded
from deploy.export.errors import ExportError, first_line, is_disk_full
from deploy.export.onnx_copies import load, load_graph, one_copy, streamed_weights
from deploy.heap import give_back
from deploy.onnx_session import session_options
from deploy.tasks import Task

__all__ = ["SHARES_IN_FP32", "export_fp32", "files_of", "quantize_int8", "sensitive_nodes", "variant_bytes"]

_EXTERNAL_FROM_BYTES = 1_900_000_000
"""protobuf ends at 2 GiB; larger models keep their weights in a file of their own."""


SHARES_IN_FP32 = (0.0, 0.1, 0.25, 0.5)
"""How many of the layers int8 leaves in fp32, the most sensitive ones first, one try after the other."""


def files_of(folder: Path, name: str) -> list[Path]:
    """Files of a variant, its weights file first."""
    file = VARIANTS[name].file
    extra = [folder / f"{file}_data", folder / f"{file}.data"]
    return [folder / file, *(path for path in extra if path.exists())]


def variant_bytes(folder: Path, name: str) -> int:
    """Size of a variant's files."""
    return sum(path.stat().st_size for path in files_of(folder, name))


def export_fp32(
    model: Any,
    task: str,
    work: Path,
    target: Path,
    written: Callable[[], object] = give_back,
    *,
    token_types: bool = False,
) -> None:
    """Writes a loaded model of transformers as ONNX.

    Args:
        model: In evaluation mode, fp32.
        task: One of the bundle's tasks.
        work: Empty folder for what optimum writes beside it.
        target: Path of the file.
        written: Called when weights have been read, and when all are written.
        token_types: Whether the model is given the token types of pairs.

    Raises:
        ExportError: optimum does not write this model, or not with the inputs and outputs that the server expects.
    """
    kind = TASKS[task]
    try:
        _export_fp32(model, kind, work, target, written, token_types and kind.answers_pairs and _reads_types(model))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _reads_types(model: Any) -> bool:
    """Whether token types change what a model of transformers answers."""
    taken = "token_type_ids" in inspect.signature(model.forward).parameters
    return taken and getattr(model.config, "type_vocab_size", 2) > 1


def _export_fp32(
    model: Any, kind: type[Task], work: Path, target: Path, written: Callable[[], object], needs_types: bool
) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    try:
        with streamed_weights(written):
            onnx_export_from_model(
                model, output=work, task=kind.optimum_task, do_validation=False, monolith=True, device="cpu"
            )
    except Exception as error:  # Whatever tracing a model raises.
        if is_disk_full(error) or isinstance(error, (OSError, MemoryError)):
            raise
        raise ExportError(f"optimum cannot write this model as ONNX: {first_line(error)}") from error
    written()
    graph = load_graph(work / "model.onnx")
    inputs = {item.name for item in graph.input}
    if not {"input_ids", "attention_mask"} <= inputs <= {"input_ids", "attention_mask", "token_type_ids"}:
        raise ExportError(f"optimum wrote an ONNX model with inputs {sorted(inputs)}, which the server cannot feed")
    if needs_types and "token_type_ids" not in inputs:
        raise ExportError("optimum wrote an ONNX model without token types, which this model reads pairs of texts by")
    names = tuple(item.name for item in graph.output[: len(kind.onnx_outputs)])
    if names != kind.onnx_outputs:
        raise ExportError(
            f"optimum wrote an ONNX model with outputs {', '.join(names)}, expected {', '.join(kind.onnx_outputs)}"
        )
    if (work / "model.onnx_data").exists():  # The name is written in the model, so it stays.
        (work / "model.onnx_data").rename(target.parent / "model.onnx_data")
    (work / "model.onnx").rename(target)


def _products(path: Path) -> tuple[list[Any], list[Any]]:
    """Products with weights, and products of activations, of an ONNX model."""
    graph = load_graph(path)
    constant = {item.name for item in graph.initializer}
    # A tied output layer multiplies by the transposed embedding table.
    constant |= {
        node.output[0]
        for node in graph.node
        if node.op_type in {"Transpose", "Identity", "Cast"} and all(name in constant for name in node.input)
    }
    products = [node for node in graph.node if node.op_type in {"MatMul", "Gemm"}]
    return (
        [node for node in products if any(name in constant for name in node.input[:2])],
        [node for node in products if not any(name in constant for name in node.input[:2])],
    )


def quantize_int8(source: Path, target: Path, work: Path, config: Any, keep_fp32: Collection[str] = ()) -> int:
    """Writes the int8 model.

    Args:
        source: The fp32 model.
        target: Path of the int8 model.
        work: Folder for what optimum writes beside it; removed.
        config: The model's configuration in transformers.
        keep_fp32: Names of further nodes that are not quantized.

    Returns:
        How many products with weights there are.
    """
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    layers, attention = _products(source)
    settings = AutoQuantizationConfig.arm64(
        is_static=False, per_channel=True, nodes_to_exclude=[*(node.name for node in attention), *keep_fp32]
    )
    external = _weight_bytes(source) > 4 * _EXTERNAL_FROM_BYTES
    quantizer = ORTQuantizer(source, config=config)
    with one_copy():
        quantizer.quantize(settings, save_dir=work, file_suffix="int8", use_external_data_format=external)
    written = work / f"{source.stem}_int8.onnx"
    data = work / f"{written.name}.data"
    if data.exists():
        data.rename(target.parent / data.name)
    written.rename(target)
    shutil.rmtree(work)
    return len(layers)


def _weight_bytes(path: Path) -> int:
    return path.stat().st_size + sum(item.stat().st_size for item in path.parent.glob("model.onnx_data"))


def sensitive_nodes(path: Path, batch: Batch, pad_id: int, threads: int) -> list[str]:
    """Products with weights, those first whose input loses most by 8 bits.

    The input of every product is recorded on real text. With one scale per tensor, an outlier widens the step for all
    other values; what is lost is `step / sqrt(12)` beside the root mean square of the values.

    Args:
        path: The fp32 model.
        batch: A few texts.
        pad_id: Padding id.
        threads: Threads of the session.

    Returns:
        Names of nodes.
    """
    import onnx
    import onnxruntime

    layers, _ = _products(path)
    model = load(path)
    constant = {item.name for item in model.graph.initializer}
    known = {item.name for item in model.graph.output}
    recorded = {node.name: next(name for name in node.input[:2] if name not in constant) for node in layers}
    for name in sorted(set(recorded.values()) - known):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    probe = path.with_name(f".probe-{path.name}")
    try:
        onnx.save(model, probe, save_as_external_data=model.ByteSize() > _EXTERNAL_FROM_BYTES)
        del model
        session = onnxruntime.InferenceSession(str(probe), session_options(threads), providers=["CPUExecutionProvider"])
        ids, mask, types = padded(batch, pad_id)
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        names = {item.name for item in session.get_inputs()}
        tensors = sorted(set(recorded.values()))
        values: Sequence[Any] = session.run(tensors, {name: feeds[name] for name in names})
        loss = {}
        for name, value in zip(tensors, values, strict=True):
            size = math.sqrt(float(np.mean(np.square(value, dtype=np.float64))))
            step = (max(float(value.max()), 0.0) - min(float(value.min()), 0.0)) / 255
            loss[name] = step / math.sqrt(12) / size if size > 0 else 0.0
    finally:
        for item in path.parent.glob(f"{probe.name}*"):
            item.unlink()
    return [node for node, name in sorted(recorded.items(), key=lambda pair: -loss[pair[1]])]
