"""What a model is used for: one file per task, one line per task here.

A task says what it needs of a model and its tokenizer, what it reads of the model's output, what it answers, and how a
variant of the model is compared with the original. Everything else (exporter, engines, server) asks the task and never
its name. Add a task: a file beside these, its class in `TASKS`, and a route of the server.

This package takes the standard library only, since a manifest is checked with it, and a server has no numpy. Only
`comparison`, which the exporter asks for, computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .feature_extraction import FeatureExtraction
from .fill_mask import FillMask
from .question_answering import QuestionAnswering
from .rows import Ids, Rows
from .sparse_embedding import SparseEmbedding
from .task import RAW, Described, Needs, States, Task, TaskError, prompted
from .text_classification import TextClassification
from .token_classification import TokenClassification
from .token_embedding import TokenEmbedding

__all__ = [
    "RAW",
    "TASKS",
    "Described",
    "Ids",
    "Needs",
    "Rows",
    "States",
    "Task",
    "TaskError",
    "open_task",
    "prompted",
]

TASKS: Mapping[str, type[Task]] = {
    task.name: task
    for task in (
        FeatureExtraction,
        TextClassification,
        TokenClassification,
        QuestionAnswering,
        FillMask,
        SparseEmbedding,
        TokenEmbedding,
    )
}
"""Every task, by the name that a manifest has for it. Where two fit a model, the first is taken."""


def open_task(manifest: Described, token_text: Callable[[int], str] = str) -> Task:
    """The task of a bundle.

    Args:
        manifest: The bundle's manifest.
        token_text: How a token id reads; for answers that hold tokens.
    """
    return TASKS[manifest.task](manifest, token_text)
