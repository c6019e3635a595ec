"""NomicBERT: norms last, rotary positions, gated feed-forward parts, no biases but in heads."""

from __future__ import annotations

import dataclasses

from torch_ext.encoder.huggingface.architecture import Architecture, HeadNames, rotary_base, whole
from torch_ext.encoder.huggingface.bert import BERT, TOKENS

__all__ = ["NOMIC"]


# As transformers 5 has them in memory; files have the names of the model's own code.
_IN_MEMORY = Architecture(
    base="nomic_bert",
    layer="layers.{}",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    attention_norm="post_attention_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    ffn_norm="post_mlp_layernorm",
    heads={
        "text-classification": BERT.heads["text-classification"],
        "token-classification": TOKENS,
        "fill-mask": HeadNames(
            out="cls.predictions.decoder",
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.layer_norm",
            activation="config.hidden_act",
            tied=True,
            bias="cls.predictions.bias",
        ),
    },
    position=None,
    optional_biases=True,
    defaults={"hidden_act": "silu", "layer_norm_eps": 1e-12, "rotary_emb_base": 1000},
    older={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps",
    },
    more=lambda config: {
        "absolute_positions": False,
        "max_positions": whole(config, "max_position_embeddings"),
        "rotary_theta": rotary_base(config),
        "gated_ffn": True,
    },
    options={
        "activation_function": "swiglu",
        "causal": False,
        "parallel_block": False,
        "prenorm": False,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "use_rms_norm": False,
    },
)

NOMIC = dataclasses.replace(
    _IN_MEMORY,
    layer="encoder.layers.{}",
    qkv=("attn.Wqkv",),
    out="attn.out_proj",
    attention_norm="norm1",
    up=("mlp.fc12", "mlp.fc11"),
    down="mlp.fc2",
    ffn_norm="norm2",
    embedding_norm="emb_ln",
    other_names=_IN_MEMORY,
)
