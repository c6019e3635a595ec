"""What a manifest says of the stages behind the encoder, beside its head and its pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploy.bundle.fields import Reader

__all__ = ["DENSE_ACTIVATIONS", "DENSE_FILE", "Dense", "Sparse"]

DENSE_FILE = "dense.npz"
"""Weights of the linear stages, for the ONNX variants; those of torch_ext have them in their own files."""

DENSE_ACTIVATIONS = ("none", "tanh", "relu", "silu", "gelu")

_STRATEGIES = ("max", "sum")
_ACTIVATIONS = ("relu", "log1p_relu")


@dataclass(frozen=True)
class Dense:
    """A linear stage behind the pooling, before embeddings get length 1.

    Attributes:
        outputs: Width of what it makes.
        activation: One of `DENSE_ACTIVATIONS`.
        folder: Where its weights are, if they are in the model's folder and not in the bundle; it is not written.
    """

    outputs: int
    activation: str
    folder: str | None = None

    @classmethod
    def read(cls, reader: Reader) -> Dense:
        """Reads its JSON object."""
        return cls(reader.count("outputs", 1), reader.choice("activation", DENSE_ACTIVATIONS))

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {"outputs": self.outputs, "activation": self.activation}


@dataclass(frozen=True)
class Sparse:
    """How logits of tokens become one sparse vector per text, in the words of sentence-transformers' SpladePooling.

    Attributes:
        strategy: `max` or `sum` over the tokens.
        activation: `relu` for log(1 + max(x, 0)), or `log1p_relu` for log(1 + x) of that again.
    """

    strategy: str = "max"
    activation: str = "relu"

    @property
    def total(self) -> bool:
        """Whether tokens are added up."""
        return self.strategy == "sum"

    @property
    def twice(self) -> bool:
        """Whether the logarithm is taken twice."""
        return self.activation == "log1p_relu"

    @classmethod
    def read(cls, reader: Reader) -> Sparse:
        """Reads its JSON object, a manifest's or that of sentence-transformers."""
        return cls(reader.choice("strategy", _STRATEGIES, "max"), reader.choice("activation", _ACTIVATIONS, "relu"))

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {"strategy": self.strategy, "activation": self.activation}
