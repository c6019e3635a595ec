"""Jina's XLM-RoBERTa (jina-embeddings-v3): rotary positions instead of a table; see adapters.py for its tasks."""

from __future__ import annotations

import dataclasses

from torch_ext.encoder.huggingface.architecture import rotary_base, whole
from torch_ext.encoder.huggingface.bert import ROBERTA

__all__ = ["JINA_V3", "XLM_ROBERTA_FLASH"]


# As transformers 5 has them in memory; files have the names of the model's own code.
_IN_MEMORY = dataclasses.replace(
    ROBERTA,
    layer="layers.{}",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    attention_norm="post_attention_layernorm",
    up="mlp.fc1",
    down="mlp.fc2",
    ffn_norm="post_mlp_layernorm",
    position=None,
    padding_index=None,
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 8194,
        "type_vocab_size": 1,
        "rotary_emb_base": 20000.0,
    },
    more=lambda config: {
        "absolute_positions": False,
        "max_positions": whole(config, "max_position_embeddings"),
        "rotary_theta": rotary_base(config),
    },
)

JINA_V3 = dataclasses.replace(
    _IN_MEMORY,
    layer="encoder.layers.{}",
    qkv=("mixer.Wqkv",),
    out="mixer.out_proj",
    attention_norm="norm1",
    ffn_norm="norm2",
    embedding_norm="emb_ln",
    other_names=_IN_MEMORY,
)

# The same as the model's own code calls it: an XLM-RoBERTa, but for its position_embedding_type.
XLM_ROBERTA_FLASH = dataclasses.replace(
    JINA_V3,
    defaults={**JINA_V3.defaults, "layer_norm_eps": 1e-5, "rotary_emb_base": 10000.0, "use_flash_attn": True},
    options={"position_embedding_type": "rotary"},
)
