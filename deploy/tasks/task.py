"""What all tasks have in common, and what they are given: a model's description, and states that an engine computed.

Standard library only, also where tasks answer: a server of torch_ext's variants has no numpy. What is heavy is asked of
the `States`, which compute in C++ or, in engines that have it anyway, with numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .bounds import CLOSE_COSINE, LOGIT_BOUNDS
from .described import Described, ModelFolder
from .rows import Ids, Rows

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = [
    "LOGITS_BYTES",
    "RAW",
    "Described",
    "ModelFolder",
    "Needs",
    "States",
    "Task",
    "TaskError",
    "not_finite",
    "prompted",
]


class TaskError(ValueError):
    """A model or its texts do not fit the task; the message says what was expected, what came, and what to do."""


class _Raw:
    """The type of `RAW`."""

    def __repr__(self) -> str:
        return "RAW"


RAW = _Raw()
"""Options of a text whose answer is what the model computed for it, before any activation: logits, f32, as rows are."""


LOGITS_BYTES = 128 << 20
"""Most memory that one call may spend on logits of tokens; a single text may take more."""


@dataclass(frozen=True)
class Needs:
    """What a task needs of a model and of its tokenizer. The manifest has a field for each.

    Attributes:
        head: A head behind the encoder.
        pooling: How hidden states become one embedding per text.
        labels: Names of classes, and how their logits are read.
        mask_token: A mask token.
        pairs: Each input is a pair of texts.
        sparse: How logits of tokens become one sparse vector per text.
        token_vectors: Which tokens of a text have a vector.
    """

    head: bool = False
    pooling: bool = False
    labels: bool = False
    mask_token: bool = False
    pairs: bool = False
    sparse: bool = False
    token_vectors: bool = False


class States(Protocol):
    """What an engine computed for texts that ran together; a task takes what it answers with.

    All are made when they are asked for. A text whose numbers are not finite has NaN or infinity in its rows, and
    changes no other text's: see `Rows.finite`.
    """

    @property
    def ids(self) -> Sequence[Ids]:
        """Token ids of each text."""

    def pooled(self, mode: str, normalize: bool = False, dimensions: int | None = None, skipped: int = 0) -> Rows:
        """One vector per text, f32 [texts, dimensions], behind the model's linear stages.

        Args:
            mode: One of the bundle's pooling modes, or several joined by `+`: their vectors stand side by side.
            normalize: Divide each vector by its L2 norm, after `dimensions`.
            dimensions: Leading dimensions to keep; None: all.
            skipped: Leading tokens of each text that do not count, such as those of a prompt; a text without others
                becomes 0.
        """

    def text_logits(self) -> Rows:
        """What the head says of each text, f32 [texts, labels]."""

    def token_logits(self, texts: Sequence[int], positions: Sequence[int]) -> Rows:
        """What the head says of some tokens, f32 [n, outputs].

        Args:
            texts: Which text each token is in [n].
            positions: Where it is there [n].
        """

    def top_k(self, texts: Sequence[int], positions: Sequence[int], k: int) -> tuple[Rows, Rows]:
        """The head's best outputs for some tokens, best first, of equal ones the first.

        Args:
            texts: Which text each token is in [n].
            positions: Where it is there [n].
            k: How many outputs; at most as many as there are, of which there is no error.

        Returns:
            Their indices, i64 [n, k], and their probabilities by softmax over all outputs, f32 [n, k]: NaN in a whole
            row if any of its logits is NaN, or infinity above 0.
        """

    def token_vectors(self) -> Sequence[tuple[Sequence[memoryview], bool]]:
        """Per text the vectors of its tokens, each f32 [hidden], and whether all are finite."""

    def projected(self, normalize: bool) -> Sequence[tuple[Sequence[memoryview], bool]]:
        """The same behind the model's linear stages, each f32 [width].

        Args:
            normalize: Divide each vector by its L2 norm.
        """

    def sparse(self, total: bool, twice: bool) -> Sequence[tuple[Sequence[int], Sequence[float]]]:
        """Per text a sparse vector over the head's outputs: indices, rising, and values of the entries that are not 0.

        A value is NaN or infinite where a logit is.

        Args:
            total: The sum over the text's tokens of log(1 + max(x, 0)), instead of the largest.
            twice: log(1 + x) of that again.
        """


def prompted(inputs: Sequence[Any], prompt: str) -> list[Any]:
    """Texts and pairs of texts with a prompt, which sentence-transformers puts before the first text of a pair."""
    return [prompt + given if isinstance(given, str) else (prompt + given[0], given[1]) for given in inputs]


def not_finite(what: str) -> FloatingPointError:
    """The answer to a text for which the model computed NaN or infinity."""
    return FloatingPointError(f"{what} is not finite; the weights or the model's input range are broken")


class Task(ABC):
    """What a model is used for. The class says what it needs; an object belongs to one bundle.

    Attributes:
        name: As manifests and the command line have it.
        needs: What a model and its tokenizer must have.
        auto_class: Class of transformers that loads such a model.
        architecture: What the names of its model classes end in.
        optimum_task: What optimum calls the task when it writes ONNX.
        answers_pairs: Whether requests may hold pairs of texts, though samples hold single ones.
        onnx_outputs: First outputs of the ONNX graph, and of the model in transformers; of several, the numbers of each
            token side by side.
        spare_weights: Parts of names of weights that a model may lack.
        close: Bounds of a variant whose answers are those of the model: such a one is served if none is named.
        usual: Options of an ordinary request.
        logits_per_token: How many logits a padded graph computes for each token; 0: hidden states at most.
        model: The manifest.
        pad_id: Token id of padding.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    auto_class: ClassVar[str]
    architecture: ClassVar[str]
    optimum_task: ClassVar[str]
    answers_pairs: ClassVar[bool] = False
    onnx_outputs: ClassVar[tuple[str, ...]] = ("logits",)
    spare_weights: ClassVar[tuple[str, ...]] = ()
    close: ClassVar[Mapping[str, float]] = CLOSE_COSINE
    usual: Any = None
    logits_per_token: int = 0

    def __init__(self, model: Described, token_text: Callable[[int], str] = str) -> None:
        self.model = model
        pad = model.special_tokens["pad"]
        self.pad_id = 0 if pad is None else pad.id

    # Of a model folder, before there is a bundle.

    @classmethod
    def read(cls, folder: ModelFolder) -> dict[str, Any]:
        """Fields of the manifest that the model's own files decide.

        Args:
            folder: What the model's folder says.

        Raises:
            TaskError: A file says what the task cannot do.
        """
        return {}

    @classmethod
    def bound_names(cls, folder: ModelFolder) -> tuple[str, ...]:
        """Which bounds the task can be held to: the figures that its `comparison` measures of such a model.

        Args:
            folder: What the model's folder says.

        Raises:
            TaskError: See `read`.
        """
        return LOGIT_BOUNDS

    @classmethod
    def takes_pairs(cls, folder: ModelFolder) -> bool:
        """Whether the model was trained on pairs of texts, so that variants are verified on pairs.

        Args:
            folder: What the model's folder says.
        """
        return cls.needs.pairs

    @classmethod
    def inputs(cls, texts: Sequence[str], folder: ModelFolder) -> list[Any]:
        """What the tokenizer is given for sample texts: a text or, where the model takes pairs, two."""
        if not cls.takes_pairs(folder):
            return list(texts)
        return cls.pairs_of(texts)

    @staticmethod
    def pairs_of(texts: Sequence[str]) -> list[tuple[str, str]]:
        """Pairs of sample texts: a text and the next one, a text and itself, unlike and alike."""
        return [(text, texts[(index + 1) % len(texts)] if index % 2 else text) for index, text in enumerate(texts)]

    # Token ids.

    def prepare(self, rows: Sequence[Any]) -> list[Any]:
        """Makes inputs of the task out of token ids of any texts; leaves out texts that cannot become one.

        Args:
            rows: Per text its token ids; per pair, where the model takes pairs, as engines take them.

        Raises:
            TaskError: No text can.
        """
        return list(rows)

    def trials(self, rows: Sequence[Any]) -> list[Any]:
        """What variants are verified with: every kind of input that a server gets.

        Args:
            rows: See `prepare`.

        Raises:
            TaskError: See `prepare`.
        """
        return self.prepare(rows)

    def cost_tokens(self, ids: Ids) -> int:
        """What a text costs, in tokens that only pass through the encoder: what a token budget counts.

        Args:
            ids: Its token ids.
        """
        return len(ids)

    # Answers.

    @abstractmethod
    def answers(self, states: States, options: Sequence[Any]) -> list[Any]:
        """What is answered to texts that ran together.

        Args:
            states: What an engine computed.
            options: Per text what its request asks for.

        Returns:
            Per text its answer, or a `FloatingPointError` where the model computed NaN or infinity.
        """

    # Accuracy.

    @property
    def exact(self) -> Any:
        """Options whose answers are compared with those of transformers."""
        return RAW

    @abstractmethod
    def comparison(self, texts: int) -> Comparison:
        """How answers with the options `exact` are compared.

        Args:
            texts: How many there are.
        """

    @abstractmethod
    def default_bounds(self, variant: str, dtype: str) -> dict[str, float]:
        """How accurate a variant has to be.

        Args:
            variant: Its name.
            dtype: Of its weights.
        """
