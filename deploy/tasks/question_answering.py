"""question-answering: the parts of a text that answer a question.

An engine answers for each token how likely an answer begins, and ends, there; `answers.py` makes answers of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .bounds import AGREEMENT, CLOSE_TOKENS, pick
from .task import Needs, States, Task, not_finite

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = ["QuestionAnswering"]


class QuestionAnswering(Task):
    """Answers per pair of question and text, per token two logits: that an answer begins there, and ends there."""

    name = "question-answering"
    needs = Needs(head=True, pairs=True)
    auto_class = "AutoModelForQuestionAnswering"
    architecture = "ForQuestionAnswering"
    optimum_task = "question-answering"
    onnx_outputs = ("start_logits", "end_logits")
    close = CLOSE_TOKENS

    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """See `Task.answers`; all options are `RAW`."""
        texts = [index for index, ids in enumerate(states.ids) for _ in ids]
        positions = [place for ids in states.ids for place in range(len(ids))]
        logits = states.token_logits(texts, positions)
        if logits.width != 2:
            raise ValueError(f"expected 2 logits of each token, where answers begin and end, got {logits.width}")
        rows, finite = iter(logits), iter(logits.finite)
        result: list[Any] = []
        for ids in states.ids:
            mine = [next(rows) for _ in ids]
            right = [next(finite) for _ in ids]
            result.append(mine if all(right) else not_finite("a logit"))
        return result

    def comparison(self, texts: int) -> Comparison:
        """See `Task.comparison`."""
        from .comparison import AnswerSpans

        return AnswerSpans(texts)

    def default_bounds(self, variant: str, dtype: str) -> dict[str, float]:
        """See `Task.default_bounds`."""
        return pick(AGREEMENT, variant, dtype)
