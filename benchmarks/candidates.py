"""Ways to turn token ids into normalised mean embeddings: `torch_ext`, PyTorch, ONNX Runtime, with equal threads.

A candidate is given batches of token ids twice: `prepare` brings them into its form (padding, concatenating), which is
not timed, `run` computes embeddings from that, pooling and norm included.
"""

from __future__ import annotations

import copy
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import torch_ext

__all__ = ["ONNX_INT8", "OURS", "OURS_INT8", "PYTORCH_BF16", "PYTORCH_FP32", "Candidate", "load"]

OURS, OURS_INT8 = "torch_ext bf16", "torch_ext int8"
PYTORCH_BF16, PYTORCH_FP32, PYTORCH_COMPILE = "PyTorch bf16", "PyTorch fp32", "PyTorch bf16, compile"
ONNX_FP32, ONNX_INT8, ONNX_BF16 = "ONNX Runtime fp32", "ONNX Runtime int8", "ONNX Runtime bf16 fast math"

Ids = Sequence[Sequence[int]]


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
    """ONNX Runtime on what `deploy export` makes."""

    def __init__(self, name: str, path: Path, threads: int, pad_id: int, fast_math: bool = False) -> None:
        import onnxruntime

        from deploy.onnx_session import session_options

        self.name = name
        self._pad_id = pad_id
        options = session_options(threads)
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


def load(model: Any, folder: Path, threads: int, pad_id: int, compiled: bool) -> tuple[list[Candidate], dict[str, str]]:
    """All candidates that there can be on this machine.

    Args:
        model: of transformers, fp32, in evaluation mode.
        folder: empty, for the ONNX models; has to stay.
        threads: of every candidate.
        pad_id: token that fills shorter texts up.
        compiled: whether torch.compile takes part.

    Returns:
        The candidates, and why each of the others is left out.
    """
    from deploy.export.onnx_files import export_fp32, quantize_int8

    torch.set_num_threads(threads)
    found: list[Candidate] = [TorchExt(OURS, model, "bf16")]
    left_out: dict[str, str] = {}
    try:
        found.append(TorchExt(OURS_INT8, model, "int8"))
    except ValueError as error:
        left_out[OURS_INT8] = str(error)
    found.append(PyTorch(PYTORCH_BF16, model, torch.bfloat16, pad_id))
    found.append(PyTorch(PYTORCH_FP32, model, torch.float32, pad_id))
    if compiled:
        candidate = PyTorch(PYTORCH_COMPILE, model, torch.bfloat16, pad_id, compiled=True)
        begun = time.perf_counter()
        try:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for shape in ((3, 7), (1, 5), (2, 1)):
                    candidate.embed([[pad_id + 1] * shape[1]] * shape[0])
            print(f"torch.compile took {time.perf_counter() - begun:.0f} s", flush=True)
            found.append(candidate)
        except Exception as error:  # Compilers fail in many ways; the others can be measured without.
            left_out[PYTORCH_COMPILE] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    else:
        left_out[PYTORCH_COMPILE] = "not asked for (--compile)"

    fp32, int8 = folder / "model.onnx", folder / "model_int8.onnx"
    export_fp32(copy.deepcopy(model), "feature-extraction", folder / "work", fp32)
    quantize_int8(fp32, int8, folder / "work", model.config)
    found.append(OnnxRuntime(ONNX_FP32, fp32, threads, pad_id))
    found.append(OnnxRuntime(ONNX_INT8, int8, threads, pad_id))
    if platform.machine() == "aarch64":
        found.append(OnnxRuntime(ONNX_BF16, fp32, threads, pad_id, fast_math=True))
    else:
        left_out[ONNX_BF16] = f"for aarch64 only, this is {platform.machine()}"
    return found, left_out
