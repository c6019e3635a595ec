"""Encoders and heads out of Hugging Face models, by their configuration and the names of their weights.

Looks at a model's attributes only: the transformers package is not needed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.encoder.spec import EncoderSpec, HeadSpec

__all__ = ["ARCHITECTURES", "read_encoder", "read_head"]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


@dataclasses.dataclass(frozen=True)
class _Names:
    """Where an architecture keeps its weights (``{}`` is the layer), and what its configuration calls things."""

    layer: str
    qkv: tuple[str, str, str]
    out: str
    attention_norm: str
    up: str
    down: str
    ffn_norm: str
    token_types: bool = True
    hidden_size: str = "hidden_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    intermediate_size: str = "intermediate_size"
    activation: str = "hidden_act"
    layer_norm_eps: str | None = "layer_norm_eps"
    offset_positions: bool = False


_BERT = _Names(
    layer="encoder.layer.{}",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    ffn_norm="output.LayerNorm",
)
_ROBERTA = dataclasses.replace(_BERT, offset_positions=True)
_DISTILBERT = _Names(
    layer="transformer.layer.{}",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    ffn_norm="output_layer_norm",
    token_types=False,
    hidden_size="dim",
    num_layers="n_layers",
    num_heads="n_heads",
    intermediate_size="hidden_dim",
    activation="activation",
    layer_norm_eps=None,
)

_NAMES = {"bert": _BERT, "roberta": _ROBERTA, "xlm-roberta": _ROBERTA, "camembert": _ROBERTA, "distilbert": _DISTILBERT}

ARCHITECTURES: tuple[str, ...] = tuple(_NAMES)

# DistilBERT's configuration does not say; its code does.
_DISTILBERT_EPS = 1e-12

# Buffers, and what belongs to heads.
_IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.weight", "pooler.dense.bias")


def _read_config(model: nn.Module) -> tuple[Any, _Names]:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or not isinstance(model_type, str):
        raise TypeError(
            f"expected a Hugging Face model (an nn.Module with config.model_type), got {type(model).__name__}"
        )
    if model_type not in _NAMES:
        raise ValueError(
            f"unsupported architecture {model_type!r}; supported: {', '.join(_NAMES)}. Another model still gains from "
            "torch_ext.optimize(model)"
        )
    for name, wanted in (
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("position_embedding_type", "absolute"),
    ):
        value = getattr(config, name, wanted)
        if value != wanted:
            raise ValueError(f"unsupported configuration: expected {name}={wanted!r}, got {value!r}")
    return config, _NAMES[model_type]


def _activation(config: Any, name: str) -> str:
    value = getattr(config, name)
    if value not in _ACTIVATIONS:
        raise ValueError(f"unsupported activation {value!r}; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def read_encoder(model: nn.Module) -> tuple[EncoderSpec, dict[str, Tensor]]:
    """The specification and weights of a model's encoder.

    Raises:
        TypeError: ``model`` has no transformers configuration.
        ValueError: the architecture, or an option of it, is not supported; the message says what is.
    """
    config, names = _read_config(model)
    base = getattr(model, str(getattr(model, "base_model_prefix", "")) or "", model)
    source: dict[str, Tensor] = dict(base.state_dict())
    layers = int(getattr(config, names.num_layers))
    taken: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in source:
            raise ValueError(f"{type(model).__name__} has no {name}: is it a plain {config.model_type} encoder?")
        taken.add(name)
        return source[name]

    offset = 0
    if names.offset_positions:
        offset = int(config.pad_token_id) + 1
    position = take("embeddings.position_embeddings.weight")
    weights = {
        "embeddings.word": take("embeddings.word_embeddings.weight"),
        "embeddings.position": position,
        "embeddings.norm.weight": take("embeddings.LayerNorm.weight"),
        "embeddings.norm.bias": take("embeddings.LayerNorm.bias"),
    }
    type_vocab_size = 0
    if names.token_types:
        weights["embeddings.token_type"] = take("embeddings.token_type_embeddings.weight")
        type_vocab_size = weights["embeddings.token_type"].shape[0]
    for index in range(layers):
        prefix = names.layer.format(index)
        for kind in ("weight", "bias"):
            weights[f"layers.{index}.attention.qkv.{kind}"] = torch.cat(
                [take(f"{prefix}.{part}.{kind}") for part in names.qkv]
            )
            for part, name in (
                ("attention.out", names.out),
                ("attention.norm", names.attention_norm),
                ("ffn.up", names.up),
                ("ffn.down", names.down),
                ("ffn.norm", names.ffn_norm),
            ):
                weights[f"layers.{index}.{part}.{kind}"] = take(f"{prefix}.{name}.{kind}")
    left = sorted(source.keys() - taken - set(_IGNORED))
    if left:
        raise ValueError(
            f"{type(model).__name__} has weights that a plain {config.model_type} encoder has not (adapters?): "
            f"{', '.join(left[:5])}{' ...' if len(left) > 5 else ''}"
        )
    spec = EncoderSpec(
        architecture=config.model_type,
        hidden_size=int(getattr(config, names.hidden_size)),
        num_layers=layers,
        num_heads=int(getattr(config, names.num_heads)),
        intermediate_size=int(getattr(config, names.intermediate_size)),
        activation=_activation(config, names.activation),
        max_positions=position.shape[0] - offset,
        position_offset=offset,
        layer_norm_eps=float(getattr(config, names.layer_norm_eps)) if names.layer_norm_eps else _DISTILBERT_EPS,
        vocab_size=weights["embeddings.word"].shape[0],
        type_vocab_size=type_vocab_size,
    )
    return spec, weights


# Per kind of head: task, dense layer, norm, output layer, activation ("config": the encoder's).
_HEADS: tuple[tuple[str, str, str | None, str, str], ...] = (
    ("text-classification", "{base}.pooler.dense", None, "classifier", "tanh"),
    ("text-classification", "classifier.dense", None, "classifier.out_proj", "tanh"),
    ("text-classification", "pre_classifier", None, "classifier", "relu"),
    (
        "fill-mask",
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        "config",
    ),
    ("fill-mask", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "gelu"),
    ("fill-mask", "vocab_transform", "vocab_layer_norm", "vocab_projector", "config"),
)


def read_head(model: nn.Module) -> tuple[HeadSpec, dict[str, Tensor]]:
    """The specification and weights of a model's head.

    Raises:
        TypeError: ``model`` has no transformers configuration.
        ValueError: the model has no head that is supported.
    """
    config, names = _read_config(model)
    base = str(getattr(model, "base_model_prefix", ""))
    source: dict[str, Tensor] = dict(model.state_dict())
    for task, dense, norm, out, activation in _HEADS:
        parts = {"dense": dense.format(base=base), "out": out}
        if norm is not None:
            parts["norm"] = norm
        keys = {f"head.{part}.{kind}": f"{name}.{kind}" for part, name in parts.items() for kind in ("weight", "bias")}
        others = [key for key in source if not key.startswith(f"{base}.") and key not in keys.values()]
        # RoBERTa and BERT list the output bias twice; anything else is a head of another kind.
        if any(key not in source for key in keys.values()) or set(others) - {"lm_head.bias", "cls.predictions.bias"}:
            continue
        weights = {name: source[key] for name, key in keys.items()}
        eps = float(getattr(config, names.layer_norm_eps)) if names.layer_norm_eps else _DISTILBERT_EPS
        return (
            HeadSpec(
                task=task,
                hidden_size=int(getattr(config, names.hidden_size)),
                activation=_activation(config, names.activation) if activation == "config" else activation,
                norm=norm is not None,
                layer_norm_eps=eps,
                num_outputs=weights["head.out.weight"].shape[0],
            ),
            weights,
        )
    raise ValueError(
        f"{type(model).__name__} has no supported head; supported: *ForSequenceClassification and *ForMaskedLM of "
        f"{', '.join(_NAMES)}"
    )
