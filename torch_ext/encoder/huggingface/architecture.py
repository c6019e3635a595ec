"""What there is to say of an architecture of Hugging Face, and how values of its configuration are read."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["Architecture", "HeadNames", "activation", "get", "number", "padding_id", "rotary_base", "whole"]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "quick_gelu": "quick_gelu",
    "sigmoid": "sigmoid",
    "leaky_relu": "leaky_relu",
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


@dataclasses.dataclass(frozen=True)
class HeadNames:
    """Where a head keeps its weights (``{base}`` is the encoder), and what it does with them.

    Attributes:
        out: the output layer.
        dense: the layer before it, if there is one.
        norm: the norm between them, if there is one.
        activation: after the dense layer: what Hugging Face calls it, or ``config.`` and the field that says it.
        pooling: of texts: ``cls``, ``mean`` or ``lasttoken``, or ``config.`` and the field that says it.
        tied: whether the output layer is the word table, unless the configuration says ``tie_word_embeddings: false``.
        bias: another name of the output layer's bias.
    """

    out: str
    dense: str | None = None
    norm: str | None = None
    activation: str = ""
    pooling: str = "cls"
    tied: bool = False
    bias: str | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Where an architecture keeps its weights, and what its configuration means.

    Attributes:
        base: name of the encoder in a model with a head.
        layer: prefix of a layer's weights; ``{}`` is its number.
        qkv: query, key and value, one after the other, or one that holds all.
        out, attention_norm, up, down, ffn_norm: the other parts of a layer. Of a gated one ``up`` may be two, the one
            with the activation first.
        heads: by task.
        word, position, token_type, embedding_norm, projection, relative_bias, final_norm: what is outside of layers.
            None: there is none. The projection is there only where the tables have another width.
        optional_biases: whether biases may be absent; they are taken for zero.
        fields: what the configuration calls fields of the specification, where it differs from BERT's. A number
            instead of a name is the value itself, and so is the name of an activation.
        defaults: values of the configuration that a ``config.json`` may leave out.
        older: names of fields in a ``config.json`` of the model's own code, and what they are called now.
        padding_index: of models that count positions over tokens other than padding: the id of padding, and the row
            of the position table that it takes; the first token takes the next one. None: all tokens are counted, from
            row 0.
        more: further fields of the specification.
        options: options that must have one value, or one of several, further to those of all architectures.
        other_names: the same architecture with other names of weights.
        variant: fields of this row that depend on the configuration.
        spare: weights that may be there, and are not needed: names, or ``fnmatch`` patterns.
        by_head: whether the one matrix of ``qkv`` has query, key and value of the first head, then those of the next.
        qkv_biases: names of biases of query, key and value that are not beside their weights; None: there is none.
        relative_table, relative_norm: vectors of relative positions, and the norm that they go through; None: none.
        position_key, position_query: layers that make a layer's vectors out of those, which queries and keys are
            multiplied with; None: there are none.
        query_norm, key_norm, attention_post_norm, ffn_post_norm: further norms of a layer; None: there is none.
        norm_shift: is added to the weights of all norms.
        gate_last: whether the half of ``up`` with the activation is the second one.
        read: values that transformers changes or adds when it reads a ``config.json``.
        head_classes: tasks of heads by the names of classes, further to those of all architectures.
        beside: how names of weights begin that belong to other parts of a model, such as the images' encoder.
    """

    base: str
    layer: str
    qkv: tuple[str, ...]
    out: str
    attention_norm: str
    up: str | tuple[str, ...]
    down: str
    ffn_norm: str
    heads: Mapping[str, HeadNames]
    word: str = "embeddings.word_embeddings"
    position: str | None = "embeddings.position_embeddings"
    token_type: str | None = "embeddings.token_type_embeddings"
    embedding_norm: str | None = "embeddings.LayerNorm"
    projection: str = "embeddings_project"
    relative_bias: str | None = None
    final_norm: str | None = None
    optional_biases: bool = False
    fields: Mapping[str, str | float] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
    )
    older: Mapping[str, str] = dataclasses.field(default_factory=dict)
    padding_index: Callable[[Any], int] | None = None
    more: Callable[[Any], dict[str, Any]] = lambda config: {}
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    other_names: Architecture | None = None
    variant: Callable[[Any], dict[str, Any]] = lambda config: {}
    spare: tuple[str, ...] = ()
    by_head: bool = False
    qkv_biases: tuple[str | None, ...] | None = None
    relative_table: str | None = None
    relative_norm: str | None = None
    position_key: str | None = None
    position_query: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    attention_post_norm: str | None = None
    ffn_post_norm: str | None = None
    norm_shift: float = 0.0
    gate_last: bool = False
    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}
    head_classes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: tuple[str, ...] = ()

    def of(self, config: Any) -> Architecture:
        """This row for a configuration."""
        return dataclasses.replace(self, **self.variant(config))

    def named_as(self, weights: Iterable[str]) -> Architecture:
        """The row with the names that a model's weights have: this one, or the other."""
        end = f".{self.embedding_norm or self.word}.weight"
        if self.other_names is None or any(f".{name}".endswith(end) for name in weights):
            return self
        return self.other_names

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a ``config.json``, with those that it may leave out, under the names that they have now."""
        renamed = {new: config[old] for old, new in self.older.items() if old in config}
        whole_config = {**self.defaults, **renamed, **config}
        return {**whole_config, **self.read(whole_config)}

    def whole(self, config: Any, field: str) -> int:
        """The configuration's value of a field of the specification that is a whole number.

        Raises:
            ValueError: it lacks the value, or has one of another kind; also raised by the methods below.
        """
        return whole(config, str(self.fields.get(field, _FIELDS[field])))

    def number(self, config: Any, field: str) -> float:
        """The configuration's value of a field of the specification that is a number."""
        name = self.fields.get(field, _FIELDS[field])
        return number(config, name) if isinstance(name, str) else name

    def activation(self, config: Any) -> str:
        """The activation of the feed-forward part, as a specification names it."""
        name = str(self.fields.get("activation", _FIELDS["activation"]))
        return activation(name if name in _ACTIVATIONS else get(config, name))


