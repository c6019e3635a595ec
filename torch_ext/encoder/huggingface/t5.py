"""The encoders of T5: RMS norms first, biases of scores by distance, no scale of scores, no other biases."""

from __future__ import annotations

from typing import Any

from torch_ext.encoder.huggingface.architecture import Architecture, whole

__all__ = ["T5"]


def _activation(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of ``feed_forward_proj``."""
    name = str(config["feed_forward_proj"])
    kind = name.removeprefix("gated-")
    return {
        "is_gated_act": name.startswith("gated-"),
        "dense_act_fn": "gelu_new" if name == "gated-gelu" else kind,
    }


def _more(config: Any) -> dict[str, Any]:
    heads, size = whole(config, "num_heads"), whole(config, "d_kv")
    return {
        "absolute_positions": False,
        # The model takes any length; what it was trained with is called as here, or not written down.
        "max_positions": getattr(config, "n_positions", 512),
        "norm_first": True,
        "embedding_norm": False,
        "rms_norm": True,
        "gated_ffn": bool(config.is_gated_act),
        "head_size": 0 if heads * size == config.d_model else size,
        "attention_scale": 1.0,
        "relative_attention_buckets": whole(config, "relative_attention_num_buckets"),
        "relative_attention_max_distance": whole(config, "relative_attention_max_distance"),
    }


T5 = Architecture(
    base="transformer",
    layer="encoder.block.{}",
    qkv=("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
    out="layer.0.SelfAttention.o",
    attention_norm="layer.0.layer_norm",
    up="layer.1.DenseReluDense.wi",
    down="layer.1.DenseReluDense.wo",
    ffn_norm="layer.1.layer_norm",
    heads={},
    word="shared",
    position=None,
    token_type=None,
    embedding_norm=None,
    relative_bias="encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    final_norm="encoder.final_layer_norm",
    optional_biases=True,
    fields={
        "hidden_size": "d_model",
        "num_layers": "num_layers",
        "num_heads": "num_heads",
        "intermediate_size": "d_ff",
        "activation": "dense_act_fn",
        "layer_norm_eps": "layer_norm_epsilon",
    },
    defaults={
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    },
    variant=lambda config: (
        {"up": ("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1")} if config.is_gated_act else {}
    ),
    spare=("encoder.embed_tokens.weight",),
    more=_more,
    read=_activation,
)
