"""BERT, and what differs from it in heads, positions or the place of norms: RoBERTa and its kin, ELECTRA, ERNIE."""

from __future__ import annotations

import dataclasses

from torch_ext.encoder.huggingface.architecture import Architecture, HeadNames, padding_id

__all__ = ["BERT", "DATA2VEC", "ELECTRA", "ERNIE", "QUESTIONS", "ROBERTA", "ROBERTA_PRELAYERNORM", "TOKENS"]

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

# Of later versions some add a table of tasks to the words.
ERNIE = dataclasses.replace(BERT, base="ernie", options={"use_task_id": False})

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

DATA2VEC = dataclasses.replace(ROBERTA, base="data2vec_text")

ROBERTA_PRELAYERNORM = dataclasses.replace(
    ROBERTA,
    base="roberta_prelayernorm",
    attention_norm="attention.LayerNorm",
    ffn_norm="intermediate.LayerNorm",
    final_norm="LayerNorm",
    more=lambda config: {"norm_first": True},
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
