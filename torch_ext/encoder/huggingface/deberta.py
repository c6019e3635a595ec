"""DeBERTa, its first version and v2/v3: disentangled attention, which multiplies content with relative positions."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch_ext.encoder.huggingface.architecture import HeadNames, whole
from torch_ext.encoder.huggingface.bert import BERT, QUESTIONS, TOKENS

__all__ = ["DEBERTA", "DEBERTA_V2"]

_CONTENT_TO_POSITION, _POSITION_TO_CONTENT = "c2p", "p2c"

# Fields that configurations leave out, those of transformers too.
_DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-7,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "relative_attention": False,
    "max_relative_positions": -1,
    "pos_att_type": None,
    "position_biased_input": True,
    "pooler_hidden_act": "gelu",
    "position_buckets": -1,
    "norm_rel_ebd": "none",
    "share_att_key": False,
}


def _get(config: Any, name: str) -> Any:
    return getattr(config, name, _DEFAULTS[name])


def _kinds(config: Any) -> list[str]:
    """Which scores by position are added: ``c2p``, ``p2c``, both or none."""
    given = _get(config, "pos_att_type") or []
    names = given.lower().split("|") if isinstance(given, str) else given
    kinds = sorted({str(kind).strip() for kind in names} - {""})
    relative = bool(_get(config, "relative_attention"))
    if not set(kinds) <= {_CONTENT_TO_POSITION, _POSITION_TO_CONTENT} or bool(kinds) != relative:
        raise ValueError(
            "unsupported configuration: expected pos_att_type with 'c2p', 'p2c' or both for relative_attention, and "
            f"none without, got {given!r:.80} and relative_attention={relative}"
        )
    return kinds


def _positions(config: Any, buckets: int) -> dict[str, Any]:
    """The fields of a specification that say how positions are told apart."""
    kinds = _kinds(config)
    fields: dict[str, Any] = {}
    if not _get(config, "position_biased_input"):
        fields = {"absolute_positions": False, "max_positions": whole(config, "max_position_embeddings")}
    if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
        raise ValueError(
            f"unsupported configuration: expected embedding_size to be hidden_size={config.hidden_size}, got "
            f"{config.embedding_size}"
        )
    if not kinds:
        return fields
    reach = _get(config, "max_relative_positions")
    if reach < 1:
        reach = whole(config, "max_position_embeddings")
    return {
        **fields,
        "position_span": buckets if buckets > 0 else reach,
        "position_reach": reach if buckets > 0 else 0,
        "content_to_position": _CONTENT_TO_POSITION in kinds,
        "position_to_content": _POSITION_TO_CONTENT in kinds,
    }


def _tables(config: Any) -> dict[str, Any]:
    """Which tables there are besides that of words."""
    kinds = _kinds(config)
    return {
        "position": BERT.position if _get(config, "position_biased_input") else None,
        "token_type": BERT.token_type if _get(config, "type_vocab_size") else None,
        "relative_table": "encoder.rel_embeddings" if kinds else None,
    }


def _variant(config: Any) -> dict[str, Any]:
    kinds = _kinds(config)
    return {
        **_tables(config),
        "position_key": "attention.self.pos_proj" if _CONTENT_TO_POSITION in kinds else None,
        "position_query": "attention.self.pos_q_proj" if _POSITION_TO_CONTENT in kinds else None,
    }


def _variant_v2(config: Any) -> dict[str, Any]:
    kinds = _kinds(config)
    shared = bool(_get(config, "share_att_key"))
    key, query = ("key_proj", "query_proj") if shared else ("pos_key_proj", "pos_query_proj")
    norms = [name.strip() for name in str(_get(config, "norm_rel_ebd")).lower().split("|")]
    return {
        **_tables(config),
        "relative_norm": "encoder.LayerNorm" if kinds and "layer_norm" in norms else None,
        "position_key": f"attention.self.{key}" if _CONTENT_TO_POSITION in kinds else None,
        "position_query": f"attention.self.{query}" if _POSITION_TO_CONTENT in kinds else None,
    }


_ROW = dataclasses.replace(
    BERT,
    base="deberta",
    heads={
        "text-classification": HeadNames(out="classifier", dense="pooler.dense", activation="config.pooler_hidden_act"),
        "token-classification": TOKENS,
        "question-answering": QUESTIONS,
        "fill-mask": BERT.heads["fill-mask"],
    },
    defaults=_DEFAULTS,
    # Written by other libraries where they are not added to the words.
    spare=("embeddings.position_embeddings.weight",),
)

DEBERTA = dataclasses.replace(
    _ROW,
    qkv=("attention.self.in_proj",),
    by_head=True,
    qkv_biases=("attention.self.q_bias", None, "attention.self.v_bias"),
    variant=_variant,
    more=lambda config: _positions(config, -1),
    options={"talking_head": False},
)

DEBERTA_V2 = dataclasses.replace(
    _ROW,
    qkv=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    variant=_variant_v2,
    more=lambda config: _positions(config, _get(config, "position_buckets")),
    options={"conv_kernel_size": 0},
)
