"""Encoders and heads out of Hugging Face models, by their configuration and the names of their weights.

Looks at a model's attributes only: the transformers package is not needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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


# What configurations call the fields of a specification, unless an architecture says otherwise.
_FIELDS: Mapping[str, str] = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
}

# Options that change what is computed, and the one value that is supported.
_OPTIONS: Mapping[str, Any] = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}


@dataclasses.dataclass(frozen=True)
class _HeadNames:
    """Where a head keeps its weights (``{base}`` is the encoder), and what it does with them.

    Attributes:
        out: the output layer.
        dense: the layer before it, if there is one.
        norm: the norm between them, if there is one.
        activation: after the dense layer: what Hugging Face calls it, or ``config.`` and the field that says it.
        pooling: of texts: ``cls`` or ``mean``, or ``config.`` and the field that says it.
        extra: names of the same weights, listed twice.
    """

    out: str
    dense: str | None = None
    norm: str | None = None
    activation: str = ""
    pooling: str = "cls"
    extra: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """Where an architecture keeps its weights, and what its configuration means.

    Attributes:
        layer: prefix of a layer's weights; ``{}`` is its number.
        qkv: query, key and value, one after the other, or one that holds all.
        out, attention_norm, up, down, ffn_norm: the other parts of a layer.
        heads: by task.
        word, position, token_type, embedding_norm, projection, relative_bias, final_norm: what is outside of layers.
            None: there is none. The projection is there only where the tables have another width.
        optional_biases: whether biases may be absent; they are taken for zero.
        fields: what the configuration calls fields of the specification, where it differs from BERT's. A number
            instead of a name is the value itself.
        padding_index: of models that count positions over tokens other than padding: the id of padding, and the row
            of the position table that it takes; the first token takes the next one. None: all tokens are counted, from
            row 0.
        more: further fields of the specification.
        options: options that must have one value, further to ``_OPTIONS``.
    """

    layer: str
    qkv: tuple[str, ...]
    out: str
    attention_norm: str
    up: str
    down: str
    ffn_norm: str
    heads: Mapping[str, _HeadNames]
    word: str = "embeddings.word_embeddings"
    position: str | None = "embeddings.position_embeddings"
    token_type: str | None = "embeddings.token_type_embeddings"
    embedding_norm: str = "embeddings.LayerNorm"
    projection: str = "embeddings_project"
    relative_bias: str | None = None
    final_norm: str | None = None
    optional_biases: bool = False
    fields: Mapping[str, str | float] = dataclasses.field(default_factory=dict)
    padding_index: Callable[[Any], int] | None = None
    more: Callable[[Any], dict[str, Any]] = lambda config: {}
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def value(self, config: Any, field: str) -> Any:
        """The configuration's value of a field of the specification."""
        name = self.fields.get(field, _FIELDS[field])
        return _get(config, name) if isinstance(name, str) else name


def _get(config: Any, name: str) -> Any:
    if not hasattr(config, name):
        raise ValueError(f"unsupported configuration: expected a {config.model_type} configuration with {name}")
    return getattr(config, name)


def _padding_id(config: Any) -> int:
    value = _get(config, "pad_token_id")
    if value is None:
        raise ValueError(
            f"unsupported configuration: expected pad_token_id of a {config.model_type} configuration, where positions "
            "are counted from, got None"
        )
    return int(value)


def _half_window(config: Any) -> int:
    """Tokens that ModernBERT's local layers see to each side."""
    window = int(_get(config, "local_attention")) // 2
    if window < 1:
        raise ValueError(
            f"unsupported configuration: expected local_attention of at least 2, got {config.local_attention}: tokens "
            "that see themselves alone"
        )
    return window


def _rotary(config: Any) -> dict[str, float]:
    """The bases of ModernBERT's rotary positions, in global and in local layers.

    transformers 4 has fields of their own for them, transformers 5 has ``rope_parameters``, by kind of layer.
    """
    scaling = getattr(config, "rope_scaling", None)
    if hasattr(config, "global_rope_theta"):
        if scaling is not None:
            raise ValueError(f"unsupported configuration: expected rope_scaling=None, got {scaling!r}")
        bases = float(config.global_rope_theta), float(_get(config, "local_rope_theta") or 0)
    else:
        parameters = _get(config, "rope_parameters")
        kinds = [dict(parameters.get(kind) or {}) for kind in ("full_attention", "sliding_attention")]
        if any(kind.keys() != {"rope_type", "rope_theta"} or kind["rope_type"] != "default" for kind in kinds):
            raise ValueError(
                "unsupported configuration: expected rope_parameters with rope_type='default' and rope_theta for "
                f"full_attention and sliding_attention, got {parameters!r}"
            )
        bases = float(kinds[0]["rope_theta"]), float(kinds[1]["rope_theta"])
    return dict(zip(("rotary_theta", "rotary_theta_local"), bases, strict=True))


