"""The padding-free encoder of torch_ext, without torch: a batch is one `[tokens, hidden]` matrix."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch_ext.runtime import Encoder
from torch_ext.runtime import States as HiddenStates

from ..bundle import CONFIG_FILE, BundleError
from ..tasks import Rows, States, Task
from .batch import Batch, joined
from .engine import Engine, Image

__all__ = ["TorchExtEngine"]


class _PackedStates:
    """Hidden states of a batch.

    Attributes:
        ids: Token ids of each text.
    """

    def __init__(self, batch: Batch, states: HiddenStates, bounds: Sequence[int], outputs: int) -> None:
        self.ids = batch.ids
        self._states = states
        self._bounds = bounds
        self._outputs = outputs

    def pooled(self, mode: str, normalize: bool = False, dimensions: int | None = None, skipped: int = 0) -> Rows:
        """See `States.pooled`."""
        return Rows(self._states.pool(mode, normalize, dimensions, skipped))

    def text_logits(self) -> Rows:
        """See `States.text_logits`."""
        return Rows(self._states.text_logits())

    def token_logits(self, texts: Sequence[int], positions: Sequence[int]) -> Rows:
        """See `States.token_logits`."""
        return Rows(self._states.token_logits(self._tokens(texts, positions)))

    def top_k(self, texts: Sequence[int], positions: Sequence[int], k: int) -> tuple[Rows, Rows]:
        """See `States.top_k`."""
        indices, probabilities = self._states.top_k(self._tokens(texts, positions), min(k, self._outputs))
        return Rows(indices), Rows(probabilities)

    def token_vectors(self) -> list[tuple[Sequence[memoryview], bool]]:
        """See `States.token_vectors`."""
        return self._per_text(Rows(self._states.hidden()))

    def projected(self, normalize: bool) -> list[tuple[Sequence[memoryview], bool]]:
        """See `States.projected`."""
        return self._per_text(Rows(self._states.token_vectors(normalize)))

    def _per_text(self, rows: Rows) -> list[tuple[Sequence[memoryview], bool]]:
        finite = rows.finite
        return [(rows[first:last], all(finite[first:last])) for first, last in pairwise(self._bounds)]

    def sparse(self, total: bool, twice: bool) -> list[tuple[memoryview, memoryview]]:
        """See `States.sparse`."""
        (bounds,), (indices,), (values,) = map(Rows, self._states.sparse(total=total, twice=twice))
        return [(indices[first:last], values[first:last]) for first, last in pairwise(bounds.tolist())]

    def _tokens(self, texts: Sequence[int], positions: Sequence[int]) -> Any:
        """Places in the batch, i64 [n]."""
        bounds = self._bounds
        return array("q", [bounds[text] + position for text, position in zip(texts, positions, strict=True)])


class TorchExtEngine(Engine):
    """Runs an encoder of torch_ext, and the head that its task needs."""

    def __init__(self, encoder: Encoder, task: Task) -> None:
        super().__init__(task)
        self.isa = encoder.isa
        self._encoder = encoder

    @classmethod
    def load(cls, path: Path, dtype: str, threads: int, task: Task, *, shared: bool = False) -> TorchExtEngine:
        """Loads a file, or a folder of Hugging Face, and packs its weights.

        Args:
            path: The file, or the folder.
            dtype: Of its weights.
            threads: Threads of the engine.
            task: What the answers are.
            shared: Keep the weights where other processes can map them; see `share`.

        Raises:
            BundleError: The file has no head, though the task needs one, or the folder cannot be used.
            ValueError: It is damaged, or of another kind.
        """
        kind: Any = dtype
        if path.is_dir():
            return cls(_open_folder(path, kind, threads, task, shared), task)
        encoder = Encoder.open(path, kind, threads=threads, shared=shared)
        if task.needs.head and not encoder.outputs:
            raise BundleError(f"{path}: no head for {task.name} in this file; export the model again")
        if task.model.dense and encoder.task != "feature-extraction":
            raise BundleError(f"{path}: no linear stages, which the manifest names; export the model again")
        return cls(encoder, task)

    @classmethod
    def map(cls, image: Image, threads: int, task: Task) -> TorchExtEngine:
        """Maps weights that another process has loaded.

        Args:
            image: The weights, and where to run.
            threads: Threads of the engine.
            task: What the answers are.

        Raises:
            ValueError: They are damaged, or for another kind of CPU.
        """
        return cls(Encoder.open_image(image.fd, threads=threads, cpus=image.cpus, pin=image.pin), task)

    def rest(self) -> None:
        """See `Engine.rest`."""
        self._encoder.release_workspace()

    def share(self) -> int:
        """See `Engine.share`."""
        return self._encoder.share()

    def _states(self, batch: Batch) -> Iterator[tuple[Batch, States]]:
        bounds = batch.bounds()
        # Of one token type or none there is nothing to choose, whatever the tokenizer says of pairs.
        typed = self._encoder.type_vocab_size > 1
        types = joined(batch.types) if typed and batch.types is not None else None
        states = self._encoder.encode(joined(batch.ids), bounds, types, batch.attended)
        yield batch, _PackedStates(batch, states, bounds, self._encoder.outputs)


def _open_folder(path: Path, dtype: Any, threads: int, task: Task, shared: bool) -> Encoder:
    # Takes 30 ms to import, which a bundle need not spend.
    from torch_ext.encoder.huggingface.table import HEAD_CLASSES

    head = HEAD_CLASSES[task.architecture] if task.needs.head else None
    stages = [(stage.folder, stage.activation) for stage in task.model.dense if stage.folder is not None]
    try:
        encoder = Encoder.from_pretrained(path, dtype, head, stages=stages, threads=threads, shared=shared)
    except (ValueError, FileNotFoundError) as error:
        reason = str(error)
        if ": unsupported " in reason:  # By the encoder; nothing is wrong with the folder.
            reason += "; python -m deploy export it, which writes variants for torch or ONNX Runtime"
        raise BundleError(reason) from error
    labels = task.model.labels if task.needs.labels else None
    if labels is not None and len(labels) != encoder.outputs:
        raise BundleError(
            f"{path / CONFIG_FILE}: expected a label for each logit of the weights ({encoder.outputs}), got "
            f"{len(labels)}"
        )
    return encoder
