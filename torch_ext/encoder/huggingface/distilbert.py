"""DistilBERT: a BERT without token types whose parts have other names."""

from __future__ import annotations

from torch_ext.encoder.huggingface.architecture import Architecture, HeadNames
from torch_ext.encoder.huggingface.bert import QUESTIONS, TOKENS

__all__ = ["DISTILBERT"]

DISTILBERT = Architecture(
    base="distilbert",
    layer="transformer.layer.{}",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    ffn_norm="output_layer_norm",
    heads={
        "text-classification": HeadNames(out="classifier", dense="pre_classifier", activation="relu"),
        "token-classification": TOKENS,
        "question-answering": QUESTIONS,
        "fill-mask": HeadNames(
            out="vocab_projector",
            dense="vocab_transform",
            norm="vocab_layer_norm",
            activation="config.activation",
            tied=True,
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
    defaults={"activation": "gelu"},
)