def _global_every(config: Any) -> int:
    """Every how many layers one of ModernBERT's sees all tokens, from the first one on.

    transformers 4 has a field for it, transformers 5 lists the kinds of all layers.
    """
    if hasattr(config, "global_attn_every_n_layers"):
        return int(config.global_attn_every_n_layers)
    kinds = list(_get(config, "layer_types"))
    every = next((index for index, kind in enumerate(kinds) if index and kind == "full_attention"), max(1, len(kinds)))
    if kinds != ["sliding_attention" if index % every else "full_attention" for index in range(len(kinds))]:
        raise ValueError(
            "unsupported configuration: expected layer_types with full_attention in every n-th layer from the first "
            f"one on and sliding_attention in all others, got {kinds!r}"
        )
    return every


_TOKENS = _HeadNames(out="classifier")
_ANSWERS = _HeadNames(out="qa_outputs")

_BERT = _Architecture(
    layer="encoder.layer.{}",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    ffn_norm="output.LayerNorm",
    heads={
        "text-classification": _HeadNames(out="classifier", dense="{base}.pooler.dense", activation="tanh"),
        "token-classification": _TOKENS,
        "question-answering": _ANSWERS,
        "fill-mask": _HeadNames(
            out="cls.predictions.decoder",
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            activation="config.hidden_act",
            extra=("cls.predictions.bias",),
        ),
    },
)

_ROBERTA = dataclasses.replace(
    _BERT,
    heads={
        "text-classification": _HeadNames(out="classifier.out_proj", dense="classifier.dense", activation="tanh"),
        "token-classification": _TOKENS,
        "question-answering": _ANSWERS,
        "fill-mask": _HeadNames(
            out="lm_head.decoder",
            dense="lm_head.dense",
            norm="lm_head.layer_norm",
            activation="gelu",
            extra=("lm_head.bias",),
        ),
    },
    padding_index=lambda config: _padding_id(config),
)

_DISTILBERT = _Architecture(
    layer="transformer.layer.{}",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    ffn_norm="output_layer_norm",
    heads={
        "text-classification": _HeadNames(out="classifier", dense="pre_classifier", activation="relu"),
        "token-classification": _TOKENS,
        "question-answering": _ANSWERS,
        "fill-mask": _HeadNames(
            out="vocab_projector", dense="vocab_transform", norm="vocab_layer_norm", activation="config.activation"
        ),
    },
    token_type=None,
    fields={
        "hidden_size": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "activation": "activation",
        "layer_norm_eps": 1e-12,  # The configuration does not say; the model's code does.
    },
)

_ELECTRA = dataclasses.replace(
    _BERT,
    heads={
        "text-classification": _HeadNames(out="classifier.out_proj", dense="classifier.dense", activation="gelu"),
        "token-classification": _TOKENS,
        "question-answering": _ANSWERS,
        "fill-mask": _HeadNames(
            out="generator_lm_head",
            dense="generator_predictions.dense",
            norm="generator_predictions.LayerNorm",
            activation="gelu",
        ),
    },
)

_MPNET = _Architecture(
    layer="encoder.layer.{}",
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    ffn_norm="output.LayerNorm",
    heads=_ROBERTA.heads,
    token_type=None,
    relative_bias="encoder.relative_attention_bias",
    # The model's code fixes its padding index, the number of buckets and their reach, whatever the configuration says.
    padding_index=lambda config: 1,
    more=lambda config: {"relative_attention_buckets": 32, "relative_attention_max_distance": 128},
    options={"relative_attention_num_buckets": 32},
)

_MODERNBERT_TOKENS = _HeadNames(
    out="classifier", dense="head.dense", norm="head.norm", activation="config.classifier_activation"
)

