"""What encoders and heads compute, and which weights that takes: data, not one class per model. Needs no torch.

The file is longer than others, since most of its lines say what a field means.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "Dtype",
    "EncoderSpec",
    "HeadSpec",
    "POOLING_MODES",
    "PoolingMode",
    "check_dtype",
    "is_matrix",
    "is_table",
    "scale_name",
]

Dtype = Literal["bf16", "fp32", "int8"]

ACTIVATIONS: tuple[str, ...] = (
    "none",
    "gelu",
    "gelu_tanh",
    "relu",
    "tanh",
    "silu",
    "quick_gelu",
    "sigmoid",
    "leaky_relu",
)

PoolingMode = Literal["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]

POOLING_MODES: tuple[str, ...] = get_args(PoolingMode)

TASKS = ("text-classification", "token-classification", "question-answering", "fill-mask", "feature-extraction")

DTYPES: tuple[Dtype, ...] = ("bf16", "fp32", "int8")


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """What an encoder computes, apart from its weights. Fields with defaults say in what it differs from BERT.

    Attributes:
        architecture: where it comes from: ``bert``, ``roberta``, ``distilbert`` ...
        hidden_size: H.
        num_layers: number of transformer layers.
        num_heads: attention heads per layer; divides H, unless ``head_size`` is given.
        intermediate_size: width of the feed-forward part, I.
        activation: of the feed-forward part; one of :data:`ACTIVATIONS`.
        max_positions: the longest sequence, in tokens.
        position_offset: row of the position table that the first token takes.
        layer_norm_eps: added to variances.
        vocab_size: rows of the word table.
        type_vocab_size: rows of the token type table; 0 without one.
        embedding_size: width of the tables, E, if it is not H: a linear layer after their norm leads to H. 0: H.
        absolute_positions: whether there is a table of positions, added to the words.
        relative_attention_buckets: a bias per head is added to the scores, which depends on the bucket that the
            distance of query and key falls into; this is the number of buckets, half of them for either direction.
            0: no such bias.
        relative_attention_max_distance: from this distance on, all is in the last bucket.
        rotary_theta: queries and keys are rotated by their position times ``theta ** (-2 i / head_dim)``. 0: they are
            not.
        rotary_theta_local: the same in layers with a window. 0: ``rotary_theta`` there, too.
        window: in local layers a token sees this many tokens to each side. 0: no layer is local.
        global_every: layers 0, n, 2 n ... are global, all others local, if ``window`` is not 0.
        norm_first: norms come before attention and feed-forward part, not after their residuals; one more norm
            follows the last layer.
        norm_first_attention: with ``norm_first``, whether the first layer's attention has a norm of its own behind
            that of the embeddings.
        gated_ffn: the first matrix of the feed-forward part is ``[2 I, H]``, and the second reads
            ``activation(a) * b`` for its halves ``a`` and ``b``.
        padding_id: tokens with this id are not counted in positions: they take row ``position_offset - 1`` of the
            position table, and the token after them the row that they would have had. -1: every token has a position.
        position_span: half the rows of every layer's tables of relative positions, which disentangled attention
            (DeBERTa) multiplies queries or keys with: query ``i`` and key ``j`` take row
            ``clamp(span + i - j, 0, 2 span - 1)``, and the products are added to those of content. 0: there are none.
        position_reach: distances beyond ``position_span // 2`` share rows, wider and wider ones, so that ``reach - 1``
            takes the last one. 0: each distance has a row.
        content_to_position: whether queries are multiplied with ``position_keys`` of the distance.
        position_to_content: whether keys are multiplied with ``position_queries`` of the distance.
        num_kv_heads: heads of keys and values, each for ``num_heads / num_kv_heads`` of queries. 0: as many.
        head_size: of queries, keys and values, D. 0: ``H / num_heads``.
        global_first: the first global layer, if ``window`` is not 0: then every ``global_every``-th.
        attention_scale: of scores. 0: ``1 / sqrt(D)``.
        embedding_scale: words are multiplied with it.
        rotary_factor: of all angles.
        causal: whether tokens see none behind themselves.
        rms_norm: whether all norms are RMS norms, which have no bias.
        embedding_norm: whether a norm follows the tables. Without one norms come first in layers, and what layers add
            is summed in fp32.
        head_norms: whether the queries and keys of each head have an RMS norm, before they are rotated.
        post_norms: whether what attention and feed-forward part add has a norm of its own, too.
        dropped_id: a word that is zero; a text's other words are multiplied by its length over their number. -1: none.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    max_positions: int
    position_offset: int
    layer_norm_eps: float
    vocab_size: int
    type_vocab_size: int
    embedding_size: int = 0
    absolute_positions: bool = True
    relative_attention_buckets: int = 0
    relative_attention_max_distance: int = 128
    rotary_theta: float = 0.0
    rotary_theta_local: float = 0.0
    window: int = 0
    global_every: int = 1
    norm_first: bool = False
    norm_first_attention: bool = True
    gated_ffn: bool = False
    padding_id: int = -1
    position_span: int = 0
    position_reach: int = 0
    content_to_position: bool = False
    position_to_content: bool = False
    num_kv_heads: int = 0
    head_size: int = 0
    global_first: int = 0
    attention_scale: float = 0.0
    embedding_scale: float = 1.0
    rotary_factor: float = 1.0
    causal: bool = False
    rms_norm: bool = False
    embedding_norm: bool = True
    head_norms: bool = False
    post_norms: bool = False
    dropped_id: int = -1

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_least(
            self,
            1,
            *("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions", "vocab_size"),
            "global_every",
        )
        _check_least(
            self,
            0,
            *("position_offset", "type_vocab_size", "embedding_size", "window", "rotary_theta", "rotary_theta_local"),
            *("num_kv_heads", "head_size", "global_first", "attention_scale"),
        )
        if self.padding_id < -1 or (self.padding_id >= 0 and not self.position_offset):
            raise ValueError(
                "EncoderSpec: expected padding_id -1, or an id and position_offset of at least 1, whose row before is "
                f"that of padding, got {self.padding_id} and {self.position_offset}"
            )
        if not self.head_size and self.hidden_size % self.num_heads:
            raise ValueError(f"EncoderSpec: num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"EncoderSpec: num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.rotary_theta and self.size_of_heads % 2:
            raise ValueError(
                f"EncoderSpec: rotary positions need heads of an even size, got {self.size_of_heads} "
                f"(head_size={self.head_size}, hidden_size={self.hidden_size}, num_heads={self.num_heads})"
            )
        self._check_stream()
        buckets, distance = self.relative_attention_buckets, self.relative_attention_max_distance
        if buckets and (buckets < 4 or buckets % 4 or distance <= buckets // 4):
            raise ValueError(
                "EncoderSpec: expected relative_attention_buckets divisible by 4, and "
                f"relative_attention_max_distance above a quarter of them, got {buckets} and {distance}"
            )
        self._check_positions()
        if not self.norm_first_attention and not self.norm_first:
            raise ValueError("EncoderSpec: norm_first_attention=False means nothing without norm_first")
        _check_activation(self.activation)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def size_of_heads(self) -> int:
        """Elements of one head."""
        return self.head_size or self.hidden_size // self.num_heads

    def _check_stream(self) -> None:
        if self.global_first >= self.global_every:
            raise ValueError(
                f"EncoderSpec: expected global_first below global_every={self.global_every}, got {self.global_first}"
            )
        if not self.embedding_scale > 0 or not self.rotary_factor > 0:
            raise ValueError(
                "EncoderSpec: expected embedding_scale and rotary_factor above 0, got "
                f"{self.embedding_scale} and {self.rotary_factor}"
            )
        modern = self.rms_norm or self.head_norms or self.post_norms or self.embedding_scale != 1
        needed = self.norm_first and self.norm_first_attention and not self.embedding_size
        if modern if self.embedding_norm else not needed:
            raise ValueError(
                "EncoderSpec: rms_norm, head_norms, post_norms and embedding_scale need embedding_norm=False, and that "
                "needs norm_first, norm_first_attention and no embedding_size"
            )
        if self.dropped_id < -1 or (self.dropped_id >= 0 and self.embedding_norm):
            raise ValueError(f"EncoderSpec: dropped_id={self.dropped_id}: expected -1, or an id without embedding_norm")
        if self.post_norms and not self.rms_norm:
            raise ValueError("EncoderSpec: post_norms=True needs rms_norm=True")
        if self.position_span and (self.kv_heads, self.size_of_heads * self.num_heads) != (
            self.num_heads,
            self.hidden_size,
        ):
            raise ValueError(
                "EncoderSpec: expected as many heads of keys as of queries, which are as wide as the encoder, with a "
                "position_span"
            )

    def _check_positions(self) -> None:
        span, reach = self.position_span, self.position_reach
        _check_least(self, 0, "position_span", "position_reach")
        if (span > 0) != (self.content_to_position or self.position_to_content):
            raise ValueError(
                "EncoderSpec: expected position_span of at least 1 with content_to_position or position_to_content, "
                f"and 0 without, got {span}"
            )
        if reach and (span < 2 or reach <= span // 2 + 1):
            raise ValueError(
                "EncoderSpec: expected position_reach 0, or above position_span / 2 + 1 for a position_span of at "
                f"least 2, got {reach} for {span}"
            )

    def is_local(self, layer: int) -> bool:
        """Whether the attention of a layer is confined to the window."""
        return self.window > 0 and layer % self.global_every != self.global_first

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every weight."""
        hidden, wide = self.hidden_size, self.intermediate_size
        context = self.num_heads * self.size_of_heads

        def norm_shapes(name: str, size: int) -> dict[str, tuple[int, ...]]:
            return {f"{name}.weight": (size,)} if self.rms_norm else _norm_shapes(name, size)

        embedded = self.embedding_size or hidden
        shapes: dict[str, tuple[int, ...]] = {"embeddings.word": (self.vocab_size, embedded)}
        if self.absolute_positions:
            shapes["embeddings.position"] = (self.max_positions + self.position_offset, embedded)
        if self.type_vocab_size:
            shapes["embeddings.token_type"] = (self.type_vocab_size, embedded)
        if self.embedding_norm:
            shapes.update(norm_shapes("embeddings.norm", embedded))
        if self.embedding_size:
            shapes.update(_linear_shapes("embeddings.projection", hidden, embedded))
        if self.relative_attention_buckets:
            shapes["relative_attention_bias"] = (self.relative_attention_buckets, self.num_heads)
        for index in range(self.num_layers):
            prefix = f"layers.{index}"
            qkv = context + 2 * self.kv_heads * self.size_of_heads
            shapes.update(_linear_shapes(f"{prefix}.attention.qkv", qkv, hidden))
            shapes.update(_linear_shapes(f"{prefix}.attention.out", hidden, context))
            if self.head_norms:
                for part in ("query_norm", "key_norm"):
                    shapes[f"{prefix}.attention.{part}.weight"] = (self.size_of_heads,)
            if self.post_norms:
                for part in ("attention", "ffn"):
                    shapes.update(norm_shapes(f"{prefix}.{part}.post_norm", hidden))
            if index or self.norm_first_attention:
                shapes.update(norm_shapes(f"{prefix}.attention.norm", hidden))
            if self.content_to_position:
                shapes[f"{prefix}.attention.position_keys"] = (2 * self.position_span, hidden)
            if self.position_to_content:
                shapes[f"{prefix}.attention.position_queries"] = (2 * self.position_span, hidden)
            shapes.update(_linear_shapes(f"{prefix}.ffn.up", 2 * wide if self.gated_ffn else wide, hidden))
            shapes.update(_linear_shapes(f"{prefix}.ffn.down", hidden, wide))
            shapes.update(norm_shapes(f"{prefix}.ffn.norm", hidden))
        if self.norm_first:
            shapes.update(norm_shapes("final_norm", hidden))
        return shapes

    def optional_shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of weights that may be missing.

        Factors of residuals are 1 without them; what is added after the activation of the feed-forward part is 0.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for index in range(self.num_layers):
            if not self.gated_ffn:
                shapes[f"layers.{index}.ffn.shift"] = (self.intermediate_size,)
            if not self.norm_first:
                for part in ("attention", "ffn"):
                    shapes[f"layers.{index}.{part}.residual_scale"] = (self.hidden_size,)
        return shapes


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """What a task head computes: ``out(norm(activation(dense(hidden))))``, or ``out(hidden)``; then an activation.

    Attributes:
        task: ``text-classification``, ``token-classification``, ``question-answering`` (two outputs: where an answer
            begins and ends), ``fill-mask``, or ``feature-extraction``: linear stages behind the pooling.
        hidden_size: H; of linear stages behind several poolings side by side, as many times that of the encoder.
        activation: after the dense layer; one of :data:`ACTIVATIONS`.
        norm: whether a layer norm follows.
        layer_norm_eps: added to its variances.
        num_outputs: labels, or the size of the vocabulary.
        dense: whether there is a dense layer, with activation and norm.
        dense_size: its width, if it is not H. 0: H.
        pooling: which vector stands for a text that is to be classified: ``cls``, that of its first token, ``mean``, or
            ``lasttoken``.
        out_activation: after the output layer.
    """

    task: str
    hidden_size: int
    activation: str
    norm: bool
    layer_norm_eps: float
    num_outputs: int
    dense: bool = True
    dense_size: int = 0
    pooling: str = "cls"
    out_activation: str = "none"

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.task not in TASKS:
            raise ValueError(f"HeadSpec: unknown task {self.task!r}; known: {', '.join(map(repr, TASKS))}")
        if self.pooling not in ("cls", "mean", "lasttoken"):
            raise ValueError(f"HeadSpec: unknown pooling {self.pooling!r}; known: 'cls', 'mean', 'lasttoken'")
        _check_least(self, 1, "hidden_size", "num_outputs")
        _check_least(self, 0, "dense_size")
        if not self.dense and (self.activation != "none" or self.norm or self.dense_size):
            raise ValueError("HeadSpec: activation, norm and dense_size mean nothing without a dense layer")
        _check_activation(self.activation)
        _check_activation(self.out_activation)

    def fits(self, hidden_size: int) -> bool:
        """Whether it can follow an encoder of this width: linear stages may take several poolings side by side."""
        several = self.task == "feature-extraction" and self.hidden_size % hidden_size == 0
        return several or self.hidden_size == hidden_size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every weight."""
        shapes: dict[str, tuple[int, ...]] = {}
        width = self.dense_size or self.hidden_size
        if self.dense:
            shapes.update(_linear_shapes("head.dense", width, self.hidden_size))
        if self.norm:
            shapes.update(_norm_shapes("head.norm", width))
        shapes.update(_linear_shapes("head.out", self.num_outputs, width))
        return shapes

    def optional_shapes(self) -> dict[str, tuple[int, ...]]:
        """A head has none, other than an encoder."""
        return {}


def _check_fields(spec: EncoderSpec | HeadSpec) -> None:
    """Raise unless every field has the type that it is declared with (a file may hold anything)."""
    types: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if not isinstance(value, types[str(field.type)]) or (isinstance(value, bool) and field.type != "bool"):
            raise ValueError(f"{type(spec).__name__}: expected {field.name} of type {field.type}, got {value!r}")


def _check_least(spec: EncoderSpec | HeadSpec, least: int, *names: str) -> None:
    for name in names:
        if not getattr(spec, name) >= least:
            raise ValueError(f"{type(spec).__name__}: expected {name} of at least {least}, got {getattr(spec, name)}")


def _check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")


def _linear_shapes(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm_shapes(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def check_dtype(dtype: str) -> Dtype:
    """The dtype, if it is known.

    Raises:
        ValueError: it is not.
    """
    for known in DTYPES:
        if dtype == known:
            return known
    raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(map(repr, DTYPES))}")


def scale_name(name: str) -> str:
    """The name of an int8 matrix's scales, one for each row."""
    return f"{name}_scale"


def is_matrix(name: str) -> bool:
    """Whether a weight is that of a linear layer."""
    return name.endswith(".weight") and not name.endswith("norm.weight")


def is_table(name: str) -> bool:
    """Whether a weight is a table of embeddings."""
    tables = ("embeddings.word", "embeddings.position", "embeddings.token_type")
    return name in tables or name.endswith((".attention.position_keys", ".attention.position_queries"))
