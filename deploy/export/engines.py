"""Runs a model in one of three engines on the same token ids: transformers (the reference), torch_ext, ONNX Runtime.

Every engine turns a batch of token ids into one float32 matrix: embeddings, class logits, or logits at mask tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from deploy.bundle import Pooling
from deploy.onnx_session import session_options

if TYPE_CHECKING:
    import torch

    from torch_ext import Encoder, Head

__all__ = ["Batch", "Engine", "OnnxEngine", "TorchExtEngine", "TransformersEngine", "batches", "pool"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Texts that run together.

    Attributes:
        texts: Index of each text in the sample.
        ids: Token ids of each text, special tokens included.
        masks: Positions of the mask tokens in each text; empty lists unless the task is fill-mask.
    """

    texts: Sequence[int]
    ids: Sequence[Sequence[int]]
    masks: Sequence[Sequence[int]]

    def padded(self, pad_id: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token ids and attention mask, both i64 [texts, longest]."""
        longest = max(len(row) for row in self.ids)
        ids = np.full((len(self.ids), longest), pad_id, np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(self.ids):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return ids, mask


def batches(
    ids: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], size: int, max_tokens: int | None = None
) -> list[Batch]:
    """Sorts texts by length and cuts them into batches.

    Args:
        ids: Token ids of each text.
        masks: Positions of the mask tokens in each text.
        size: Texts per batch, at most.
        max_tokens: Tokens per padded batch, at most; a batch always has at least one text.
    """
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    result: list[Batch] = []
    start = 0
    while start < len(order):
        end = start + 1
        while end < min(len(order), start + size) and (
            max_tokens is None or len(ids[order[end]]) * (end + 1 - start) <= max_tokens
        ):
            end += 1
        rows = order[start:end]
        result.append(Batch(rows, [ids[row] for row in rows], [masks[row] for row in rows]))
        start = end
    return result


def pool(hidden: Floats, mask: npt.NDArray[np.int64], pooling: Pooling) -> Floats:
    """Embeddings f32 [texts, width] of hidden states f32 [texts, longest, width]; padding has no influence."""
    here = mask[..., None].astype(bool)
    if pooling.mode == "cls":
        result = hidden[:, 0]
    elif pooling.mode == "max":
        result = np.where(here, hidden, -np.inf).max(axis=1)
    else:
        result = np.where(here, hidden, 0.0).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    if pooling.normalize:
        result = result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
    return np.asarray(result, np.float32)


def _mask_rows(batch: Batch) -> tuple[list[int], list[int]]:
    """Text in the batch and position in the text, of every mask token."""
    texts = [index for index, positions in enumerate(batch.masks) for _ in positions]
    return texts, [position for positions in batch.masks for position in positions]


class Engine(Protocol):
    """Something that runs a batch."""

    def run(self, batch: Batch) -> Floats:
        """Embeddings [texts, width], logits [texts, labels], or logits [mask tokens, vocabulary]; f32."""
        ...


class TransformersEngine:
    """The reference: transformers in fp32, padded batches."""

    def __init__(self, model: Any, task: str, pooling: Pooling | None, pad_id: int) -> None:
        """Takes a loaded model in evaluation mode."""
        self._model = model
        self._task = task
        self._pooling = pooling
        self._pad_id = pad_id

    def run(self, batch: Batch) -> Floats:
        """See `Engine.run`."""
        import torch

        ids, mask = batch.padded(self._pad_id)
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if "token_type_ids" in inspect.signature(self._model.forward).parameters:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        with torch.inference_mode():
            output = self._model(**inputs)
            if self._pooling is not None:
                return pool(output.last_hidden_state.numpy(), mask, self._pooling)
            logits = output.logits
            if self._task == "fill-mask":
                texts, positions = _mask_rows(batch)
                logits = logits[texts, positions]
            return np.asarray(logits.numpy(), np.float32)


class TorchExtEngine:
    """torch_ext without padding, as the server runs it."""

    def __init__(self, encoder: Encoder, head: Head | None, task: str, pooling: Pooling | None) -> None:
        """Takes an encoder, and the head that the task needs."""
        self._encoder = encoder
        self._head = head
        self._task = task
        self._pooling = pooling

    @classmethod
    def load(cls, path: Path, dtype: str, task: str, pooling: Pooling | None) -> TorchExtEngine:
        """Loads a file and packs its weights.

        Raises:
            ValueError: The file has no head, though the task needs one.
        """
        from torch_ext import Encoder, Head

        kind: Any = dtype
        head = None if task == "feature-extraction" else Head.load(str(path), dtype=kind)
        if task != "feature-extraction" and head is None:
            raise ValueError(f"{path}: expected a task head in it")
        return cls(Encoder.load(str(path), dtype=kind), head, task, pooling)

    def run(self, batch: Batch) -> Floats:
        """See `Engine.run`."""
        return self.finish(batch, *self.hidden(batch))

    def hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [tokens, width] and where texts begin, i32 [texts + 1]."""
        import torch

        lengths = np.array([len(row) for row in batch.ids], np.int32)
        ends = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        ids = torch.from_numpy(np.concatenate([np.asarray(row, np.int64) for row in batch.ids]))
        cu_seqlens = torch.from_numpy(ends)
        with torch.inference_mode():
            return self._encoder(ids, cu_seqlens), cu_seqlens

    def finish(self, batch: Batch, hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> Floats:
        """What the task makes of hidden states; see `Engine.run`."""
        import torch

        import torch_ext

        with torch.inference_mode():
            if self._pooling is not None:
                mode: Any = self._pooling.mode
                pooled = torch_ext.pool(hidden, cu_seqlens, mode=mode, normalize=self._pooling.normalize)
                return np.asarray(pooled.float().numpy(), np.float32)
            assert self._head is not None
            if self._task == "fill-mask":
                texts, positions = _mask_rows(batch)
                rows = cu_seqlens.long()[texts] + torch.tensor(positions)
                logits = self._head(hidden, rows)
            else:
                logits = self._head.classify(hidden, cu_seqlens)
            return np.asarray(logits.numpy(), np.float32)


class OnnxEngine:
    """ONNX Runtime on a model file, padded batches."""

    def __init__(self, path: Path, threads: int, task: str, pooling: Pooling | None, pad_id: int) -> None:
        """Opens a session on the CPU."""
        import onnxruntime

        self._session = onnxruntime.InferenceSession(
            str(path), session_options(threads), providers=["CPUExecutionProvider"]
        )
        self._inputs = {item.name for item in self._session.get_inputs()}
        self._output = self._session.get_outputs()[0].name
        self._task = task
        self._pooling = pooling
        self._pad_id = pad_id

    def run(self, batch: Batch) -> Floats:
        """See `Engine.run`."""
        ids, mask = batch.padded(self._pad_id)
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        output = self._session.run([self._output], {name: feeds[name] for name in self._inputs})[0]
        if self._pooling is not None:
            return pool(output, mask, self._pooling)
        if self._task == "fill-mask":
            texts, positions = _mask_rows(batch)
            output = output[texts, positions]
        return np.asarray(output, np.float32)
