"""Calls to be counted, run inside an emulator by ``instructions.py``: markers around each, after a warm-up."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = Callable[[], object]


def values(*shape: int) -> Any:
    """An fp32 tensor of small numbers. Random ones take minutes under emulation; counts do not depend on them."""
    import torch

    return torch.arange(torch.Size(shape).numel()).remainder_(29).sub_(14).float().mul_(0.004).view(shape)


class UnsupportedError(Exception):
    """What is asked for is not in the packages here; the message says what is missing."""


class TorchExt:
    """torch_ext in bf16, or with int8 weights."""

    warm_up = 1  # Two more would change counts by 9,000 instructions at most, in Python, and are minutes of emulation.

    def __init__(self, dtype: str) -> None:
        import torch_ext

        self.dtype = dtype
        self.module = torch_ext

    def linear(self, work: dict[str, Any]) -> Call:
        """A linear layer with bias: x bf16 [m, k], weight [n, k], result bf16 [m, n]."""
        import torch

        m, k, n = work["shape"]
        x, weight, bias = values(m, k).bfloat16(), values(n, k), values(n)
        name = "pack_linear_weight" if self.dtype == "bf16" else "pack_linear_weight_int8"
        if not hasattr(self.module, name):
            raise UnsupportedError(f"torch_ext has no {name}")
        packed, linear, activation = getattr(self.module, name)(weight), torch.ops.torch_ext.linear, work["activation"]
        return lambda: linear(x, packed, bias, activation)

    def encoder(self, work: dict[str, Any]) -> Call:
        """Encoder and mean pooling of one text; counts do not depend on the weights."""
        import torch

        shape = work["model"]
        spec = self.module.EncoderSpec(
            architecture="bert",
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden_size"],
            num_layers=shape["num_hidden_layers"],
            num_heads=shape["num_attention_heads"],
            intermediate_size=shape["intermediate_size"],
            activation="gelu",
            max_positions=512,
            position_offset=0,
            type_vocab_size=2,
            layer_norm_eps=1e-12,
        )
        weights = {name: values(*shape) for name, shape in spec.shapes().items()}
        if self.dtype == "int8":  # as Encoder.balanced() leaves them
            weights |= {name: values(*shape) for name, shape in spec.optional_shapes().items()}
        try:
            encoder = self.module.Encoder(spec, weights, self.dtype)
        except ValueError as error:
            raise UnsupportedError(str(error)) from error
        ids = torch.arange(work["tokens"])
        bounds = torch.tensor([0, work["tokens"]], dtype=torch.int32)
        return lambda: self.module.pool(encoder(ids, bounds), bounds, "mean", True)


class PyTorch:
    """PyTorch in eager mode: its own modules, no more Python around them than they need."""

    warm_up = 3

    def __init__(self, dtype: str) -> None:
        import torch

        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]

    def linear(self, work: dict[str, Any]) -> Call:
        """The same layer by F.linear, and F.gelu behind it."""
        from torch.nn import functional as F

        m, k, n = work["shape"]
        x, weight, bias = (values(*size).to(self.dtype) for size in ((m, k), (n, k), (n,)))
        if work["activation"] == "gelu":
            return lambda: F.gelu(F.linear(x, weight, bias))
        return lambda: F.linear(x, weight, bias)

    def encoder(self, work: dict[str, Any]) -> Call:
        """BERT, mean pooling and norm, one text without padding; attends in the way that takes fewer instructions."""
        import torch
        from torch import nn
        from torch.nn import functional as F

        shape = work["model"]
        hidden, wide, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if query.dtype == torch.bfloat16 and query.shape[-2] > 64:
                # MiniLM, 128 tokens: 278 million, 921 by scaled_dot_product_attention. 16 tokens: 119 and 78.
                return torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2), -1) @ value
            return F.scaled_dot_product_attention(query, key, value)

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
                self.up, self.down = nn.Linear(hidden, wide), nn.Linear(wide, hidden)
                self.norm1, self.norm2 = (nn.LayerNorm(hidden, eps=1e-12) for _ in range(2))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                parts = (
                    p(x).view(1, -1, heads, hidden // heads).transpose(1, 2) for p in (self.query, self.key, self.value)
                )
                mixed = attend(*parts).transpose(1, 2).reshape(x.shape)
                x = self.norm1(self.out(mixed) + x)
                return self.norm2(self.down(F.gelu(self.up(x))) + x)

        class Bert(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.word, self.position = nn.Embedding(shape["vocab_size"], hidden), nn.Embedding(512, hidden)
                self.kind, self.norm = nn.Embedding(2, hidden), nn.LayerNorm(hidden, eps=1e-12)
                self.layers = nn.ModuleList(Layer() for _ in range(shape["num_hidden_layers"]))

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                x = self.word(ids) + self.kind(torch.zeros_like(ids)) + self.position(torch.arange(ids.shape[1]))
                x = self.norm(x)
                for layer in self.layers:
                    x = layer(x)
                return F.normalize(x.mean(1).float(), dim=1)

        with torch.device("meta"):
            model = Bert().eval()
        state = {name: values(*parameter.shape).to(self.dtype) for name, parameter in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        ids = torch.arange(work["tokens"])[None]
        return lambda: model(ids)


class OnnxRuntime:
    """ONNX Runtime on a model that the host has written."""

    warm_up = 3

    def __init__(self, folder: Path, suffix: str, fast_math: bool) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise UnsupportedError("onnxruntime is not in the site") from error
        self.module = onnxruntime
        self.folder, self.suffix, self.fast_math = folder, suffix, fast_math

    def session(self, work: dict[str, Any]) -> Any:
        """A session with one thread."""
        options = self.module.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if self.fast_math:
            options.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "1")
        path = self.folder / f"{work['file']}{self.suffix}.onnx"
        return self.module.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def linear(self, work: dict[str, Any]) -> Call:
        """The same layer: fp32 in and out."""
        import numpy as np

        session = self.session(work)
        m, k, _ = work["shape"]
        feeds = {"x": np.random.default_rng(0).standard_normal((1, m, k), np.float32)}
        return lambda: session.run(None, feeds)

    def encoder(self, work: dict[str, Any]) -> Call:
        """The exported model, mean pooling and norm."""
        import numpy as np

        session = self.session(work)
        ids = np.random.default_rng(0).integers(0, work["model"]["vocab_size"], (1, work["tokens"]))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        feeds = {item.name: feeds[item.name] for item in session.get_inputs()}
        names = [session.get_outputs()[0].name]

        def call() -> object:
            pooled = session.run(names, feeds)[0].mean(axis=1)
            return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

        return call


def engine_of(name: str, folder: Path) -> Any:
    """The engine that a case names."""
    kind, dtype = name.rsplit(" ", 1)
    if kind == "torch_ext":
        return TorchExt(dtype)
    if kind == "PyTorch":
        return PyTorch(dtype)
    return OnnxRuntime(folder, "-int8" if dtype == "int8" else "", dtype == "bf16")


def count(markers: ctypes.CDLL, engine: Any, case: dict[str, Any]) -> str:
    """The last call of a case between markers; returns why it is not supported, if so."""
    try:
        call: Call = engine.encoder(case) if case["kind"] == "encoder" else engine.linear(case)
    except UnsupportedError as error:
        return str(error)
    for _ in range(engine.warm_up):
        call()
    start, stop = markers.marker_120, markers.marker_121
    start()
    call()
    stop()
    return ""


def in_child(function: Callable[[], str]) -> str:
    """What a function returns in a forked process, at whose end the emulator's plugins write their files."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, function().encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        returned = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        sys.exit(f"a case ended with {os.waitstatus_to_exitcode(status)}")
    return returned


def main() -> None:
    """Arguments: library of markers, folder of ONNX models, JSON list of cases of one engine, files that plugins write.

    Files of case N get ``.N`` behind their names. The last line of the output is a JSON object: what was not supported,
    by the index of the case, and versions.
    """
    markers = ctypes.CDLL(sys.argv[1])
    folder = Path(sys.argv[2])
    cases = json.loads(sys.argv[3])
    written = sys.argv[4:]
    name = cases[0]["engine"]
    if not name.startswith("ONNX"):
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        torch.inference_mode().__enter__()
    unsupported: dict[int, str] = {}
    try:
        engine = engine_of(name, folder)
    except UnsupportedError as error:
        unsupported = dict.fromkeys(range(len(cases)), str(error))
    else:
        for index, case in enumerate(cases):
            why = in_child(lambda case=case: count(markers, engine, case))
            if why:
                unsupported[index] = why
            for path in written:
                os.replace(path, f"{path}.{index}")
    versions = {
        name: str(sys.modules[name].__version__)
        for name in ("torch", "torch_ext", "onnxruntime", "numpy")
        if name in sys.modules
    }
    print(json.dumps({"unsupported": unsupported, "versions": {"python": sys.version.split()[0], **versions}}))


if __name__ == "__main__":
    main()
