"""With few copies of the model in memory, exporter and quantizer write what they write with several."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from deploy.export import onnx_copies, write_onnx
from deploy.export.mapped import keep_little
from deploy.export.progress import quiet_libraries
from deploy.heap import give_back
from deploy.onnx_session import session_options


class _Small(torch.nn.Module):
    """Has weights of several types and ranks, and one that is transposed, which the exporter does itself."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(300, 40, generator=generator))
        self.inner = torch.nn.Linear(40, 8)
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.register_buffer("order", torch.arange(8).flip(0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.inner(self.table[ids]) * self.scale)[..., self.order]


def _write(model: torch.nn.Module, path: Path) -> None:
    names: Any = {"input_names": ["ids"], "dynamic_axes": {"ids": {0: "texts"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.arange(6).view(2, 3),), str(path), dynamo=False, **names)


def test_weights_are_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.torchscript_exporter import onnx_proto_utils

    # Where these names go, the exporter is back at three copies.
    method, function = onnx_copies.WRITE_FUNCTIONS
    assert hasattr(torch._C.Graph, method)
    assert hasattr(onnx_proto_utils, function)
    model = _Small().eval()
    _write(model, tmp_path / "usual.onnx")
    sizes: list[int] = []
    original = getattr(onnx_proto_utils, function)
    monkeypatch.setattr(onnx_proto_utils, function, lambda *arguments: sizes.append(-1) or original(*arguments))
    with onnx_copies.streamed_weights(lambda: sizes.append((tmp_path / "streamed.onnx").stat().st_size)):
        _write(model, tmp_path / "streamed.onnx")
    assert len(sizes) == 1
    assert sizes[0] > model.table.nbytes
    _assert_same_graph(*(onnx.load(tmp_path / f"{name}.onnx").graph for name in ("streamed", "usual")))
    # Too large for one message: as without.
    monkeypatch.setattr(onnx_copies, "_LARGEST_BYTES", 100)
    with onnx_copies.streamed_weights(lambda: None):
        _write(model, tmp_path / "large.onnx")
    assert sizes[1:] == [-1]
    assert (tmp_path / "large.onnx").read_bytes() == (tmp_path / "usual.onnx").read_bytes()

    ids = np.array([[1, 2, 299]])
    path = str(tmp_path / "streamed.onnx")
    session = onnxruntime.InferenceSession(path, session_options(1), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"ids": ids})
    np.testing.assert_allclose(found, model(torch.from_numpy(ids)).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_models_are_read_part_by_part(tmp_path: Path) -> None:
    model = _Small().eval()
    _write(model, tmp_path / "usual.onnx")
    with onnx_copies.streamed_weights(lambda: None):
        _write(model, tmp_path / "streamed.onnx")
        # What reads models meanwhile reads them so.
        assert onnx.load(str(tmp_path / "usual.onnx")) == onnx_copies.load(tmp_path / "usual.onnx")
    for name in ("usual", "streamed"):
        expected = onnx.load(tmp_path / f"{name}.onnx")
        assert onnx_copies.load(tmp_path / f"{name}.onnx") == expected
        graph = onnx_copies.load_graph(tmp_path / f"{name}.onnx")
        assert list(graph.node) == list(expected.graph.node)
        assert [item.dims for item in graph.initializer] == [item.dims for item in expected.graph.initializer]
        assert max(len(item.raw_data) for item in graph.initializer) < model.table.nbytes
    onnx.save(onnx.load(tmp_path / "usual.onnx"), tmp_path / "parts.onnx", save_as_external_data=True, location="data")
    weights = {item.name: item for item in onnx_copies.load(tmp_path / "parts.onnx").graph.initializer}
    table = next(item for item in weights.values() if list(item.dims) == [300, 40])
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(table), model.table.detach().numpy())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


def test_one_copy_gives_the_same_model(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.quantization import base_quantizer, onnx_quantizer, quant_utils

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
    assert hasattr(quant_utils, onnx_copies.ROUND_FUNCTION)
    monkeypatch.setattr(onnx_copies, "_PIECE", 100)
    write_onnx.quantize_int8(fp32, tmp_path / "one.onnx", tmp_path / "int8.tmp", config)
    assert not copied
    assert getattr(onnx_quantizer, onnx_copies.SHAPE_FUNCTION) is watched
    monkeypatch.setattr(write_onnx, "one_copy", contextlib.nullcontext)
    write_onnx.quantize_int8(fp32, tmp_path / "several.onnx", tmp_path / "int8.tmp", config)
    assert copied

    _assert_same_graph(*(onnx.load(tmp_path / name).graph for name in ("one.onnx", "several.onnx")))


def test_weights_stay_in_the_file(tmp_path: Path) -> None:
    _write(_Small().eval(), tmp_path / "usual.onnx")
    expected = onnx.load(tmp_path / "usual.onnx")
    model, weights = onnx_copies.weightless(tmp_path / "usual.onnx")
    (name,) = [item.name for item in expected.graph.initializer if list(item.dims) == [300, 40]]
    assert list(weights) == [name]
    assert not weights[name].flags.writeable
    assert np.shares_memory(weights[name], weights[name].flatten())
    for one, other in zip(model.graph.initializer, expected.graph.initializer, strict=True):
        if one.name == name:
            one.ClearField("data_location")
            one.raw_data = weights[name].tobytes()
        assert one == other
    assert model == expected
    # Weights in another file are not read: neither are they told from others.
    onnx.save(expected, tmp_path / "parts.onnx", save_as_external_data=True, location="data", size_threshold=4096)
    model, weights = onnx_copies.weightless(tmp_path / "parts.onnx")
    assert not weights
    with onnx_copies.one_copy():
        assert onnx.load(str(tmp_path / "parts.onnx")) == onnx_copies.load(tmp_path / "parts.onnx")


def test_an_embedding_table_is_not_copied_to_quantize_it(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    table = generator.standard_normal((80_000, 128), np.float32)
    weight = generator.standard_normal((128, 128), np.float32)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Gather", ["table", "ids"], ["rows"], "gather"),
            onnx.helper.make_node("MatMul", ["rows", "weight"], ["out"], "matmul"),
        ],
        "graph",
        [info("ids", onnx.TensorProto.INT64, ["tokens"])],
        [info("out", onnx.TensorProto.FLOAT, ["tokens", 128])],
        [onnx.numpy_helper.from_array(table, "table"), onnx.numpy_helper.from_array(weight, "weight")],
    )
    fp32, int8 = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), fp32)
    size = table.nbytes
    del graph, table
    config = transformers.BertConfig()
    keep_little()

    give_back()
    before, peak, over = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, _anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        write_onnx.quantize_int8(fp32, int8, tmp_path / "int8.tmp", config)
    finally:
        over.set()
        thread.join()
    assert int8.stat().st_size < 0.3 * size
    # What is written has a quarter of the size, and is there as an array, as bytes, in the model and as its message.
    assert peak < 1.3 * size, f"{peak / size:.2f} times the size"


def _anonymous_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10


def _assert_same_graph(one: Any, several: Any) -> None:
    for field in ("node", "input", "output"):
        assert list(getattr(one, field)) == list(getattr(several, field))
    weights = [{item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer} for graph in (one, several)]
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name], err_msg=name)
