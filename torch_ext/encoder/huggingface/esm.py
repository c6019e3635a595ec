"""ESM: norms first, rotary positions, and words whose scale depends on how many of a text are masked."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch_ext.encoder.huggingface.architecture import padding_id, whole
from torch_ext.encoder.huggingface.bert import ROBERTA

__all__ = ["ESM"]

_KEPT = 1 - 0.15 * 0.8
"""Of the words, in training: ESM's ``token_dropout`` sets those of masks to zero."""


def _more(config: Any) -> dict[str, Any]:
    rotary = config.position_embedding_type == "rotary"
    more: dict[str, Any] = {"norm_first": True, "embedding_norm": False}
    if rotary:
        more |= {"absolute_positions": False, "max_positions": whole(config, "max_position_embeddings")}
        more |= {"rotary_theta": 10000.0}
    if config.token_dropout:
        more |= {"embedding_scale": _KEPT, "dropped_id": whole(config, "mask_token_id")}
    return more


def _variant(config: Any) -> dict[str, Any]:
    if config.position_embedding_type == "rotary":
        return {}
    return {"position": ROBERTA.position, "padding_index": padding_id, "spare": ESM.spare[1:]}


ESM = dataclasses.replace(
    ROBERTA,
    base="esm",
    attention_norm="attention.LayerNorm",
    ffn_norm="LayerNorm",
    final_norm="encoder.emb_layer_norm_after",
    position=None,
    token_type=None,
    embedding_norm=None,
    padding_index=None,
    fields={"activation": "gelu"},
    defaults={
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 1026,
        "position_embedding_type": "absolute",
        "emb_layer_norm_before": None,
        "token_dropout": False,
    },
    # Older files have a table of positions that nothing reads; the angles are those of every model.
    spare=("embeddings.position_embeddings.weight", "contact_head.*", "*rotary_embeddings.inv_freq"),
    more=_more,
    variant=_variant,
    options={"emb_layer_norm_before": (None, False), "position_embedding_type": ("absolute", "rotary")},
)