_MODERNBERT = _Architecture(
    layer="layers.{}",
    qkv=("attn.Wqkv",),
    out="attn.Wo",
    attention_norm="attn_norm",
    up="mlp.Wi",
    down="mlp.Wo",
    ffn_norm="mlp_norm",
    heads={
        "text-classification": dataclasses.replace(_MODERNBERT_TOKENS, pooling="config.classifier_pooling"),
        "token-classification": _MODERNBERT_TOKENS,
        "question-answering": _MODERNBERT_TOKENS,
        "fill-mask": dataclasses.replace(_MODERNBERT_TOKENS, out="decoder"),
    },
    word="embeddings.tok_embeddings",
    position=None,
    token_type=None,
    embedding_norm="embeddings.norm",
    final_norm="final_norm",
    optional_biases=True,
    fields={"activation": "hidden_activation", "layer_norm_eps": "norm_eps"},
    more=lambda config: {
        "absolute_positions": False,
        "max_positions": int(_get(config, "max_position_embeddings")),
        **_rotary(config),
        "window": _half_window(config),
        "global_every": _global_every(config),
        "norm_first": True,
        "norm_first_attention": False,
        "gated_ffn": True,
    },
)

_ARCHITECTURES: Mapping[str, _Architecture] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": _DISTILBERT,
    "electra": _ELECTRA,
    "mpnet": _MPNET,
    "modernbert": _MODERNBERT,
}

ARCHITECTURES: tuple[str, ...] = tuple(_ARCHITECTURES)

# Tasks by what the names of their classes end in.
_TASKS: Mapping[str, str] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}

# Buffers, and what belongs to heads.
_IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.weight", "pooler.dense.bias")


def _read_config(model: nn.Module) -> tuple[Any, _Architecture]:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or not isinstance(model_type, str):
        raise TypeError(
            f"expected a Hugging Face model (an nn.Module with config.model_type), got {type(model).__name__}"
        )
    if model_type not in _ARCHITECTURES:
        raise ValueError(
            f"unsupported architecture {model_type!r}; supported: {', '.join(ARCHITECTURES)}. Another model still "
            "gains from torch_ext.optimize(model)"
        )
    architecture = _ARCHITECTURES[model_type]
    for name, wanted in {**_OPTIONS, **architecture.options}.items():
        value = getattr(config, name, wanted)
        if value != wanted:
            raise ValueError(f"unsupported configuration: expected {name}={wanted!r}, got {value!r}")
    return config, architecture


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"unsupported activation {name!r}; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


