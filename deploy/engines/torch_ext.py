"""The padding-free encoder of torch_ext: a batch is one `[tokens, hidden]` matrix."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import torch_ext
from torch_ext import Encoder, Head

from ..bundle import BundleError
from ..tasks import States, Task
from .batch import Batch, Ids
from .engine import Engine
from .pooling import pool_packed

__all__ = ["PackedStates", "TorchExtEngine"]

WARM_UP_S = 2.0
"""Most time that start-up spends on running every size of batch once."""


class PackedStates:
    """Hidden states of a batch.

    Attributes:
        ids: Token ids of each text.
        hidden: bf16 or fp32 [tokens, hidden].
        cu_seqlens: i32 [texts + 1].
    """

    def __init__(self, batch: Batch, hidden: torch.Tensor, bounds: npt.NDArray[np.int32], head: Head | None) -> None:
        self.ids = batch.ids
        self.hidden = hidden
        self.cu_seqlens = torch.from_numpy(bounds)
        self._bounds = bounds
        self._head = head

    def pooled(self, mode: str) -> npt.NDArray[np.float32]:
        """See `States.pooled`."""
        return self.vectors(mode).numpy()

    def vectors(self, mode: str) -> torch.Tensor:
        """The same as a tensor."""
        return pool_packed(self.hidden, self.cu_seqlens, mode)

    def text_logits(self) -> npt.NDArray[np.float32]:
        """See `States.text_logits`."""
        assert self._head is not None
        return self._head.classify(self.hidden, self.cu_seqlens).numpy()

    def token_logits(self, texts: Ids, positions: Ids) -> npt.NDArray[np.float32]:
        """See `States.token_logits`."""
        assert self._head is not None
        return self._head(self.hidden, torch.from_numpy(self._bounds[texts] + positions)).numpy()


class TorchExtEngine(Engine):
    """Runs an encoder of torch_ext, and the head that its task needs."""

    def __init__(self, encoder: Encoder, head: Head | None, task: Task) -> None:
        super().__init__(task)
        self.isa = str(torch_ext.isa_report()["isa"])
        self._encoder = encoder
        self._head = head
        self._inference = torch.inference_mode()

    @classmethod
    def load(cls, path: Path, dtype: str, threads: int, task: Task) -> TorchExtEngine:
        """Loads a file and packs its weights.

        Args:
            path: The file.
            dtype: Of its weights.
            threads: Threads of torch in this process, from now on.
            task: What the answers are.

        Raises:
            BundleError: The file has no head, though the task needs one.
            ValueError: It is damaged, or of another kind.
        """
        torch.set_num_threads(threads)
        kind: Any = dtype
        head = None
        if task.needs.head:
            head = Head.load(path, dtype=kind)
            if head is None:
                raise BundleError(f"{path}: no head for {task.name} in this file; export the model again")
        return cls(Encoder.load(path, dtype=kind), head, task)

    def encode(self, batch: Batch) -> PackedStates:
        """Hidden states of a batch."""
        bounds = batch.bounds()
        types = None if batch.types is None else torch.from_numpy(np.concatenate(batch.types))
        hidden = self._encoder(torch.from_numpy(np.concatenate(batch.ids)), torch.from_numpy(bounds), types)
        return PackedStates(batch, hidden, bounds, self._head)

    def _states(self, batch: Batch) -> Iterator[tuple[Batch, States]]:
        yield batch, self.encode(batch)

    def _mode(self) -> contextlib.AbstractContextManager[Any]:
        return self._inference

    def warm_up(self, max_batch_tokens: int) -> None:
        """Runs a batch of every size that has a cost of its own, shortest first, for `WARM_UP_S` at most.

        oneDNN makes code for every number of rows; torch_ext fills batches up to few different ones.
        """
        preferred = torch.ops.torch_ext._preferred_rows
        sizes = sorted({preferred(tokens) for tokens in range(1, max_batch_tokens + 1)})
        has_bf16 = self._encoder.dtype == "bf16" or bool(self._encoder.kept_bf16)
        if not has_bf16 or len(sizes) == max_batch_tokens:
            return  # These kernels make no code: all sizes are equally good.
        longest = self.task.model.max_tokens
        begun_s = time.monotonic()
        with self._mode():
            for size in sizes:
                if time.monotonic() - begun_s > WARM_UP_S:
                    break
                lengths = [longest] * (size // longest) + [size % longest] * (size % longest > 0)
                self.encode(Batch([np.full(length, self.task.pad_id, dtype=np.int64) for length in lengths]))
