"""BERT-family encoders without padding: a batch of texts is one ``[total_tokens, hidden]`` matrix.

Built from a specification (:class:`EncoderSpec`) and named weights, not from one class per model. Neither importing
this package nor loading a saved encoder needs the transformers package.
"""

from __future__ import annotations

from torch_ext.encoder.huggingface import ARCHITECTURES
from torch_ext.encoder.model import Encoder, Head, LayerWeights
from torch_ext.encoder.spec import Dtype, EncoderSpec, HeadSpec

__all__ = ["ARCHITECTURES", "Dtype", "Encoder", "EncoderSpec", "Head", "HeadSpec", "LayerWeights"]
