"""MPNet: a BERT with biases of scores by distance."""

from __future__ import annotations

from torch_ext.encoder.huggingface.architecture import Architecture
from torch_ext.encoder.huggingface.bert import ROBERTA

__all__ = ["MPNET"]

MPNET = Architecture(
    base="mpnet",
    layer="encoder.layer.{}",
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    ffn_norm="output.LayerNorm",
    heads=ROBERTA.heads,
    token_type=None,
    relative_bias="encoder.relative_attention_bias",
    # The model's code fixes its padding index, the number of buckets and their reach, whatever the configuration says.
    padding_index=lambda config: 1,
    more=lambda config: {"relative_attention_buckets": 32, "relative_attention_max_distance": 128},
    options={"relative_attention_num_buckets": 32},
)
