"""Norms first, none of the embeddings, biases everywhere: MegatronBERT and XLM-RoBERTa-XL."""

from __future__ import annotations

import dataclasses

from torch_ext.encoder.huggingface.bert import BERT, ROBERTA

__all__ = ["MEGATRON_BERT", "XLM_ROBERTA_XL"]

MEGATRON_BERT = dataclasses.replace(
    BERT,
    attention_norm="attention.ln",
    ffn_norm="ln",
    embedding_norm=None,
    final_norm="encoder.ln",
    more=lambda config: {"norm_first": True, "embedding_norm": False},
)

XLM_ROBERTA_XL = dataclasses.replace(
    ROBERTA,
    attention_norm="attention.self_attn_layer_norm",
    ffn_norm="LayerNorm",
    embedding_norm=None,
    final_norm="encoder.LayerNorm",
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "pad_token_id": 1},
    more=lambda config: {"norm_first": True, "embedding_norm": False},
)
