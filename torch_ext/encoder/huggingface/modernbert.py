"""ModernBERT: norms first, rotary positions, windows, gated feed-forward parts."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch_ext.encoder.huggingface.architecture import Architecture, HeadNames, get, number, whole

__all__ = ["MODERNBERT"]


def _half_window(config: Any) -> int:
    """Tokens that local layers see to each side."""
    window = whole(config, "local_attention") // 2
    if window < 1:
        raise ValueError(
            f"unsupported configuration: expected local_attention of at least 2, got {config.local_attention}: tokens "
            "that see themselves alone"
        )
    return window


def _rotary(config: Any) -> dict[str, float]:
    """The bases of rotary positions, in global and in local layers.

    transformers 5 has ``rope_parameters`` for them, by kind of layer, transformers 4 has fields of their own.
    """
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        scaling = getattr(config, "rope_scaling", None)
        if scaling is not None:
            raise ValueError(f"unsupported configuration: expected rope_scaling=None, got {scaling!r:.200}")
        local = 0.0 if get(config, "local_rope_theta") is None else number(config, "local_rope_theta")
        return {"rotary_theta": number(config, "global_rope_theta"), "rotary_theta_local": local}
    by_kind = parameters if isinstance(parameters, dict) else {}
    kinds = [by_kind.get(kind) for kind in ("full_attention", "sliding_attention")]
    bases = [kind.get("rope_theta") for kind in kinds if isinstance(kind, dict) and _is_plain(kind)]
    if len(bases) != 2 or not all(isinstance(base, int | float) for base in bases):
        raise ValueError(
            "unsupported configuration: expected rope_parameters with rope_type='default' and rope_theta for "
            f"full_attention and sliding_attention, got {parameters!r:.200}"
        )
    return dict(zip(("rotary_theta", "rotary_theta_local"), map(float, bases), strict=True))  # type: ignore[arg-type]


def _is_plain(kind: dict[str, Any]) -> bool:
    return kind.keys() == {"rope_type", "rope_theta"} and kind["rope_type"] == "default"


def _global_every(config: Any) -> int:
    """Every how many layers one sees all tokens, from the first one on.

    transformers 5 lists the kinds of all layers, transformers 4 has a field for it.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return whole(config, "global_attn_every_n_layers")
    kinds = list(kinds)
    every = next((index for index, kind in enumerate(kinds) if index and kind == "full_attention"), max(1, len(kinds)))
    if kinds != ["sliding_attention" if index % every else "full_attention" for index in range(len(kinds))]:
        raise ValueError(
            "unsupported configuration: expected layer_types with full_attention in every n-th layer from the first "
            f"one on and sliding_attention in all others, got {kinds!r:.200}"
        )
    return every


_TOKENS = HeadNames(out="classifier", dense="head.dense", norm="head.norm", activation="config.classifier_activation")

MODERNBERT = Architecture(
    base="model",
    layer="layers.{}",
    qkv=("attn.Wqkv",),
    out="attn.Wo",
    attention_norm="attn_norm",
    up="mlp.Wi",
    down="mlp.Wo",
    ffn_norm="mlp_norm",
    heads={
        "text-classification": dataclasses.replace(_TOKENS, pooling="config.classifier_pooling"),
        "token-classification": _TOKENS,
        "question-answering": _TOKENS,
        "fill-mask": dataclasses.replace(_TOKENS, out="decoder", tied=True),
    },
    word="embeddings.tok_embeddings",
    position=None,
    token_type=None,
    embedding_norm="embeddings.norm",
    final_norm="final_norm",
    optional_biases=True,
    fields={"activation": "hidden_activation", "layer_norm_eps": "norm_eps"},
    defaults={
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "classifier_activation": "gelu",
        "classifier_pooling": "cls",
    },
    more=lambda config: {
        "absolute_positions": False,
        "max_positions": whole(config, "max_position_embeddings"),
        **_rotary(config),
        "window": _half_window(config),
        "global_every": _global_every(config),
        "norm_first": True,
        "norm_first_attention": False,
        "gated_ffn": True,
    },
)
