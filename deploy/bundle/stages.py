"""What a manifest says of the stages behind the encoder, beside its head and its pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploy.bundle.fields import Reader

__all__ = ["Sparse"]

_STRATEGIES = ("max", "sum")
_ACTIVATIONS = ("relu", "log1p_relu")


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
