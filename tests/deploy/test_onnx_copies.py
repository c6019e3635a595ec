"""The quantizer with one copy of the model writes what it writes with several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import transformers

from deploy.export import onnx_copies, write_onnx
from deploy.export.progress import quiet_libraries


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


def test_one_copy_gives_the_same_model(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.quantization import base_quantizer, onnx_quantizer

    folder = tiny_model()
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    fp32 = tmp_path / "model.onnx"
    write_onnx.export_fp32(model, "feature-extraction", tmp_path / "work", fp32)

    # Where these names go, the quantizer is back at five copies.
    functions = [getattr(module, onnx_copies.SHAPE_FUNCTION) for module in (base_quantizer, onnx_quantizer)]
    copied: list[Any] = []

    def watched(model: Any) -> Any:
        copied.append(model)
        return functions[0](model)

    monkeypatch.setattr(base_quantizer, onnx_copies.SHAPE_FUNCTION, watched)
    monkeypatch.setattr(onnx_quantizer, onnx_copies.SHAPE_FUNCTION, watched)
    write_onnx.quantize_int8(fp32, tmp_path / "one.onnx", tmp_path / "int8.tmp", config)
    assert not copied
    assert getattr(onnx_quantizer, onnx_copies.SHAPE_FUNCTION) is watched
    monkeypatch.setattr(write_onnx, "one_copy", contextlib.nullcontext)
    write_onnx.quantize_int8(fp32, tmp_path / "several.onnx", tmp_path / "int8.tmp", config)
    assert copied

    one, several = (onnx.load(tmp_path / name).graph for name in ("one.onnx", "several.onnx"))
    assert list(one.node) == list(several.node)
    weights = [{item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer} for graph in (one, several)]
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name], err_msg=name)
