"""The reference: a model of transformers in fp32, padded batches."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from ..bundle import CONFIG_FILE
from ..folder.errors import FolderError, first_line
from ..tasks import Task
from .padded import PaddedEngine, PaddedIds
from .pooling import Floats

__all__ = ["MAX_PADDED", "TransformersEngine", "outputs_of"]

MAX_PADDED = 2048
"""Tokens that run together, with padding; a single text may have more."""


def outputs_of(model: Any, ids: PaddedIds, mask: PaddedIds, types: PaddedIds) -> Any:
    """What a model makes of a padded batch; all arrays i64 [texts, longest]. Some take no token types, or no mask."""
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    taken = inspect.signature(model.forward).parameters
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(array) for name, array in arrays.items() if name in taken})


class TransformersEngine(PaddedEngine):
    """Runs a loaded model in evaluation mode."""

    def __init__(self, model: Any, task: Task) -> None:
        # What is computed of more tokens at once takes as much memory as the weights of a small model, and more time.
        super().__init__(task, MAX_PADDED)
        self._model = model
        self.isa = f"torch-{torch.__version__}"

    def _forward(self, ids: PaddedIds, mask: PaddedIds, types: PaddedIds) -> Floats:
        try:
            outputs = outputs_of(self._model, ids, mask, types)[: len(self.task.onnx_outputs)]
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise FolderError(
                f"transformers cannot run the model as its {CONFIG_FILE} has it: {first_line(error)}"
            ) from error
        # Hidden states of a bare encoder, logits where there is a head; those of starts and ends side by side.
        output = outputs[0] if len(outputs) == 1 else torch.stack(outputs, dim=-1)
        return np.asarray(output.numpy(), np.float32)
