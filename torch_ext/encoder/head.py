"""Head: what a model answers, from the hidden states of an encoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_ext.encoder import files
from torch_ext.encoder.huggingface.models import head_in_folder, read_head
from torch_ext.encoder.spec import Dtype, HeadSpec
from torch_ext.encoder.weighted import Inference, Weighted
from torch_ext.encoder.weights import TABLE_DTYPES

__all__ = ["Head"]

_pool = torch.ops.torch_ext.pool.default


class Head(Weighted[HeadSpec]):
    """The task head of a model: classification of texts or tokens, answers, tokens for a mask, or a linear stage.

    Made by :meth:`from_transformers` or :meth:`load`, and immutable.

    Beside an int8 encoder it stays in bf16, and that is what ``dtype="int8"`` means here: it runs on a few rows of a
    batch, one for each text or mask, so that int8 would hardly save time, and nothing after it (no norm, no pooling)
    would even out the error that int8 puts into its logits.

    Attributes:
        spec: what it computes.
        dtype: ``"bf16"`` or ``"fp32"``, of weights and products.
    """

    def __init__(
        self,
        spec: HeadSpec,
        weights: Mapping[str, Tensor],
        dtype: Dtype = "bf16",
        keep_bf16: str | Iterable[str] = (),
    ) -> None:
        super().__init__(spec, weights, "bf16" if dtype == "int8" else dtype, keep_bf16)

    @classmethod
    def from_transformers(cls, model: nn.Module, dtype: Dtype = "bf16") -> Head:
        """Take the head of a Hugging Face model; for BERT classifiers, its pooler belongs to it.

        Args:
            model: ``*ForSequenceClassification``, ``*ForTokenClassification``, ``*ForQuestionAnswering`` or
                ``*ForMaskedLM`` of an architecture in :data:`torch_ext.encoder.ARCHITECTURES`, on the CPU, or a
                CrossEncoder or SparseEncoder of sentence-transformers around one.
            dtype: ``"bf16"`` or ``"fp32"``; ``"int8"`` is taken for bf16.

        Returns:
            The head, with its own copy of the weights.

        Raises:
            TypeError: ``model`` has no transformers configuration.
            ValueError: the model has no head that is supported.
        """
        spec, weights = read_head(model)
        return cls(spec, weights, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], dtype: Dtype = "bf16", task: str = "auto") -> Head:
        """Take the head out of a folder that ``save_pretrained`` wrote, without the transformers package.

        Args:
            folder: with ``config.json`` and safetensors.
            dtype: ``"bf16"`` or ``"fp32"``; ``"int8"`` is taken for bf16.
            task: ``"text-classification"``, ``"token-classification"``, ``"question-answering"`` or ``"fill-mask"``;
                ``"auto"``: the one that ``config.json`` names.

        Returns:
            The head, equal to that of :meth:`from_transformers` for the model in the folder.

        Raises:
            FileNotFoundError: there is no such folder, or a file of it is missing.
            ValueError: there is no such head, or a file is damaged or does not fit.
        """
        spec, weights = head_in_folder(folder, task)
        return cls(spec, weights, dtype)

    def __call__(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Compute logits for some of the tokens, or for all.

        Args:
            hidden: bf16 or fp32 ``[T, H]``, from the encoder.
            rows: i64 or i32 ``[R]``, rows of ``hidden``: for fill-mask the mask tokens, for a classifier of texts
                that pools by ``cls`` their first tokens, ``cu_seqlens[:-1]``. None, for token classification and
                question answering: all.

        Returns:
            fp32 ``[R, num_outputs]``. It never requires grad.

        Raises:
            ValueError: a shape does not fit, or a row is out of range.
            TypeError: a dtype is wrong.
        """
        if torch.compiler.is_compiling():
            return self._run(hidden if rows is None else hidden.index_select(0, rows))
        self._check_hidden(hidden)
        if rows is not None:
            if not isinstance(rows, Tensor):
                raise TypeError(f"Head: expected rows as a torch.Tensor, got {type(rows).__name__}")
            if rows.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"Head: expected rows of int64 or int32, got {rows.dtype}")
            if rows.dim() != 1:
                raise ValueError(f"Head: expected rows with 1 dimension, got {list(rows.shape)}")
            if rows.shape[0]:
                low, high = rows.aminmax()
                if int(low) < 0 or int(high) >= hidden.shape[0]:
                    wrong = int(low) if int(low) < 0 else int(high)
                    raise ValueError(f"Head: expected rows from 0 to {hidden.shape[0] - 1}, got {wrong}")
        with Inference():
            return self._run(hidden if rows is None else hidden.index_select(0, rows))

    def classify(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Compute logits of whole texts, pooled as ``spec.pooling`` says.

        Args:
            hidden: bf16 or fp32 ``[T, H]``, from the encoder.
            cu_seqlens: i32 ``[B + 1]``, as the encoder took it.

        Returns:
            fp32 ``[B, num_outputs]``. It never requires grad.

        Raises:
            ValueError: the head classifies no texts, or a shape does not fit.
            TypeError: a dtype is wrong.
            RuntimeError: ``cu_seqlens`` does not fit, or a text is empty.
        """
        if self.spec.task != "text-classification":
            raise ValueError(
                f"Head.classify: expected a head for text-classification, this one is for {self.spec.task}"
            )
        if torch.compiler.is_compiling():
            return self._run(_pool(hidden, cu_seqlens, self.spec.pooling, False))
        self._check_hidden(hidden)
        with Inference():
            return self._run(_pool(hidden, cu_seqlens, self.spec.pooling, False))

    def _check_hidden(self, hidden: Tensor) -> None:
        if not isinstance(hidden, Tensor):
            raise TypeError(f"Head: expected hidden as a torch.Tensor, got {type(hidden).__name__}")
        if hidden.dim() != 2 or hidden.shape[1] != self.spec.hidden_size:
            raise ValueError(f"Head: expected hidden [T, {self.spec.hidden_size}], got {list(hidden.shape)}")
        if hidden.dtype not in TABLE_DTYPES.values():
            raise TypeError(f"Head: expected hidden of fp32 or bf16, got {hidden.dtype}")

    def _run(self, x: Tensor) -> Tensor:
        tensors, spec = self._tensors, self.spec
        if spec.dense:
            weight, bias = tensors["head.dense.weight"], tensors["head.dense.bias"]
            x = self._linear(x, weight, bias, spec.activation, torch.float32)
        if spec.norm:
            x = self._norm(x, None, tensors["head.norm.weight"], tensors["head.norm.bias"])
        weight, bias = tensors["head.out.weight"], tensors["head.out.bias"]
        return self._linear(x, weight, bias, spec.out_activation, torch.float32)

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: Dtype = "bf16") -> Head | None:
        """Read the head that :meth:`Encoder.save` wrote beside an encoder.

        Args:
            path: the file.
            dtype: ``"bf16"`` or ``"fp32"``; a bf16 or int8 file cannot be loaded as fp32. ``"int8"`` is taken for bf16.

        Returns:
            The head, or None if the file has none.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of another format or version, or holds bf16 where fp32 is asked for.
        """
        if not files.has_part(Path(path), "head"):
            return None
        spec, weights = files.read(Path(path), "head", HeadSpec, dtype)
        return cls(spec, weights, dtype)

    def __repr__(self) -> str:
        return f"Head({self.spec.task}, dtype={self.dtype}, num_outputs={self.spec.num_outputs})"