def get(config: Any, name: str) -> Any:
    """A value of a configuration.

    Raises:
        ValueError: it lacks the value.
    """
    if not hasattr(config, name):
        raise ValueError(f"unsupported configuration: expected a {config.model_type} configuration with {name}")
    return getattr(config, name)


def whole(config: Any, name: str) -> int:
    """A whole number of a configuration.

    Raises:
        ValueError: it lacks the value, or has one of another kind.
    """
    value = get(config, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"unsupported configuration: expected {name} to be a whole number, got {value!r:.80}")
    return value


def number(config: Any, name: str) -> float:
    """A finite number of a configuration.

    Raises:
        ValueError: it lacks the value, or has one of another kind.
    """
    value = get(config, name)
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not -sys.float_info.max <= value <= sys.float_info.max:  # Neither NaN, nor more than a float holds.
        raise ValueError(f"unsupported configuration: expected {name} to be a number, got {value!r:.80}")
    return float(value)


def rotary_base(config: Any, name: str = "rotary_emb_base", kind: str = "") -> float:
    """The base of rotary positions: transformers 5 has ``rope_parameters``, before it and in models' own code a field.

    Args:
        config: has the configuration's values as attributes.
        name: of the field.
        kind: of the layers, where ``rope_parameters`` tell them apart.

    Raises:
        ValueError: it is missing, or angles are scaled.
    """
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        scaling = getattr(config, "rope_scaling", None)
        if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "default":
            raise ValueError(f"unsupported configuration: expected no rope_scaling, got {scaling!r:.200}")
        return number(config, name)
    own = parameters.get(kind, parameters) if isinstance(parameters, dict) else {}
    theta = own.get("rope_theta")
    if not isinstance(theta, int | float) or own.get("rope_type", "default") != "default":
        raise ValueError(
            "unsupported configuration: expected rope_parameters with rope_type='default' and rope_theta, got "
            f"{parameters!r:.200}"
        )
    return float(theta)


def padding_id(config: Any) -> int:
    """The id of padding, where positions are counted from.

    Raises:
        ValueError: there is none.
    """
    if get(config, "pad_token_id") is None:
        raise ValueError(
            f"unsupported configuration: expected pad_token_id of a {config.model_type} configuration, where positions "
            "are counted from, got None"
        )
    return whole(config, "pad_token_id")


def activation(name: Any) -> str:
    """What a specification calls an activation of Hugging Face.

    Raises:
        ValueError: it is not supported.
    """
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"unsupported activation {name!r:.80}; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
