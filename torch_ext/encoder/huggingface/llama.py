"""Norms first and RMS norms, rotary positions, gated feed-forward parts, shared keys: Qwen3, Gemma 3 and EuroBERT."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch_ext.encoder.huggingface.architecture import Architecture, HeadNames, number, rotary_base, whole

__all__ = ["EUROBERT", "GEMMA3", "QWEN3"]


def _heads(config: Any) -> dict[str, Any]:
    heads, keys = whole(config, "num_attention_heads"), getattr(config, "num_key_value_heads", None)
    size = getattr(config, "head_dim", None)
    return {
        "num_kv_heads": 0 if keys in (None, heads) else whole(config, "num_key_value_heads"),
        "head_size": 0 if size is None or size * heads == config.hidden_size else whole(config, "head_dim"),
    }


def _common(config: Any) -> dict[str, Any]:
    return {
        "absolute_positions": False,
        "max_positions": whole(config, "max_position_embeddings"),
        "norm_first": True,
        "embedding_norm": False,
        "rms_norm": True,
        "gated_ffn": True,
        "rotary_theta": rotary_base(config, "rope_theta", "full_attention"),
        **_heads(config),
    }


def _all_full(config: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and set(kinds) != {"full_attention"}:
        raise ValueError(f"unsupported configuration: expected layer_types of full_attention, got {kinds!r:.200}")


def _qwen3(config: Any) -> dict[str, Any]:
    _all_full(config)
    return {**_common(config), "head_norms": True, "causal": True}


EUROBERT = Architecture(
    base="model",
    layer="layers.{}",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    attention_norm="input_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    ffn_norm="post_attention_layernorm",
    heads={},
    word="embed_tokens",
    position=None,
    token_type=None,
    embedding_norm=None,
    final_norm="norm",
    optional_biases=True,
    fields={"layer_norm_eps": "rms_norm_eps"},
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 250000.0,
        "max_position_embeddings": 8192,
        "num_key_value_heads": None,
    },
    more=_common,
    options={"pretraining_tp": 1},
)

QWEN3 = dataclasses.replace(
    EUROBERT,
    heads={
        "text-classification": HeadNames(out="score", pooling="lasttoken"),
        "token-classification": HeadNames(out="score"),
    },
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "head_dim": 128,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    more=_qwen3,
    options={"use_sliding_window": False},
)


def _gemma3_kinds(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of ``config.json``: the kinds of layers, and the window of both sides."""
    changed: dict[str, Any] = {}
    if config.get("layer_types") is None:
        every, layers = config.get("sliding_window_pattern") or 6, config["num_hidden_layers"]
        changed["layer_types"] = [
            "sliding_attention" if (index + 1) % every else "full_attention" for index in range(layers)
        ]
    if config["use_bidirectional_attention"]:
        changed["sliding_window"] = config["sliding_window"] // 2 + 1
    return changed


def _gemma3_layers(config: Any) -> dict[str, Any]:
    """Which layers are global: every n-th, from one on."""
    kinds = list(config.layer_types)
    if "sliding_attention" not in kinds:
        return {}
    fulls = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    every = fulls[1] - fulls[0] if len(fulls) > 1 else max(len(kinds), *(2 * index + 1 for index in fulls), 1)
    first = fulls[0] if fulls else len(kinds)
    if not fulls:
        every = len(kinds) + 1
    expected = ["full_attention" if index % every == first else "sliding_attention" for index in range(len(kinds))]
    if first >= every or kinds != expected:
        raise ValueError(
            "unsupported configuration: expected layer_types with full_attention in every n-th layer and "
            f"sliding_attention in all others, got {kinds!r:.200}"
        )
    return {
        "window": whole(config, "sliding_window") - 1,
        "global_every": every,
        "global_first": first,
        "rotary_theta_local": rotary_base(config, "rope_local_base_freq", "sliding_attention"),
    }


def _gemma3(config: Any) -> dict[str, Any]:
    return {
        **_common(config),
        **_gemma3_layers(config),
        "head_norms": True,
        "post_norms": True,
        "causal": not config.use_bidirectional_attention,
        "attention_scale": number(config, "query_pre_attn_scalar") ** -0.5,
        "embedding_scale": config.hidden_size**0.5,
    }


GEMMA3 = dataclasses.replace(
    EUROBERT,
    ffn_norm="pre_feedforward_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    attention_post_norm="post_attention_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
    norm_shift=1.0,
    fields={"activation": "hidden_activation", "layer_norm_eps": "rms_norm_eps"},
    defaults={
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "use_bidirectional_attention": False,
    },
    more=_gemma3,
    read=_gemma3_kinds,
    options={"attn_logit_softcapping": None},
)
