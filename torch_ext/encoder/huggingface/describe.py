"""From a configuration and the shapes of weights to specifications, and to which weights become which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch_ext.encoder.huggingface.architecture import Architecture, HeadNames, activation, get
from torch_ext.encoder.spec import EncoderSpec, HeadSpec
from torch_ext.patterns import matches

__all__ = ["Plan", "Projected", "Rows", "Shapes", "Shifted", "describe_encoder", "describe_head", "head_layers"]

Shapes = Mapping[str, tuple[int, ...]]


class Rows(NamedTuple):
    """Rows ``begin`` to ``end`` of a weight."""

    name: str
    begin: int
    end: int


class Projected(NamedTuple):
    """Rows of a table, led through a linear layer, once for all: ``norm(table) @ weight.T + bias``.

    Attributes:
        table: the name of a weight, as are the others.
        norm_weight, norm_bias: of a layer norm; None: there is none.
        eps: added to its variances.
        weight: of the layer.
        bias: likewise; None: it has none.
    """

    table: str
    norm_weight: str | None
    norm_bias: str | None
    eps: float
    weight: str
    bias: str | None


class Shifted(NamedTuple):
    """A vector, plus a number."""

    name: str
    by: float


Part = str | int | Rows | Projected | Shifted

Plan = dict[str, list[Part]]
"""By the names of ``EncoderSpec.shapes()`` and ``HeadSpec.shapes()``: names of a model's weights or parts of them,
which follow one another along the first dimension; a number stands for that many zeros."""

_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_POOLER = "pooler."
"""What belongs to heads."""


class _Taker:
    """Takes weights one by one, so that what is left shows."""

    def __init__(self, shapes: Shapes, owner: str, kind: str, optional_biases: bool) -> None:
        self.plan: Plan = {}
        self.taken: set[str] = set()
        self._shapes, self._owner, self._kind = shapes, owner, kind
        self._optional_biases = optional_biases

    def take(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a weight."""
        if name not in self._shapes:
            raise ValueError(f"{self._owner} has no {name}: is it a plain {self._kind}?")
        self.taken.add(name)
        shape = self._shapes[name]
        if len(shape) != dimensions:
            raise ValueError(f"{self._owner}: expected {name} with {dimensions} dimensions, got {list(shape)}")
        return shape

    def table(self, to: str, name: str) -> tuple[int, int]:
        """A table of embeddings, or of biases."""
        rows, columns = self.take(f"{name}.weight", 2)
        self.plan[to] = [f"{name}.weight"]
        return rows, columns

    def pair(self, to: str, *names: str, dimensions: int = 2) -> tuple[int, ...]:
        """Weight and bias of a linear layer, or of several that become one; returns the shape of the first one."""
        shapes = [self.take(f"{name}.weight", dimensions) for name in names]
        self.plan[f"{to}.weight"] = [f"{name}.weight" for name in names]
        biases: list[Part] = []
        for name, shape in zip(names, shapes, strict=True):
            if self._optional_biases and f"{name}.bias" not in self._shapes:
                biases.append(shape[0])
            else:
                self.take(f"{name}.bias", 1)
                biases.append(f"{name}.bias")
        self.plan[f"{to}.bias"] = biases
        return shapes[0]

    def norm(self, to: str, name: str, rms: bool = False, shift: float = 0.0) -> None:
        if not rms:
            self.pair(to, name, dimensions=1)
            return
        self.take(f"{name}.weight", 1)
        self.plan[f"{to}.weight"] = [Shifted(f"{name}.weight", shift) if shift else f"{name}.weight"]

    def halves(self, to: str, name: str) -> None:
        """One matrix without a bias, whose second half comes first."""
        rows, _ = self.take(f"{name}.weight", 2)
        half = rows // 2
        self.plan[f"{to}.weight"] = [Rows(f"{name}.weight", half, rows), Rows(f"{name}.weight", 0, half)]
        self.plan[f"{to}.bias"] = [rows]

    def qkv_by_head(self, to: str, prefix: str, names: Architecture, heads: int) -> None:
        """One matrix in which the rows of each head are together."""
        name = f"{prefix}.{names.qkv[0]}.weight"
        rows, _ = self.take(name, 2)
        size = rows // (3 * heads)
        starts = [(3 * head + part) * size for part in range(3) for head in range(heads)]
        self.plan[f"{to}.weight"] = [Rows(name, start, start + size) for start in starts]
        biases = [None if bias is None else f"{prefix}.{bias}" for bias in names.qkv_biases or (None,) * 3]
        for bias in filter(None, biases):
            self.take(bias, 1)
        self.plan[f"{to}.bias"] = [rows // 3 if bias is None else bias for bias in biases]

    def projected(self, to: str, names: Architecture, eps: float, layer: str) -> None:
        """Vectors of relative positions, led through a layer that may belong to others, too."""
        table, norm = f"{names.relative_table}.weight", names.relative_norm
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        for name in (table, weight):
            self.take(name, 2)
        has_bias = bias in self._shapes
        for name in ([] if norm is None else [f"{norm}.weight", f"{norm}.bias"]) + ([bias] if has_bias else []):
            self.take(name, 1)
        self.plan[to] = [
            Projected(
                table=table,
                norm_weight=None if norm is None else f"{norm}.weight",
                norm_bias=None if norm is None else f"{norm}.bias",
                eps=eps,
                weight=weight,
                bias=bias if has_bias else None,
            )
        ]


def describe_encoder(
    config: Any, names: Architecture, shapes: Shapes, owner: str, foreign: Iterable[str] = ()
) -> tuple[EncoderSpec, Plan]:
    """The specification of an encoder, and where its weights come from.

    Args:
        config: has the configuration's values as attributes.
        names: the row of its architecture.
        shapes: of the model's weights, by their names below the encoder.
        owner: what messages call the model.
        foreign: weights among them that are none of the encoder's.

    Raises:
        ValueError: a weight or a value of the configuration is missing, is not supported, or there are weights that an
            encoder of this architecture lacks.
    """
    names = names.of(config)
    source = _Taker(shapes, owner, f"{config.model_type} encoder", names.optional_biases)
    padding = -1 if names.padding_index is None else names.padding_index(config)
    vocabulary, width = source.table("embeddings.word", names.word)
    _check_rows(config, "vocab_size", f"{names.word}.weight", vocabulary)
    fields: dict[str, Any] = {
        "position_offset": padding + 1,
        "padding_id": padding,
        "vocab_size": vocabulary,
        "type_vocab_size": 0,
    }
    if names.position is not None:
        rows, _ = source.table("embeddings.position", names.position)
        _check_rows(config, "max_position_embeddings", f"{names.position}.weight", rows)
        fields["max_positions"] = rows - fields["position_offset"]
    if names.token_type is not None:
        types, _ = source.table("embeddings.token_type", names.token_type)
        _check_rows(config, "type_vocab_size", f"{names.token_type}.weight", types)
        fields["type_vocab_size"] = types
    if names.embedding_norm is not None:
        source.norm("embeddings.norm", names.embedding_norm)
    if f"{names.projection}.weight" in shapes:
        source.pair("embeddings.projection", names.projection)
        fields["embedding_size"] = width
    if names.relative_bias is not None:
        source.table("relative_attention_bias", names.relative_bias)
    spec = EncoderSpec(
        architecture=config.model_type,
        hidden_size=names.whole(config, "hidden_size"),
        num_layers=names.whole(config, "num_layers"),
        num_heads=names.whole(config, "num_heads"),
        intermediate_size=names.whole(config, "intermediate_size"),
        activation=names.activation(config),
        layer_norm_eps=names.number(config, "layer_norm_eps"),
        **{**fields, **names.more(config)},
    )
    for index in range(spec.num_layers):
        to, prefix = f"layers.{index}", names.layer.format(index)
        if names.by_head:
            source.qkv_by_head(f"{to}.attention.qkv", prefix, names, spec.num_heads)
        else:
            source.pair(f"{to}.attention.qkv", *(f"{prefix}.{part}" for part in names.qkv))
        for part, layer in (("position_keys", names.position_key), ("position_queries", names.position_query)):
            if layer is not None:
                source.projected(f"{to}.attention.{part}", names, spec.layer_norm_eps, f"{prefix}.{layer}")
        source.pair(f"{to}.attention.out", f"{prefix}.{names.out}")
        norms = {"attention.query_norm": names.query_norm, "attention.key_norm": names.key_norm}
        norms |= {"attention.post_norm": names.attention_post_norm, "ffn.post_norm": names.ffn_post_norm}
        for part, norm in norms.items():
            if norm is not None:
                source.norm(f"{to}.{part}", f"{prefix}.{norm}", True, names.norm_shift)
        if index or spec.norm_first_attention:
            source.norm(f"{to}.attention.norm", f"{prefix}.{names.attention_norm}", spec.rms_norm, names.norm_shift)
        up = (names.up,) if isinstance(names.up, str) else names.up
        if names.gate_last:
            source.halves(f"{to}.ffn.up", f"{prefix}.{names.up}")
        else:
            source.pair(f"{to}.ffn.up", *(f"{prefix}.{part}" for part in up))
        source.pair(f"{to}.ffn.down", f"{prefix}.{names.down}")
        source.norm(f"{to}.ffn.norm", f"{prefix}.{names.ffn_norm}", spec.rms_norm, names.norm_shift)
    if names.final_norm is not None:
        source.norm("final_norm", names.final_norm, spec.rms_norm, names.norm_shift)
    spare = {*_BUFFERS, *foreign, *(name for name in shapes if name.startswith((_POOLER, *names.beside)))}
    left = sorted(name for name in shapes.keys() - source.taken - spare if not matches(name, names.spare))
    if left:
        raise ValueError(
            f"{owner} has weights that a plain {config.model_type} encoder has not (adapters?): "
            f"{', '.join(left[:5])}{' ...' if len(left) > 5 else ''}"
        )
    return spec, source.plan


def _check_rows(config: Any, field: str, name: str, rows: int) -> None:
    """Checks that a table has the rows that a configuration counts; some models' tables are filled up.

    Raises:
        ValueError: it has fewer, and a token without a row would be found out by a request.
    """
    wanted = getattr(config, field, None)
    if isinstance(wanted, int) and rows < wanted:
        raise ValueError(f"expected {name} with {field}={wanted} rows, as config.json has it, got {rows}")


def head_layers(names: HeadNames, base: str) -> dict[str, str]:
    """The names of a head's layers, by ``dense``, ``norm`` and ``out``.

    Args:
        names: of the head.
        base: name of the encoder.
    """
    layers = {"dense": names.dense, "norm": names.norm, "out": names.out}
    return {part: name.format(base=base) for part, name in layers.items() if name is not None}


def describe_head(
    config: Any, architecture: Architecture, task: str, shapes: Shapes, owner: str, base: str
) -> tuple[HeadSpec, Plan]:
    """The specification of a head, and where its weights come from.

    Args:
        config: has the configuration's values as attributes.
        architecture: its row.
        task: one of the row's heads.
        shapes: of all weights of the model.
        owner: what messages call the model.
        base: name of the encoder in it.

    Raises:
        ValueError: a weight or a value of the configuration is missing, or is not supported.
    """
    names = architecture.heads[task]
    source = _Taker(shapes, owner, f"{config.model_type} model for {task}", architecture.optional_biases)
    rows = {}
    for part, name in head_layers(names, base).items():
        rows[part] = source.pair(f"head.{part}", name, dimensions=1 if part == "norm" else 2)[0]

    def named(value: str) -> str:
        return str(get(config, value.removeprefix("config."))) if value.startswith("config.") else value

    hidden_size = architecture.whole(config, "hidden_size")
    dense_size = rows.get("dense", hidden_size)
    spec = HeadSpec(
        task=task,
        hidden_size=hidden_size,
        activation="none" if names.dense is None else activation(named(names.activation)),
        norm=names.norm is not None,
        layer_norm_eps=architecture.number(config, "layer_norm_eps"),
        num_outputs=rows["out"],
        dense=names.dense is not None,
        dense_size=0 if dense_size == hidden_size else dense_size,
        pooling=named(names.pooling),
    )
    return spec, source.plan
