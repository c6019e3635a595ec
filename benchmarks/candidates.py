"""Ways to turn token ids into normalised mean embeddings: `torch_ext`, PyTorch, ONNX Runtime, with equal threads.

A candidate is given batches of token ids twice: `prepare` brings them into its form (padding, concatenating), which is
not timed, `run` computes embeddings from that, pooling and norm included.
"""

from __future__ import annotations

import copy
import math
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import torch_ext
from benchmarks.bounded import Guard
from benchmarks.timing import interleaved

__all__ = [
    "ONNX_FP32",
    "ONNX_INT8",
    "OURS",
    "OURS_FP32",
    "OURS_INT8",
    "PYTORCH_BF16",
    "PYTORCH_FP32",
    "TRIAL_S",
    "Candidate",
    "load",
]

OURS, OURS_INT8, OURS_FP32 = "torch_ext bf16", "torch_ext int8", "torch_ext fp32"
PYTORCH_BF16, PYTORCH_FP32, PYTORCH_COMPILE = "PyTorch bf16", "PyTorch fp32", "PyTorch bf16, compile"
ONNX_FP32, ONNX_INT8, ONNX_BF16 = "ONNX Runtime fp32", "ONNX Runtime int8", "ONNX Runtime bf16 fast math"
# What may fail without an end to the benchmark.
OPTIONAL = (OURS_INT8, PYTORCH_COMPILE)

Ids = Sequence[Sequence[int]]

# A candidate is stopped if it takes longer to load, and if one short text does.
LOAD_S = 60.0
TRIAL_S = 20.0
# How long torch.compile may take.
COMPILE_S = 120.0
# PyTorch's bf16 counts as emulated if it takes so many times as long as its fp32.
EMULATED = 3


class Candidate:
    """One way.

    Attributes:
        name: in tables.
        pads: whether the texts of a batch become equally long.
    """

    name: str
    pads = True

    def prepare(self, ids: Ids) -> Any:
        """A batch in the form that :meth:`run` takes."""
        raise NotImplementedError

    def run(self, batch: Any) -> Any:
        """Embeddings ``[texts, hidden]``, normalised."""
        raise NotImplementedError

    def embed(self, ids: Ids) -> np.ndarray:
        """Embeddings f32 ``[texts, hidden]`` of token ids."""
        result = self.run(self.prepare(ids))
        return np.asarray(result.float().numpy() if isinstance(result, torch.Tensor) else result, np.float32)


def _padded(ids: Ids, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, ids))
    table, mask = np.full((len(ids), longest), pad_id, np.int64), np.zeros((len(ids), longest), np.int64)
    for row, text in enumerate(ids):
        table[row, : len(text)], mask[row, : len(text)] = text, 1
    return table, mask


class TorchExt(Candidate):
    """The encoder of torch_ext, without padding."""

    pads = False

    def __init__(self, name: str, model: Any, dtype: Any) -> None:
        """Packs the weights of a model of transformers.

        Raises:
            ValueError: this torch_ext does not know the dtype.
        """
        self.name = name
        self._encoder = torch_ext.Encoder.from_transformers(model, dtype=dtype)

    def prepare(self, ids: Ids) -> Any:
        """See `Candidate.prepare`."""
        bounds = np.concatenate([[0], np.cumsum([len(text) for text in ids])]).astype(np.int32)
        return torch.tensor([token for text in ids for token in text]), torch.from_numpy(bounds)

    def run(self, batch: Any) -> Any:
        """See `Candidate.run`."""
        tokens, bounds = batch
        return torch_ext.pool(self._encoder(tokens, bounds), bounds, mode="mean", normalize=True)


