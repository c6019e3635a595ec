"""The int8 encoder of torch_ext: which of its linear layers stay in bf16 is measured on the texts of the export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from deploy.engines.batch import Batch, Ids, groups, joined
from deploy.engines.padded import padded
from deploy.engines.pooling import pool_padded
from deploy.export.accuracy import Result, Verification
from deploy.export.errors import ExportError
from deploy.tasks import Rows

if TYPE_CHECKING:
    import torch

    from torch_ext import Encoder, Head
    from torch_ext.sensitivity import Report, Similarity

__all__ = ["BoundMissed", "choose_encoder"]

_RANKED_ON = 4
"""Layers are ranked on every fourth batch; whether a choice of them is good enough is measured on all texts."""


class BoundMissed(Exception):  # noqa: N818 - write_torch_ext makes an ExportError of it
    """Not even with all layers in bf16 are the bounds kept.

    Attributes:
        result: What was measured then.
    """

    def __init__(self, result: Result) -> None:
        super().__init__(str(result))
        self.result = result


def choose_encoder(
    model: Any,
    verification: Verification,
    bounds: Mapping[str, float],
    accuracy: float | None,
    linear: Head | None = None,
    calibration: Sequence[Ids] = (),
) -> tuple[Encoder, Head | None, Report]:
    """Quantizes a model as far as its bounds allow.

    Args:
        model: The model in fp32, of transformers.
        verification: The texts, and what transformers answered to them.
        bounds: Bounds of the variant.
        accuracy: Mean cosine to fp32 to reach besides: of embeddings, or where the task is another, of the mean of each
            text's hidden states.
        linear: Stages behind the pooling.
        calibration: Texts to round the weights for; none: each is rounded to the nearest step.

    Returns:
        The encoder, the head if the task has one, and what was measured.

    Raises:
        ExportError: All layers in bf16 miss `accuracy`.
        BoundMissed: They miss another bound.
        ValueError, TypeError: torch_ext does not run the model.
    """
    import torch

    from torch_ext import Head, pool
    from torch_ext.sensitivity import AccuracyError, Mixtures, choose_layers, similarity

    task, work = verification.task, verification.work
    head = Head.from_transformers(model, dtype="int8") if task.needs.head else linear
    mode: Any = "mean" if task.model.pooling is None else task.model.pooling.mode

    def run(encoder: Encoder, batches: Sequence[Batch]) -> tuple[list[torch.Tensor], list[tuple[int, Any]]]:
        """A row per text, and what the task answers with its index."""
        rows: list[torch.Tensor] = []
        answers: list[tuple[int, Any]] = []
        for batch in batches:
            with torch.inference_mode():
                states = _EncoderStates(batch, encoder, head)
                rows.append(pool(states.hidden, states.cu_seqlens, mode))
                answers += zip(batch.texts, task.answers(states, [task.exact] * len(batch)), strict=True)
        return rows, answers

    exact = _exact_rows(model, work, mode, task.pad_id)
    mixtures = Mixtures(model, _joined(calibration) if calibration else None)
    results: dict[frozenset[str], Result] = {}

    def measure(kept: frozenset[str]) -> Similarity:
        rows, answers = run(mixtures(kept), work)
        results[kept] = verification.judge(answers, bounds)
        return similarity(exact, rows, not results[kept].missed)

    def rank(kept: frozenset[str]) -> Similarity:
        return similarity(exact[::_RANKED_ON], run(mixtures(kept), work[::_RANKED_ON])[0])

    try:
        report = choose_layers(mixtures.names, measure, accuracy, rank if len(work) > _RANKED_ON else None)
    except AccuracyError as error:
        result = results[frozenset(mixtures.names)]
        if result.missed:
            raise BoundMissed(result) from error
        raise ExportError(f"--accuracy {accuracy:g}: torch_ext-int8: {error}") from error
    return mixtures(report.kept), head, report


def _exact_rows(model: Any, work: Sequence[Batch], mode: str, pad_id: int) -> list[torch.Tensor]:
    """A row per text, of the model itself: an encoder in fp32 would be in memory beside it."""
    import numpy as np
    import torch

    from deploy.engines.transformers import MAX_PADDED, outputs_of

    rows: list[torch.Tensor] = []
    for batch in work:
        found: dict[int, torch.Tensor] = {}
        for places in groups(batch.lengths, max_padded=MAX_PADDED):
            part = batch.part(places)
            hidden = outputs_of(model.base_model, *padded(part, pad_id))[0]
            # A copy: some are views of all hidden states.
            pooled = torch.from_numpy(pool_padded(hidden.numpy(), np.array(part.lengths), mode)).clone()
            found.update(zip(places, pooled, strict=True))
        rows.append(torch.stack([found[place] for place in range(len(batch))]))
    return rows


def _joined(texts: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids i64 [tokens], and where each text begins, i32 [texts + 1]."""
    import torch

    bounds = [0, *accumulate(map(len, texts))]
    return torch.tensor([token for text in texts for token in text]), torch.tensor(bounds, dtype=torch.int32)


