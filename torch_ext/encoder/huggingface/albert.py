"""ALBERT and RemBERT: narrow tables, with a layer that leads to the width of the encoder."""

from __future__ import annotations

import dataclasses

from torch_ext.encoder.huggingface.architecture import Architecture, HeadNames
from torch_ext.encoder.huggingface.bert import BERT, QUESTIONS, TOKENS

__all__ = ["ALBERT", "REMBERT"]

ALBERT = Architecture(
    base="albert",
    # One layer, whose weights all layers share. An encoder has them once for each.
    layer="encoder.albert_layer_groups.0.albert_layers.0",
    qkv=("attention.query", "attention.key", "attention.value"),
    out="attention.dense",
    attention_norm="attention.LayerNorm",
    up="ffn",
    down="ffn_output",
    ffn_norm="full_layer_layer_norm",
    heads={
        "text-classification": HeadNames(out="classifier", dense="{base}.pooler", activation="tanh"),
        "token-classification": TOKENS,
        "question-answering": QUESTIONS,
        "fill-mask": HeadNames(
            out="predictions.decoder",
            dense="predictions.dense",
            norm="predictions.LayerNorm",
            activation="config.hidden_act",
            tied=True,
            bias="predictions.bias",
        ),
    },
    projection="encoder.embedding_hidden_mapping_in",
    defaults={"hidden_act": "gelu_new", "layer_norm_eps": 1e-12},
    options={"num_hidden_groups": 1, "inner_group_num": 1},
)

REMBERT = dataclasses.replace(
    BERT,
    base="rembert",
    heads={
        **BERT.heads,
        "fill-mask": HeadNames(
            out="cls.predictions.decoder",
            dense="cls.predictions.dense",
            norm="cls.predictions.LayerNorm",
            activation="config.hidden_act",
        ),
    },
    projection="encoder.embedding_hidden_mapping_in",
)