class PyTorch(Candidate):
    """A model of transformers as it is, in eager mode or compiled."""

    def __init__(self, name: str, model: Any, dtype: torch.dtype, pad_id: int, compiled: bool = False) -> None:
        self.name = name
        self._pad_id = pad_id
        self._model = copy.deepcopy(model).to(dtype)
        self._forward: Callable[..., Any] = self._embed
        if compiled:
            import torch._inductor.config as inductor

            # Weights packed ahead: its best on x86-64. On aarch64 it falls to reference kernels then.
            inductor.freezing = platform.machine() == "x86_64"
            self._forward = torch.compile(self._embed, dynamic=True)

    def _embed(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        # Not divided by the count: the norm takes that away.
        return F.normalize((hidden * mask[..., None].to(hidden.dtype)).sum(1).float(), dim=1)

    def prepare(self, ids: Ids) -> Any:
        """See `Candidate.prepare`."""
        return tuple(map(torch.from_numpy, _padded(ids, self._pad_id)))

    def run(self, batch: Any) -> Any:
        """See `Candidate.run`."""
        return self._forward(*batch)


class OnnxRuntime(Candidate):
    """ONNX Runtime on what `deploy export` makes, with its default kernels: without VNNI, int8 products saturate."""

    def __init__(self, name: str, path: Path, threads: int, pad_id: int, fast_math: bool = False) -> None:
        import onnxruntime

        self.name = name
        self._pad_id = pad_id
        from deploy.onnx_session import session_options

        options = session_options(threads, exact=False)  # the server's make int8 exact
        if fast_math:
            options.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "1")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._output = [self._session.get_outputs()[0].name]

    def prepare(self, ids: Ids) -> Any:
        """See `Candidate.prepare`."""
        table, mask = _padded(ids, self._pad_id)
        feeds = {"input_ids": table, "attention_mask": mask, "token_type_ids": np.zeros_like(table)}
        return {name: feeds[name] for name in self._inputs}, mask[:, None, :].astype(np.float32)

    def run(self, batch: Any) -> Any:
        """See `Candidate.run`."""
        feeds, mask = batch
        pooled = (mask @ self._session.run(self._output, feeds)[0])[:, 0]
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def load(
    model: Any,
    folder: Path,
    threads: int,
    pad_id: int,
    compiled: bool,
    guard: Guard | None = None,
    left_out: Mapping[str, str] | None = None,
) -> tuple[list[Candidate], dict[str, str]]:
    """All candidates that there can be on this machine. Each has embedded one short text when this returns.

    Args:
        model: of transformers, fp32, in evaluation mode.
        folder: empty, for the ONNX models; has to stay.
        threads: of every candidate.
        pad_id: token that fills shorter texts up.
        compiled: whether torch.compile takes part.
        guard: stops a candidate that does not finish that text.
        left_out: candidates not to try, and why.

    Returns:
        The candidates, and why each of the others is left out.
    """
    from deploy.export.write_onnx import export_fp32, quantize_int8

    torch.set_num_threads(threads)
    guard = guard or Guard()
    left_out = dict(left_out or {})
    found: list[Candidate] = []

    def add(name: str, make: Callable[[], Candidate], limit_s: float = TRIAL_S, shapes: Any = ((1, 16),)) -> None:
        if name in left_out:
            return
        try:
            with guard.limit(name, LOAD_S):
                candidate = make()
            with (
                guard.limit(name, limit_s, sum(texts for texts, _ in shapes)),
                torch.inference_mode(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                for texts, tokens in shapes:
                    candidate.embed([[pad_id + 1] * tokens] * texts)
        except Exception as error:  # Compilers fail in many ways; the others can be measured without.
            left_out[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            if name not in OPTIONAL:
                raise
        else:
            found.append(candidate)

    for name, dtype in ((OURS, "bf16"), (OURS_INT8, "int8"), (OURS_FP32, "fp32")):
        add(name, lambda name=name, dtype=dtype: TorchExt(name, model, dtype))  # type: ignore[misc]
    add(PYTORCH_BF16, lambda: PyTorch(PYTORCH_BF16, model, torch.bfloat16, pad_id))
    add(PYTORCH_FP32, lambda: PyTorch(PYTORCH_FP32, model, torch.float32, pad_id))
    if not compiled:
        left_out.setdefault(PYTORCH_COMPILE, "not asked for (--compile)")
    elif PYTORCH_BF16 in left_out or _is_emulated(found, pad_id):
        left_out.setdefault(PYTORCH_COMPILE, "PyTorch's products in bf16 are emulated on this CPU, compiled or not")
    else:
        begun = time.perf_counter()
        add(
            PYTORCH_COMPILE,
            lambda: PyTorch(PYTORCH_COMPILE, model, torch.bfloat16, pad_id, compiled=True),
            COMPILE_S,
            ((3, 7), (1, 5), (2, 1)),
        )
        print(f"torch.compile took {time.perf_counter() - begun:.0f} s", flush=True)

    fp32, int8 = folder / "model.onnx", folder / "model_int8.onnx"
    export_fp32(copy.deepcopy(model), "feature-extraction", folder / "work", fp32)
    quantize_int8(fp32, int8, folder / "work", model.config)
    add(ONNX_FP32, lambda: OnnxRuntime(ONNX_FP32, fp32, threads, pad_id))
    add(ONNX_INT8, lambda: OnnxRuntime(ONNX_INT8, int8, threads, pad_id))
    if platform.machine() == "aarch64":
        add(ONNX_BF16, lambda: OnnxRuntime(ONNX_BF16, fp32, threads, pad_id, fast_math=True))
    else:
        left_out[ONNX_BF16] = f"for aarch64 only, this is {platform.machine()}"
    return found, left_out


def _is_emulated(candidates: Sequence[Candidate], pad_id: int) -> bool:
    """Whether PyTorch's bf16 is many times slower than its fp32."""
    took_s = {}
    for candidate in candidates:
        if candidate.name in (PYTORCH_BF16, PYTORCH_FP32):
            batch = candidate.prepare([[pad_id + 1] * 64])
            with torch.inference_mode():
                found = interleaved({"": lambda candidate=candidate, batch=batch: candidate.run(batch)}, 2)
            took_s[candidate.name] = found[""].least_s
    return took_s.get(PYTORCH_BF16, 0.0) > EMULATED * took_s.get(PYTORCH_FP32, math.inf)