class _EncoderStates:
    """States of a batch from an encoder that is in memory: the numbers that the engine computes of its file.

    Attributes:
        ids: Token ids of each text.
        hidden: bf16 or fp32 [tokens, hidden].
        cu_seqlens: i32 [texts + 1].
    """

    def __init__(self, batch: Batch, encoder: Encoder, head: Head | None) -> None:
        import torch

        bounds = batch.bounds()
        typed = batch.types if encoder.spec.type_vocab_size > 1 else None  # As the engine takes them.
        types = None if typed is None else torch.frombuffer(joined(typed), dtype=torch.int64)
        self.ids = batch.ids
        self.cu_seqlens = torch.frombuffer(bounds, dtype=torch.int32)
        attended = None if batch.attended is None else torch.tensor(batch.attended, dtype=torch.int32)
        ids = torch.frombuffer(joined(batch.ids), dtype=torch.int64)
        self.hidden = encoder(ids, self.cu_seqlens, types, attended)
        self._head = head

    def pooled(self, mode: str, normalize: bool = False, dimensions: int | None = None, skipped: int = 0) -> Rows:
        """See `States.pooled`."""
        import torch

        from torch_ext import pool

        assert not skipped  # Variants are compared as they are served by default.
        vectors = pool(self.hidden, self.cu_seqlens, mode)
        if self._head is not None:  # Linear stages.
            vectors = self._head(vectors)
        vectors = vectors[:, :dimensions]
        return Rows((torch.nn.functional.normalize(vectors) if normalize else vectors).contiguous().numpy())

    def text_logits(self) -> Rows:
        """See `States.text_logits`."""
        assert self._head is not None
        return Rows(self._head.classify(self.hidden, self.cu_seqlens).numpy())

    def token_logits(self, texts: Sequence[int], positions: Sequence[int]) -> Rows:
        """See `States.token_logits`."""
        return Rows(self._token_logits(texts, positions))

    def top_k(self, texts: Sequence[int], positions: Sequence[int], k: int) -> tuple[Rows, Rows]:
        """See `States.top_k`."""
        from deploy.engines.padded import ranked

        return ranked(self._token_logits(texts, positions), k)

    def token_vectors(self) -> list[tuple[Rows, bool]]:
        """See `States.token_vectors`."""
        return self._per_text(self.hidden.float())

    def projected(self, normalize: bool) -> list[tuple[Rows, bool]]:
        """See `States.projected`."""
        import torch

        vectors = self.hidden.float() if self._head is None else self._head(self.hidden)
        return self._per_text(torch.nn.functional.normalize(vectors) if normalize else vectors)

    def _per_text(self, vectors: torch.Tensor) -> list[tuple[Rows, bool]]:
        texts = [Rows(vectors[first:last].numpy()) for first, last in pairwise(self.cu_seqlens.tolist())]
        return [(rows, all(rows.finite)) for rows in texts]

    def sparse(self, total: bool, twice: bool) -> list[tuple[memoryview, memoryview]]:
        """See `States.sparse`."""
        from deploy.engines.padded import splade

        assert self._head is not None
        bounds = self.cu_seqlens.tolist()
        # Text by text: logits of all would not fit.
        return [splade(self._head(self.hidden[first:last]).numpy(), total, twice) for first, last in pairwise(bounds)]

    def _token_logits(self, texts: Sequence[int], positions: Sequence[int]) -> Any:
        import torch

        assert self._head is not None
        starts = self.cu_seqlens[torch.tensor(texts)].long()
        return self._head(self.hidden, starts + torch.tensor(positions)).numpy()
