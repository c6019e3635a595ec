"""Kinds of ops in a model's time, as shares.

torch_ext runs an encoder as one op. Its parts are those of `torch_ext.Encoder.run_reference`, the same kernels op by
op: their shares are applied to the time of the whole. ONNX Runtime has a profiler of its own.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.bundle import Manifest, Variant
from deploy.engines.batch import Batch, Item, joined

__all__ = ["HOT", "shares"]

HOT = "products with weights"

_TORCH_EXT: Mapping[str, str] = {
    "linear": HOT,
    "varlen_attention": "attention",
    "embed": "embeddings",
    "norm": "norms",
    "rotary": "rotary positions",
    "gate": "gates",
}
"""Kinds by a part of an op's name; the first that fits."""

_ONNX: Mapping[str, str] = {
    "MatMulInteger": HOT,
    "DynamicQuantize": HOT,
    "MatMul": "products",
    "Gemm": "products",
    "Attention": "attention",
    "Softmax": "attention",
    "Gather": "embeddings",
    "Norm": "norms",
}


def shares(manifest: Manifest, variant: Variant, item: Item, threads: int, seconds: float) -> dict[str, float]:
    """Share of the model's time by kind of op.

    Args:
        manifest: The bundle, or what is known of a model's folder.
        variant: What runs it.
        item: Token ids of one text.
        threads: Threads of the engine.
        seconds: How long to measure.

    Returns:
        Shares that sum to 1, the largest first; nothing where that cannot be measured, as without torch.
    """
    try:
        if variant.engine == "onnxruntime":
            counted = _onnx(manifest.root / variant.file, item, threads, seconds)
        elif variant.engine == "torch":
            return {}  # A program has ops of any kind.
        else:
            counted = _torch_ext(manifest.root / variant.file, variant.dtype, item, threads, seconds)
    except ImportError:
        return {}
    total = sum(counted.values())
    return {kind: spent / total for kind, spent in sorted(counted.items(), key=lambda item: -item[1])} if total else {}


def _kind(name: str, kinds: Mapping[str, str]) -> str:
    return next((kind for part, kind in kinds.items() if part in name), "other")


def _torch_ext(path: Path, dtype: Any, item: Item, threads: int, seconds: float) -> dict[str, float]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from torch_ext import Encoder

    counted: dict[str, float] = defaultdict(float)

    class Clock(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Adds up the time of our ops by kind."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            start = time.perf_counter()
            result = func(*args, **(kwargs or {}))
            name = func._schema.name
            if name.startswith("torch_ext::"):
                counted[_kind(name, _TORCH_EXT)] += time.perf_counter() - start
            return result

    encoder = Encoder.from_pretrained(path, dtype) if path.is_dir() else Encoder.load(str(path), dtype)
    batch = Batch([item])
    ids = torch.frombuffer(joined(batch.ids), dtype=torch.int64)
    bounds = torch.frombuffer(batch.bounds(), dtype=torch.int32)
    typed = batch.types if encoder.spec.type_vocab_size > 1 else None
    types = None if typed is None else torch.frombuffer(joined(typed), dtype=torch.int64)
    attended = None if batch.attended is None else torch.tensor(batch.attended, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            encoder.run_reference(ids, bounds, types, attended=attended)
            end = time.perf_counter() + seconds
            while not counted or time.perf_counter() < end:
                with Clock():  # type: ignore[no-untyped-call]
                    encoder.run_reference(ids, bounds, types, attended=attended)
    finally:
        torch.set_num_threads(before)
    return counted


def _onnx(path: Path, item: Item, threads: int, seconds: float) -> dict[str, float]:
    import onnxruntime

    from deploy.engines.padded import padded
    from deploy.onnx_session import session_options

    ids, mask, types = padded(Batch([item]), 0)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        wanted = {entry.name for entry in session.get_inputs()}
        given = {name: value for name, value in feeds.items() if name in wanted}
        end = time.perf_counter() + seconds
        session.run(None, given)
        while time.perf_counter() < end:
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    counted: dict[str, float] = defaultdict(float)
    quantized = any("MatMulInteger" in str(event.get("args", {}).get("op_name")) for event in events)
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            kind = _kind(str(event["args"].get("op_name")), _ONNX)
            if kind == "products":
                # Products of activations stay in fp32 where those with weights are int8; else their names tell.
                attention = (
                    quantized or "attention/self/MatMul" in event["name"] or "/attention/MatMul" in event["name"]
                )
                kind = "attention" if attention else HOT
            counted[kind] += event["dur"]
    return counted
