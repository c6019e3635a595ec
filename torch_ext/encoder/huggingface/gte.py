"""GTE of 2024 and later, whose code is on the hub ("new"): norms last, rotary positions, gated feed-forward parts."""

from __future__ import annotations

from typing import Any

from torch_ext.encoder.huggingface.architecture import Architecture, HeadNames, number, whole
from torch_ext.encoder.huggingface.bert import BERT, TOKENS

__all__ = ["NEW"]


def _rotary(config: Any) -> dict[str, Any]:
    """The base of rotary positions and the factor of angles; ``ntk`` changes both."""
    theta, scaling = number(config, "rope_theta"), config.rope_scaling
    if scaling is None:
        return {"rotary_theta": theta}
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else None
    if not isinstance(factor, int | float) or factor <= 0 or kind != "ntk" or scaling.get("mixed_b") is not None:
        raise ValueError(
            "unsupported configuration: expected rope_scaling of type 'ntk' with a factor and without mixed_b, or "
            f"none, got {scaling!r:.200}"
        )
    size = whole(config, "hidden_size") // whole(config, "num_attention_heads")
    return {"rotary_theta": theta * factor, "rotary_factor": float(factor) ** (-2 / size)}


NEW = Architecture(
    base="new",
    layer="encoder.layer.{}",
    qkv=("attention.qkv_proj",),
    out="attention.o_proj",
    attention_norm="attn_ln",
    up="mlp.up_gate_proj",
    gate_last=True,
    down="mlp.down_proj",
    ffn_norm="mlp_ln",
    heads={
        "text-classification": BERT.heads["text-classification"],
        "token-classification": TOKENS,
        "fill-mask": HeadNames(
            out="lm_head.decoder",
            dense="lm_head.dense",
            norm="lm_head.norm",
            activation="config.hidden_act",
            tied=True,
        ),
    },
    position=None,
    optional_biases=True,
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "type_vocab_size": 1,
        "pack_qkv": True,
    },
    variant=lambda config: {
        "token_type": BERT.token_type if config.type_vocab_size else None,
        "qkv": ("attention.qkv_proj",)
        if config.pack_qkv
        else ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    },
    more=lambda config: {
        "absolute_positions": False,
        "max_positions": whole(config, "max_position_embeddings"),
        "gated_ffn": True,
        **_rotary(config),
    },
    options={"position_embedding_type": "rope", "layer_norm_type": "layer_norm", "logn_attention_scale": False},
)
