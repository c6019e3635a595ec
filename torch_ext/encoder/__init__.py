"""BERT-family encoders without padding: a batch of texts is one ``[total_tokens, hidden]`` matrix.

Built from a specification (:class:`EncoderSpec`) and named weights, not from one class per model. Neither importing
this package nor loading a saved encoder needs the transformers package; specifications do not need torch either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_ext._imports import lazy_names
from torch_ext.encoder.spec import Dtype, EncoderSpec, HeadSpec

if TYPE_CHECKING:
    from torch_ext.encoder.huggingface import ARCHITECTURES
    from torch_ext.encoder.model import Encoder, Head, LayerWeights

__all__ = ["ARCHITECTURES", "Dtype", "Encoder", "EncoderSpec", "Head", "HeadSpec", "LayerWeights"]

if not TYPE_CHECKING:  # Else any misspelt name would be right.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "torch_ext.encoder.huggingface": ("ARCHITECTURES",),
            "torch_ext.encoder.model": ("Encoder", "Head", "LayerWeights"),
        },
        (
            "balance",
            "calibrate",
            "files",
            "head",
            "huggingface",
            "model",
            "packing",
            "places",
            "positions",
            "reference",
            "weighted",
            "weights",
        ),
    )
