"""What the classes of tokenizers in transformers take for granted where files are silent: a row per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ANY", "KINDS", "KIND_OF_MODEL", "Kind"]

_BRACKETS = {"pad": "[PAD]", "mask": "[MASK]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]"}
_ANGLES = {"pad": "<pad>", "mask": "<mask>", "cls": "<s>", "sep": "</s>", "unk": "<unk>"}


@dataclass(frozen=True)
class Kind:
    """What a class of tokenizers takes for granted.

    Attributes:
        special: Its special tokens.
        token_types: Whether models are given token types.
        lowercase: Fields of the normalizer that its settings decide, by their names there, and their values where the
            settings are silent.
        space: Whether its settings decide on a space in front of the text.
    """

    special: Mapping[str, str]
    token_types: bool
    lowercase: Mapping[str, tuple[str, Any]]
    space: bool = False


_BERT_NORMALIZER: Mapping[str, tuple[str, Any]] = {
    "lowercase": ("do_lower_case", True),
    "strip_accents": ("strip_accents", None),
    "handle_chinese_chars": ("tokenize_chinese_chars", True),
}
_MPNET_NORMALIZER = {name: _BERT_NORMALIZER[name] for name in ("lowercase", "strip_accents")}
ANY = Kind({}, True, {})
"""Of classes without a row in `KINDS`."""

KINDS: Mapping[str, Kind] = {
    "Bert": Kind(_BRACKETS, True, _BERT_NORMALIZER),
    "Electra": Kind(_BRACKETS, True, _BERT_NORMALIZER),
    "DistilBert": Kind(_BRACKETS, False, _BERT_NORMALIZER),
    "MPNet": Kind({**_ANGLES, "unk": "[UNK]"}, False, _MPNET_NORMALIZER),
    "Roberta": Kind(_ANGLES, False, {}, space=True),
    "XLMRoberta": Kind(_ANGLES, False, {}),
    "Camembert": Kind(_ANGLES, False, {}),
    "Albert": Kind({**_BRACKETS, "pad": "<pad>", "unk": "<unk>"}, True, {}),
    "Deberta": Kind(_BRACKETS, True, {}, space=True),
    "DebertaV2": Kind(_BRACKETS, True, {}),
    "Esm": Kind({"pad": "<pad>", "mask": "<mask>", "cls": "<cls>", "sep": "<eos>", "unk": "<unk>"}, False, {}),
    "T5": Kind({"pad": "<pad>", "unk": "<unk>", "eos": "</s>"}, False, {}),
}
"""By the name of the class, without what it ends in (`Tokenizer`, `TokenizerFast`)."""

KIND_OF_MODEL: Mapping[str, str] = {
    "bert": "Bert",
    "ernie": "Bert",
    "megatron-bert": "Bert",
    "nomic_bert": "Bert",
    "electra": "Electra",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
    "roberta": "Roberta",
    "roberta-prelayernorm": "Roberta",
    "data2vec-text": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "xlm-roberta-xl": "XLMRoberta",
    "camembert": "Camembert",
    "albert": "Albert",
    "deberta": "Deberta",
    "deberta-v2": "DebertaV2",
    "esm": "Esm",
    "t5": "T5",
    "mt5": "T5",
}
"""Which class transformers takes where no file names one."""
