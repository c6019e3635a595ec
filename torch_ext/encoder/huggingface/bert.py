"""BERT, and what differs from it in no more than its heads and its positions: RoBERTa and its kin, ELECTRA."""

from __future__ import annotations

import dataclasses

from torch_ext.encoder.huggingface.architecture import Architecture, HeadNames, padding_id

__all__ = ["BERT", "ELECTRA", "QUESTIONS", "ROBERTA", "TOKENS"]

TOKENS = HeadNames(out="classifier")
QUESTIONS = HeadNames(out="qa_outputs")

BERT = Architecture(
    base="bert",
    layer="encoder.layer.{}",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    ffn_norm="output.LayerNorm",
    heads={
        "text-classification": HeadNames(out="classifier", dense="{base}.pooler.dense", activation="tanh"),
        "token-classification": TOKENS,
        "question-answering": QUESTIONS,
        "fill-mask": HeadNames(
            out="cls.predictions.decoder",
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            activation="config.hidden_act",
            tied=True,
            bias="cls.predictions.bias",
        ),
    },
)

ROBERTA = dataclasses.replace(
    BERT,
    base="roberta",
    heads={
        "text-classification": HeadNames(out="classifier.out_proj", dense="classifier.dense", activation="tanh"),
        "token-classification": TOKENS,
        "question-answering": QUESTIONS,
        "fill-mask": HeadNames(
            out="lm_head.decoder",
            dense="lm_head.dense",
            norm="lm_head.layer_norm",
            activation="gelu",
            tied=True,
            bias="lm_head.bias",
        ),
    },
    padding_index=padding_id,
    defaults={**BERT.defaults, "pad_token_id": 1},
)

ELECTRA = dataclasses.replace(
    BERT,
    base="electra",
    heads={
        "text-classification": HeadNames(out="classifier.out_proj", dense="classifier.dense", activation="gelu"),
        "token-classification": TOKENS,
        "question-answering": QUESTIONS,
        "fill-mask": HeadNames(
            out="generator_lm_head",
            dense="generator_predictions.dense",
            norm="generator_predictions.LayerNorm",
            activation="gelu",
            tied=True,
        ),
    },
)
