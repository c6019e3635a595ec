"""All architectures, and the tasks of their heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch_ext.encoder.huggingface.albert import ALBERT, REMBERT
from torch_ext.encoder.huggingface.architecture import Architecture
from torch_ext.encoder.huggingface.bert import BERT, DATA2VEC, ELECTRA, ERNIE, ROBERTA, ROBERTA_PRELAYERNORM
from torch_ext.encoder.huggingface.clip import CLIP, SIGLIP
from torch_ext.encoder.huggingface.deberta import DEBERTA, DEBERTA_V2
from torch_ext.encoder.huggingface.distilbert import DISTILBERT
from torch_ext.encoder.huggingface.esm import ESM
from torch_ext.encoder.huggingface.gte import NEW
from torch_ext.encoder.huggingface.jina import JINA_V3, XLM_ROBERTA_FLASH
from torch_ext.encoder.huggingface.llama import EUROBERT, GEMMA3, QWEN3
from torch_ext.encoder.huggingface.megatron import MEGATRON_BERT, XLM_ROBERTA_XL
from torch_ext.encoder.huggingface.modernbert import MODERNBERT
from torch_ext.encoder.huggingface.mpnet import MPNET
from torch_ext.encoder.huggingface.nomic import NOMIC
from torch_ext.encoder.huggingface.t5 import T5

__all__ = ["ARCHITECTURES", "HEAD_CLASSES", "find_architecture", "text_config", "text_values"]

_TABLE: Mapping[str, Architecture] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "mpnet": MPNET,
    "modernbert": MODERNBERT,
    "nomic_bert": NOMIC,
    "albert": ALBERT,
    "ernie": ERNIE,
    "rembert": REMBERT,
    "roberta-prelayernorm": ROBERTA_PRELAYERNORM,
    "data2vec-text": DATA2VEC,
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA_V2,
    "megatron-bert": MEGATRON_BERT,
    "xlm-roberta-xl": XLM_ROBERTA_XL,
    "qwen3": QWEN3,
    "gemma3_text": GEMMA3,
    "eurobert": EUROBERT,
    "new": NEW,
    "t5": T5,
    "mt5": T5,
    "esm": ESM,
    "jina_embeddings_v3": JINA_V3,
    "clip_text_model": CLIP,
    "siglip_text_model": SIGLIP,
    "siglip2_text_model": SIGLIP,
}

_TEXT_PARTS: Mapping[str, str] = {
    "clip": "clip_text_model",
    "siglip": "siglip_text_model",
    "siglip2": "siglip2_text_model",
}
"""Models of texts and images, whose configurations have one of the texts' encoder inside."""

ARCHITECTURES: tuple[str, ...] = (*_TABLE, *_TEXT_PARTS)

HEAD_CLASSES: Mapping[str, str] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}
"""Tasks by what the names of their classes end in."""

# Options that change what is computed, and the one value that is supported.
_OPTIONS: Mapping[str, Any] = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}


def find_architecture(config: Any) -> Architecture:
    """The row of a configuration.

    Args:
        config: has the configuration's values as attributes, ``model_type`` among them.

    Raises:
        ValueError: the architecture, or an option of it, is not supported.
    """
    architecture = _TABLE.get(config.model_type)
    if architecture is ROBERTA and getattr(config, "position_embedding_type", None) == "rotary":
        architecture = XLM_ROBERTA_FLASH
    if architecture is None:
        raise ValueError(
            f"unsupported architecture {config.model_type!r:.80}; supported: {', '.join(ARCHITECTURES)}. Another model "
            "still gains from torch_ext.optimize(model)"
        )
    for name, wanted in {**_OPTIONS, **architecture.options}.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"unsupported configuration: expected {name}={expected}, got {value!r:.80}")
    return architecture


def text_config(config: Any) -> Any:
    """The configuration of a model's encoder of texts: a part of it, or itself."""
    return config.text_config if config.model_type in _TEXT_PARTS else config


def text_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of what a ``config.json`` says."""
    kind = _TEXT_PARTS.get(config["model_type"])
    if kind is None:
        return dict(config)
    inner = config.get("text_config")
    return {
        **(inner if isinstance(inner, dict) else {}),
        "model_type": kind,
        "architectures": config.get("architectures"),
    }
