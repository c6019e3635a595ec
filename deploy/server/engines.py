"""The two ways to run a batch: `torch_ext` without padding, and ONNX Runtime with as little padding as possible.

An engine turns token ids into what its task answers with: a float32 row per text (feature-extraction), labels with
scores (text-classification), or tokens with scores per mask (fill-mask). torch or onnxruntime is imported when an
engine is made, on the engine thread, and only the one that is needed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import BundleError, Manifest, Variant
from ..onnx_session import session_options

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .batching import Engine

__all__ = ["EmbedOptions", "FillMaskOptions", "OnnxEngine", "TorchEngine", "load_engine"]

PADDING_BOUND = 1.15
"""ONNX Runtime: texts of a batch run together while padding adds at most 15 % to their tokens. It gains nothing from
larger batches (fp32 on 2 cores: 116 texts/s one by one, 108 in sorted batches of 32), so padding is what to avoid."""

WARM_UP_S = 2.0
"""Most time that start-up spends on running every size of batch once."""

LOGITS_BYTES = 128 << 20
"""Fill-mask: most memory that one call may spend on logits over the vocabulary."""


@dataclass(frozen=True)
class EmbedOptions:
    """What an embedding request asks for.

    Attributes:
        normalize: Divide by the L2 norm.
    """

    normalize: bool


@dataclass(frozen=True)
class FillMaskOptions:
    """What a fill-mask request asks for.

    Attributes:
        top_k: Predictions per mask.
    """

    top_k: int


def load_engine(
    manifest: Manifest,
    variant: Variant,
    threads: int,
    token_text: Callable[[int], str] = str,
    max_batch_tokens: int = 0,
) -> tuple[Engine, str]:
    """Loads a variant of a bundle and runs it once.

    Args:
        manifest: The bundle.
        variant: Which variant of it.
        threads: Threads of the engine.
        token_text: How a token id reads, for fill-mask.
        max_batch_tokens: Largest batch to prepare for.

    Returns:
        The engine, and what runs it (an ISA of torch_ext, or the version of ONNX Runtime) for the start-up line.

    Raises:
        BundleError: The weights do not fit the manifest, or their engine is not installed.
    """
    kind = {"torch_ext": TorchEngine, "onnxruntime": OnnxEngine}[variant.engine]
    try:
        engine = kind(manifest, variant, threads, token_text)
    except ImportError as error:
        raise BundleError(
            f"variant {variant.name} needs {variant.engine}, which cannot be imported ({error}); install it, or choose "
            "another variant"
        ) from error
    special = [token.id for name in ("cls", "mask", "sep") if (token := manifest.special_tokens[name]) is not None]
    ids = np.array(special or [0], dtype=np.int64)
    engine.run([ids, ids[:-1] if len(ids) > 1 else ids], [EmbedOptions(True), EmbedOptions(True)])
    engine.warm_up(max_batch_tokens)
    return engine, engine.isa


class _TaskEngine:
    """What both engines share: from pooled rows or logits to answers.

    Attributes:
        isa: What runs the variant.
    """

    isa = ""

    def __init__(self, manifest: Manifest, token_text: Callable[[int], str]) -> None:
        self._manifest = manifest
        self._task = manifest.task
        self._token_text = functools.lru_cache(maxsize=1 << 16)(token_text)
        mask = manifest.special_tokens["mask"]
        self._mask_id = -1 if mask is None else mask.id

    def warm_up(self, max_batch_tokens: int) -> None:
        """Does once what would slow the first batches down."""

    def run(self, ids: Sequence[NDArray[np.int64]], options: Sequence[Any]) -> Sequence[Any]:
        """Runs a batch; see `batching.Engine`."""
        if self._task == "feature-extraction":
            return self._finish_embeddings(self._embed(ids), options)
        if self._task == "text-classification":
            return self._finish_predictions(self._classify(ids))
        return self._fill(ids, options)

    def _embed(self, ids: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Pooled hidden states, not normalised: f32 [texts, hidden]."""
        raise NotImplementedError

    def _classify(self, ids: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Logits f32 [texts, labels]."""
        raise NotImplementedError

    def _fill(self, ids: Sequence[NDArray[np.int64]], options: Sequence[Any]) -> Sequence[Any]:
        """Per text, per mask its best tokens."""
        raise NotImplementedError

    def _finish_embeddings(self, rows: NDArray[np.float32], options: Sequence[EmbedOptions]) -> Sequence[Any]:
        wanted = np.fromiter((option.normalize for option in options), dtype=bool, count=len(options))
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        if not np.isfinite(norms).all():
            raise FloatingPointError("an embedding is not finite; the weights or the model's input range are broken")
        rows = rows / np.where(wanted, np.maximum(norms, 1e-12), 1.0).astype(np.float32)[:, None]
        return list(rows)

    def _finish_predictions(self, logits: NDArray[np.float32]) -> Sequence[Any]:
        if not np.isfinite(logits).all():
            raise FloatingPointError("a logit is not finite; the weights or the model's input range are broken")
        kind = self._manifest.problem_type
        if kind == "single_label_classification":
            scores = _softmax(logits)
        elif kind == "multi_label_classification":
            scores = (1.0 / (1.0 + np.exp(-logits))).astype(np.float32)
        else:
            scores = logits
        labels = self._manifest.labels
        assert labels is not None
        if scores.shape[1] != len(labels):
            raise ValueError(f"expected {len(labels)} logits as the manifest's labels, got {scores.shape[1]}")
        order = np.argsort(-scores, axis=1, kind="stable")
        return [
            [{"label": labels[index], "score": float(row[index])} for index in best]
            for row, best in zip(scores, order.tolist(), strict=True)
        ]

    def _top_tokens(self, logits: NDArray[np.float32], top_k: int) -> list[dict[str, Any]]:
        """The best tokens of one mask; logits f32 [vocab]."""
        top_k = min(top_k, len(logits))
        scores = _softmax(logits[None])[0]
        best = np.argpartition(-scores, top_k - 1)[:top_k]
        best = best[np.argsort(-scores[best], kind="stable")]
        return [
            {"token": self._token_text(index), "token_id": index, "score": float(scores[index])}
            for index in best.tolist()
        ]


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the last axis, f32 [rows, n]."""
    powers: NDArray[np.float32] = np.exp(logits - logits.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


class TorchEngine(_TaskEngine):
    """The padding-free encoder of torch_ext: a batch is one `[tokens, hidden]` matrix."""

    def __init__(self, manifest: Manifest, variant: Variant, threads: int, token_text: Callable[[int], str]) -> None:
        super().__init__(manifest, token_text)
        import torch

        import torch_ext

        torch.set_num_threads(threads)
        # Kept on for good: inference mode belongs to a thread, and this thread does nothing else.
        self._mode = torch.inference_mode()
        self._mode.__enter__()
        self._torch = torch
        self._pool: Any = torch_ext.pool
        path = manifest.path(variant.file)
        dtype: Any = variant.dtype
        self._encoder = torch_ext.Encoder.load(path, dtype=dtype)
        self._head = None
        if manifest.task != "feature-extraction":
            self._head = torch_ext.Head.load(path, dtype=dtype)
            if self._head is None:
                raise BundleError(f"{path}: no head for {manifest.task} in this file; export the model again")
        self.isa = str(torch_ext.isa_report()["isa"])
        pad = manifest.special_tokens["pad"]
        assert pad is not None
        self._pad_id = pad.id

    def warm_up(self, max_batch_tokens: int) -> None:
        """Runs a batch of every size that has a cost of its own, shortest first, for `WARM_UP_S` at most.

        oneDNN makes code for every number of rows; torch_ext fills batches up to few different ones.
        """
        preferred = self._torch.ops.torch_ext._preferred_rows
        sizes = sorted({preferred(tokens) for tokens in range(1, max_batch_tokens + 1)})
        has_bf16 = self._encoder.dtype == "bf16" or bool(self._encoder.kept_bf16)
        if not has_bf16 or len(sizes) == max_batch_tokens:
            return  # These kernels make no code: all sizes are equally good.
        longest = self._manifest.max_tokens
        begun_s = time.monotonic()
        for size in sizes:
            if time.monotonic() - begun_s > WARM_UP_S:
                break
            lengths = [longest] * (size // longest) + [size % longest] * (size % longest > 0)
            self._encode([np.full(length, self._pad_id, dtype=np.int64) for length in lengths])

    def _encode(self, ids: Sequence[NDArray[np.int64]]) -> tuple[Any, Any, NDArray[np.int32]]:
        """Hidden states [tokens, hidden], cu_seqlens as a tensor and as an array, i32 [texts + 1]."""
        bounds = np.zeros(len(ids) + 1, dtype=np.int32)
        np.cumsum([len(text) for text in ids], out=bounds[1:])
        cu_seqlens = self._torch.from_numpy(bounds)
        hidden = self._encoder(self._torch.from_numpy(np.concatenate(ids)), cu_seqlens)
        return hidden, cu_seqlens, bounds

    def _embed(self, ids: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        hidden, cu_seqlens, _ = self._encode(ids)
        pooling = self._manifest.pooling
        assert pooling is not None
        rows: NDArray[np.float32] = self._pool(hidden, cu_seqlens, mode=pooling.mode, normalize=False).numpy()
        return rows

    def _classify(self, ids: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        hidden, cu_seqlens, _ = self._encode(ids)
        assert self._head is not None
        logits: NDArray[np.float32] = self._head.classify(hidden, cu_seqlens).numpy()
        return logits

    def _fill(self, ids: Sequence[NDArray[np.int64]], options: Sequence[Any]) -> Sequence[Any]:
        hidden, _, bounds = self._encode(ids)
        assert self._head is not None
        (rows,) = np.nonzero(np.concatenate(ids) == self._mask_id)
        texts = np.searchsorted(bounds, rows, side="right") - 1
        result: list[list[Any]] = [[] for _ in ids]
        step = max(1, LOGITS_BYTES // (4 * self._encoder.spec.vocab_size))
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            logits = self._head(hidden, self._torch.from_numpy(chunk)).numpy()
            for row, text in zip(logits, texts[start : start + step].tolist(), strict=True):
                result[text].append(self._top_tokens(row, getattr(options[text], "top_k", 1)))
        return result


class OnnxEngine(_TaskEngine):
    """ONNX Runtime: texts of similar length are padded to the longest of them and run together."""

    def __init__(self, manifest: Manifest, variant: Variant, threads: int, token_text: Callable[[int], str]) -> None:
        super().__init__(manifest, token_text)
        import onnxruntime

        options = session_options(threads)
        # A thread that spins for work takes the core from the event loop, and is charged to the container's quota.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # A plan of the memory is kept for every shape that was ever seen; here they hardly repeat.
        options.enable_mem_pattern = False
        path = manifest.path(variant.file)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # Its exceptions have no public base class.
            raise BundleError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}") from error
        self._inputs = {item.name for item in self._session.get_inputs()}
        self._output = self._session.get_outputs()[0].name
        pad = manifest.special_tokens["pad"]
        assert pad is not None
        self._pad_id = pad.id
        self._max_padded = LOGITS_BYTES // (4 * 32_768) if manifest.task == "fill-mask" else 1 << 20
        self.isa = f"onnxruntime-{onnxruntime.__version__}"

    def _groups(self, ids: Sequence[NDArray[np.int64]]) -> list[list[int]]:
        """Indices of texts that run together, longest first."""
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
        groups: list[list[int]] = []
        longest = tokens = 0
        for index in order:
            size = len(ids[index])
            padded = longest * (len(groups[-1]) + 1) if groups else 0
            if groups and padded <= PADDING_BOUND * (tokens + size) and padded <= self._max_padded:
                groups[-1].append(index)
                tokens += size
            else:
                groups.append([index])
                longest = tokens = size
        return groups

    def _call(self, ids: Sequence[NDArray[np.int64]], group: list[int]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """First output of the model and the attention mask, i64 [texts, longest]."""
        longest = max(len(ids[index]) for index in group)
        tokens = np.full((len(group), longest), self._pad_id, dtype=np.int64)
        mask = np.zeros((len(group), longest), dtype=np.int64)
        for row, index in enumerate(group):
            size = len(ids[index])
            tokens[row, :size] = ids[index]
            mask[row, :size] = 1
        feed = {"input_ids": tokens, "attention_mask": mask}
        if "token_type_ids" in self._inputs:
            feed["token_type_ids"] = np.zeros_like(tokens)
        output: NDArray[Any] = self._session.run([self._output], feed)[0]
        return output, mask

    def _embed(self, ids: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        pooling = self._manifest.pooling
        assert pooling is not None
        result = np.empty((len(ids), self._manifest.hidden_size), dtype=np.float32)
        for group in self._groups(ids):
            hidden, mask = self._call(ids, group)
            if pooling.mode == "cls":
                result[group] = hidden[:, 0]
            elif pooling.mode == "max":
                result[group] = np.where(mask[:, :, None] > 0, hidden, -np.inf).max(axis=1)
            else:
                weights = mask / mask.sum(axis=1, keepdims=True)
                result[group] = np.matmul(weights.astype(np.float32)[:, None], hidden)[:, 0]
        return result

    def _classify(self, ids: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        labels = self._manifest.labels
        assert labels is not None
        result = np.empty((len(ids), len(labels)), dtype=np.float32)
        for group in self._groups(ids):
            result[group] = self._call(ids, group)[0]
        return result

    def _fill(self, ids: Sequence[NDArray[np.int64]], options: Sequence[Any]) -> Sequence[Any]:
        result: list[Any] = [None] * len(ids)
        for group in self._groups(ids):
            logits, _ = self._call(ids, group)
            for row, index in enumerate(group):
                top_k = getattr(options[index], "top_k", 1)
                result[index] = [
                    self._top_tokens(logits[row, position], top_k)
                    for position in np.nonzero(ids[index] == self._mask_id)[0].tolist()
                ]
        return result