class _Source:
    """The weights of a model, taken one by one, so that what is left shows."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], what: str, optional_biases: bool) -> None:
        self.weights, self._owner, self._what = weights, type(model).__name__, what
        self._optional_biases = optional_biases
        self.taken: set[str] = set()

    def take(self, name: str) -> Tensor:
        if name not in self.weights:
            raise ValueError(f"{self._owner} has no {name}: is it a plain {self._what}?")
        self.taken.add(name)
        weight = self.weights[name]
        # Encoders are made of fp32 and bf16.
        return weight.float() if weight.dtype in (torch.float16, torch.float64) else weight

    def pair(self, to: str, *names: str) -> dict[str, Tensor]:
        """Weight and bias of a linear layer or a norm, or of several that become one."""
        weights = [self.take(f"{name}.weight") for name in names]
        biases = [
            weight.new_zeros(weight.shape[0])
            if self._optional_biases and f"{name}.bias" not in self.weights
            else self.take(f"{name}.bias")
            for name, weight in zip(names, weights, strict=True)
        ]
        return {f"{to}.weight": torch.cat(weights), f"{to}.bias": torch.cat(biases)}


def read_encoder(model: nn.Module) -> tuple[EncoderSpec, dict[str, Tensor]]:
    """The specification and weights of a model's encoder.

    Raises:
        TypeError: ``model`` has no transformers configuration.
        ValueError: the architecture, or an option of it, is not supported; the message says what is.
    """
    config, names = _read_config(model)
    base = getattr(model, str(getattr(model, "base_model_prefix", "")) or "", model)
    source = _Source(model, dict(base.state_dict()), f"{config.model_type} encoder", names.optional_biases)
    weights = {"embeddings.word": source.take(f"{names.word}.weight")}
    padding = -1 if names.padding_index is None else names.padding_index(config)
    fields: dict[str, Any] = {
        "position_offset": padding + 1,
        "padding_id": padding,
        "vocab_size": weights["embeddings.word"].shape[0],
        "type_vocab_size": 0,
    }
    if names.position is not None:
        weights["embeddings.position"] = source.take(f"{names.position}.weight")
        fields["max_positions"] = weights["embeddings.position"].shape[0] - fields["position_offset"]
    if names.token_type is not None:
        weights["embeddings.token_type"] = source.take(f"{names.token_type}.weight")
        fields["type_vocab_size"] = weights["embeddings.token_type"].shape[0]
    weights.update(source.pair("embeddings.norm", names.embedding_norm))
    if f"{names.projection}.weight" in source.weights:
        weights.update(source.pair("embeddings.projection", names.projection))
        fields["embedding_size"] = weights["embeddings.word"].shape[1]
    if names.relative_bias is not None:
        weights["relative_attention_bias"] = source.take(f"{names.relative_bias}.weight")
    spec = EncoderSpec(
        architecture=config.model_type,
        hidden_size=int(names.value(config, "hidden_size")),
        num_layers=int(names.value(config, "num_layers")),
        num_heads=int(names.value(config, "num_heads")),
        intermediate_size=int(names.value(config, "intermediate_size")),
        activation=_activation(names.value(config, "activation")),
        layer_norm_eps=float(names.value(config, "layer_norm_eps")),
        **{**fields, **names.more(config)},
    )
    for index in range(spec.num_layers):
        to, prefix = f"layers.{index}", names.layer.format(index)
        weights.update(source.pair(f"{to}.attention.qkv", *(f"{prefix}.{part}" for part in names.qkv)))
        weights.update(source.pair(f"{to}.attention.out", f"{prefix}.{names.out}"))
        if index or spec.norm_first_attention:
            weights.update(source.pair(f"{to}.attention.norm", f"{prefix}.{names.attention_norm}"))
        weights.update(source.pair(f"{to}.ffn.up", f"{prefix}.{names.up}"))
        weights.update(source.pair(f"{to}.ffn.down", f"{prefix}.{names.down}"))
        weights.update(source.pair(f"{to}.ffn.norm", f"{prefix}.{names.ffn_norm}"))
    if names.final_norm is not None:
        weights.update(source.pair("final_norm", names.final_norm))
    left = sorted(source.weights.keys() - source.taken - set(_IGNORED))
    if left:
        raise ValueError(
            f"{type(model).__name__} has weights that a plain {config.model_type} encoder has not (adapters?): "
            f"{', '.join(left[:5])}{' ...' if len(left) > 5 else ''}"
        )
    return spec, weights


def read_head(model: nn.Module) -> tuple[HeadSpec, dict[str, Tensor]]:
    """The specification and weights of a model's head.

    Raises:
        TypeError: ``model`` has no transformers configuration.
        ValueError: the model has no head that is supported.
    """
    config, architecture = _read_config(model)
    # The class tells heads apart whose weights have the same names: those for texts and for tokens, say.
    ends = (suffix for base in type(model).__mro__ for suffix in _TASKS if base.__name__.endswith(suffix))
    task = _TASKS.get(next(ends, ""), "")
    names = architecture.heads.get(task)
    weights = None if names is None else _head_weights(model, architecture, names)
    if names is None or weights is None:
        raise ValueError(
            f"{type(model).__name__} has no supported head; supported: {', '.join(f'*{name}' for name in _TASKS)} of "
            f"{', '.join(ARCHITECTURES)}"
        )

    def named(value: str) -> str:
        return str(_get(config, value.removeprefix("config."))) if value.startswith("config.") else value

    hidden_size = int(architecture.value(config, "hidden_size"))
    dense_size = weights["head.dense.weight"].shape[0] if names.dense is not None else hidden_size
    spec = HeadSpec(
        task=task,
        hidden_size=hidden_size,
        activation="none" if names.dense is None else _activation(named(names.activation)),
        norm=names.norm is not None,
        layer_norm_eps=float(architecture.value(config, "layer_norm_eps")),
        num_outputs=weights["head.out.weight"].shape[0],
        dense=names.dense is not None,
        dense_size=0 if dense_size == hidden_size else dense_size,
        pooling=named(names.pooling),
    )
    return spec, weights


def _head_weights(model: nn.Module, architecture: _Architecture, names: _HeadNames) -> dict[str, Tensor] | None:
    """The weights of a head, or None if the model has others than these."""
    base = str(getattr(model, "base_model_prefix", ""))
    source = _Source(model, dict(model.state_dict()), "head", architecture.optional_biases)
    weights: dict[str, Tensor] = {}
    try:
        for part, name in (("dense", names.dense), ("norm", names.norm), ("out", names.out)):
            if name is not None:
                weights.update(source.pair(f"head.{part}", name.format(base=base)))
    except ValueError:
        return None
    known = source.taken | set(names.extra)
    if any(not name.startswith(f"{base}.") and name not in known for name in source.weights):
        return None
    return weights
