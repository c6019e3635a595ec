"""ONNX Runtime: texts of similar length are padded to the longest of them and run together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ..bundle import BundleError
from ..onnx_session import session_options
from ..tasks import Task
from .padded import PaddedEngine, PaddedIds
from .pooling import Floats

__all__ = ["OnnxEngine"]

_TOKENS_PER_THREAD = 512
"""Tokens that run together, with padding; a single text may have more.

Each operator writes its output for all of them before the next one reads it. MiniLM on AMD Zen 5, 1 and 2 threads,
texts of 64 and 128 tokens: 512 for each thread take 0.79 to 0.93 of the time that 4,096 at once take, in fp32 and int8,
and less memory.
"""


class OnnxEngine(PaddedEngine):
    """Runs an ONNX model.

    Texts of a batch run together while padding adds at most 15 % to their tokens, and while they are no more than the
    caches hold.
    """

    padding_bound = 1.15

    def __init__(self, path: Path, dtype: str, threads: int, task: Task) -> None:
        """Opens a session on the CPU.

        Args:
            path: The model file.
            dtype: Of its weights.
            threads: Threads of the session.
            task: What the answers are.

        Raises:
            BundleError: ONNX Runtime cannot load it.
        """
        super().__init__(task, threads * _TOKENS_PER_THREAD)
        options = session_options(threads)
        # A thread that spins for work takes the core from the event loop, and is charged to the container's quota.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # A plan of the memory is kept for every shape that was ever seen; here they hardly repeat.
        options.enable_mem_pattern = False
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # Its exceptions have no public base class.
            raise BundleError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}") from error
        self._inputs = {item.name for item in self._session.get_inputs()}
        self._outputs = [item.name for item in self._session.get_outputs()[: len(task.onnx_outputs)]]
        self.isa = f"onnxruntime-{onnxruntime.__version__}"
        # Activations of all texts of a group share one scale.
        self.couples_texts = dtype == "int8"

    def _forward(self, ids: PaddedIds, mask: PaddedIds, types: PaddedIds) -> Floats:
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        outputs: list[Any] = self._session.run(self._outputs, {name: feeds[name] for name in self._inputs})
        return np.asarray(outputs[0] if len(outputs) == 1 else np.stack(outputs, axis=-1), np.float32)
