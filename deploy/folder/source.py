"""Reads what a model folder says about itself, before any library is loaded.

Everything here takes milliseconds: the error for a wrong folder, task or option comes at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle import CONFIG_FILE, MANIFEST_FILE, OFFSET_POSITIONS, TASKS, Pooling, Prompts, Sparse
from deploy.folder.chat import Chat, read_chat
from deploy.folder.errors import FolderError, refuse_pointer
from deploy.folder.json_files import read_json, read_settings
from deploy.folder.sentence import DenseModule, SentenceFiles, read_sentence_files
from deploy.folder.token_vectors import TokenFiles
from deploy.folder.transformer_settings import check_config_options
from torch_ext.encoder.huggingface.safetensors import files_of_index

__all__ = ["Source", "read_source"]

_OF_IMAGES = ("clip", "siglip")
"""How `model_type` begins of models whose texts are compared with images."""

_MOST_LABELS = 1_000_000
_TASK_OF_SUFFIX = {task.architecture: name for name, task in reversed([*TASKS.items()])}
_SPARSE = next(name for name, task in TASKS.items() if task.needs.sparse)
"""The task of a folder that it makes sparse vectors with."""
_TOKENS = next(name for name, task in TASKS.items() if task.needs.token_vectors)
"""The task of a folder that makes vectors of tokens."""
_EMBEDS = next(name for name, task in TASKS.items() if task.needs.pooling)
"""The task of a folder that sentence-transformers makes embeddings with."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
)

_WEIGHTS: Mapping[str, str] = {
    "model.safetensors": "model.safetensors",
    "model.safetensors.index.json": "*.safetensors",
    "pytorch_model.bin": "pytorch_model.bin",
    "pytorch_model.bin.index.json": "pytorch_model*.bin",
}
"""Files that weights are loaded from, best first, and which files then hold them."""


@dataclass(frozen=True)
class Source:
    """A model folder of transformers, and how it is to be used.

    Attributes:
        folder: Folder with `config.json`, weights and tokenizer.
        name: Name for people and for the server.
        revision: Commit on the hub, or None.
        config: Contents of `config.json`.
        model_type: Such as `bert`.
        architecture: Class of transformers that fits the task, such as `BertForMaskedLM`.
        task: One of the bundle's tasks.
        task_source: What decided the task.
        pooling: None unless the task needs it.
        dense: Linear stages between pooling and norm, unless the task has no pooling.
        sparse: How sparse vectors are made; None unless the task needs it.
        tokens: What becomes of vectors of tokens; None unless the task needs it.
        prompts: None unless the task makes embeddings or the model is a cross-encoder, and it has some.
        suffix: What a chat template puts behind texts that go through one: the tokenizer adds nothing else. None: there
            is no template.
        max_tokens: Longest input, or None: what the tokenizer says, within `max_positions`.
        max_positions: Longest input that the position table allows.
        lowercase: Whether sentence-transformers lower-cases texts before the tokenizer.
        tokenizer_settings: What sentence-transformers has besides in `tokenizer_config.json`.
        cross_encoder: Whether sentence-transformers calls it one.
        named_activation: Class that the files name for scores, or None.
        weights: Name of the weights file.
        weights_bytes: Size of all weights files.
        notes: What the user should know.
    """

    folder: Path
    name: str
    revision: str | None
    config: Mapping[str, Any]
    model_type: str
    architecture: str
    task: str
    task_source: str
    pooling: Pooling | None
    dense: tuple[DenseModule, ...]
    sparse: Sparse | None
    tokens: TokenFiles | None
    prompts: Prompts | None
    suffix: str | None
    max_tokens: int | None
    max_positions: int
    lowercase: bool
    tokenizer_settings: Mapping[str, Any]
    cross_encoder: bool
    named_activation: str | None
    weights: str
    weights_bytes: int
    notes: tuple[str, ...]

    @property
    def safe_format(self) -> bool:
        """Whether weights are in safetensors, which cannot hold code."""
        return "safetensors" in self.weights

    @property
    def supported_by_torch_ext(self) -> bool:
        """Whether torch_ext's encoder runs this kind of model; others have ONNX variants only."""
        from torch_ext.encoder import ARCHITECTURES

        return self.model_type in ARCHITECTURES

    @property
    def prompt(self) -> str:
        """What goes before every text; empty: nothing."""
        return "" if self.prompts is None else self.prompts.default_text


def read_source(
    root: Path,
    name: str,
    revision: str | None,
    task: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_tokens: int | None = None,
    model_types: Collection[str] | None = None,
) -> Source:
    """Reads a model folder.

    Args:
        root: The folder.
        name: Name for people.
        revision: Commit on the hub, or None.
        task: Overrides the task that the folder names.
        pooling: Overrides the pooling mode.
        normalize: Overrides whether embeddings are normalized.
        max_tokens: Overrides the longest input.
        model_types: Which kinds of models are taken; None: any.

    Raises:
        FolderError: It is not a model folder, or of a kind that is not taken, or an override does not fit.
    """
    sentence = read_sentence_files(root)
    folder = sentence.folder
    where = folder / CONFIG_FILE
    if sentence.problem is not None and not where.is_file():
        raise FolderError(sentence.problem)  # Of modules that are no model of transformers.
    config, model_type = _read_config(where, model_types)
    check_config_options(sentence.transformer, config)
    task, task_source = (task, "--task") if task is not None else _infer_task(config, sentence, where)
    embeds = TASKS[task].needs.pooling
    if not embeds and (pooling is not None or normalize is not None):
        raise FolderError(f"--pooling and --normalize are for {_EMBEDS}; the task is {task} ({task_source})")
    chosen, note = _choose_pooling(sentence, pooling, normalize) if embeds else (None, None)
    needs = TASKS[task].needs
    prompted = embeds or needs.sparse or needs.token_vectors or (sentence.cross_encoder and needs.labels)
    chat = _read_chat(sentence) if prompted else None
    prompts = (sentence.prompts if chat is None else chat.prompts) if prompted else None
    positions = _max_positions(config, model_type, where)
    longest = _longest(max_tokens, sentence.transformer.max_tokens, positions)
    _check_tokenizer(folder)
    weights, weights_bytes = _find_weights(folder)
    named = _named_activation(config, sentence)
    return Source(
        folder=folder,
        name=name,
        revision=revision,
        config=config,
        model_type=model_type,
        architecture=_architecture(config, model_type, task),
        task=task,
        task_source=task_source,
        pooling=chosen,
        dense=tuple(sentence.dense) if embeds or needs.token_vectors else (),
        sparse=(sentence.sparse or Sparse()) if needs.sparse else None,
        tokens=(sentence.tokens or TokenFiles()) if needs.token_vectors else None,
        prompts=prompts,
        suffix=None if chat is None else chat.suffix,
        max_tokens=longest,
        max_positions=positions,
        lowercase=sentence.transformer.lowercase,
        tokenizer_settings=sentence.transformer.tokenizer,
        cross_encoder=sentence.cross_encoder or named is not None,
        named_activation=named,
        weights=weights,
        weights_bytes=weights_bytes,
        notes=tuple(item for item in (_prompt_note(prompts or sentence.prompts, prompted), note) if item),
    )


# One function per question that a folder answers.


def _read_config(where: Path, model_types: Collection[str] | None) -> tuple[Mapping[str, Any], str]:
    if (where.parent / "adapter_config.json").is_file():
        # transformers reads it only where peft is installed.
        raise FolderError(
            f"{where.parent}: an adapter of peft, {'beside' if where.is_file() else 'without'} its model: merge them, "
            "and pass the folder that PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(...) "
            "writes"
        )
    if not where.is_file():
        raise FolderError(
            f"{where.parent}: not a model folder (no {CONFIG_FILE}); pass a folder saved by save_pretrained, or a hub "
            "id"
        )
    config = read_json(where, dict)
    model_type = config.get("model_type")
    named = config.get("architectures")
    if not isinstance(named, list | None):
        raise FolderError(f"{where}: architectures: expected an array of names, got {named!r:.80}")
    kind = ", ".join(map(str, named or [])) or "no architecture"
    if not isinstance(model_type, str):
        raise FolderError(f"{where}: unknown architecture {model_type!r} ({kind}); expected model_type, a string")
    if model_type.startswith(_OF_IMAGES):
        raise FolderError(
            f"{where}: {model_type} compares texts with images, which is not served; torch_ext.Encoder and "
            "torch_ext.Head.from_pretrained run its encoder of texts in Python"
        )
    if isinstance(quantized := config.get("quantization_config") or config.get("compression_config"), dict):
        raise FolderError(
            f"{where}: expected weights in fp32, fp16 or bf16, got ones that are quantized "
            f"({quantized.get('quant_method')!r:.40}); pass the model that they were made of"
        )
    labels = config.get("num_labels")
    if isinstance(labels, int) and labels > _MOST_LABELS:  # Each would get a name, in transformers too.
        raise FolderError(f"{where}: num_labels: expected at most {_MOST_LABELS}, got {labels!r:.40}")
    if model_types is not None and model_type not in model_types:
        raise FolderError(
            f"{where}: unknown architecture {model_type!r} ({kind}): python -m deploy export it, which writes variants "
            "for torch or ONNX Runtime; served from a folder: "
            + ", ".join(name for name in model_types if not name.startswith(_OF_IMAGES))
        )
    return config, model_type


def _infer_task(config: Mapping[str, Any], sentence: SentenceFiles, where: Path) -> tuple[str, str]:
    if sentence.sparse is not None:
        return _SPARSE, sentence.where
    if sentence.tokens is not None:
        return _TOKENS, sentence.where
    if sentence.embeds:
        return _EMBEDS, sentence.where
    architectures = config.get("architectures") or []
    if not architectures:
        return _EMBEDS, "no architecture named"  # As sentence-transformers reads it.
    for architecture in architectures:
        for suffix, task in _TASK_OF_SUFFIX.items():
            if str(architecture).endswith(suffix):
                return task, str(architecture)
    named = ", ".join(map(str, architectures))
    raise FolderError(f"{where}: cannot tell the task from {named}; pass --task {'|'.join(TASKS)}")


def _architecture(config: Mapping[str, Any], model_type: str, task: str) -> str:
    architectures = [str(item) for item in config.get("architectures") or []]
    wanted = TASKS[task].architecture
    return next(
        (item for item in architectures if item.endswith(wanted)), architectures[0] if architectures else model_type
    )


def _choose_pooling(sentence: SentenceFiles, mode: str | None, normalize: bool | None) -> tuple[Pooling, str | None]:
    """Decides the pooling: options first, then the model's files, then what sentence-transformers does without them."""
    if sentence.problem is not None and mode is None:
        # The server's --pooling changes nothing, it only checks.
        raise FolderError(
            f"{sentence.problem}; python -m deploy export with --pooling makes embeddings in another way on purpose"
        )
    note = None
    if mode is not None:
        source = "--pooling"
    elif sentence.mode is not None:
        source = sentence.where
    else:
        source = "default"
        note = (
            "the model has no files of sentence-transformers: mean pooling"
            + ("" if normalize is not None else " without normalization")
            + ", as sentence-transformers does then; --pooling and --normalize override"
        )
    if normalize is not None:
        source += " and --normalize" if normalize else " and --no-normalize"
    return Pooling(
        mode or sentence.mode or "mean",
        sentence.normalize if normalize is None else normalize,
        source,
        sentence.dimensions,
        sentence.include_prompt or sentence.transformer.chat is not None,
    ), note


def _read_chat(sentence: SentenceFiles) -> Chat | None:
    module = sentence.transformer
    if module.chat is None:
        return None
    settings = {**read_settings(sentence.folder / "tokenizer_config.json"), **module.tokenizer}
    return read_chat(sentence.folder, settings, sentence.prompts, module.chat == "structured", module.chat_options)


def _prompt_note(prompts: Prompts | None, applied: bool) -> str | None:
    if prompts is None:
        return None
    if applied and prompts.default_text:
        return f"the model's default prompt goes before every text: {prompts.default_text!r} ({prompts.default})"
    texts = ", ".join(f"{name}: {text!r}" for name, text in prompts.texts.items() if text)
    return f"the model was trained with prompts; put them before your texts: {texts}"


# Models that take any length: what they were trained with, where their configuration does not say.
_UNLIMITED: Mapping[str, int] = {"t5": 512, "mt5": 512, "funnel": 512}


def _max_positions(config: Mapping[str, Any], model_type: str, where: Path) -> int:
    positions = config.get("max_position_embeddings", config.get("n_positions", _UNLIMITED.get(model_type)))
    if not isinstance(positions, int) or isinstance(positions, bool) or positions < 0:
        raise FolderError(f"{where}: max_position_embeddings: expected a whole number, got {positions!r}")
    if model_type in OFFSET_POSITIONS:
        padding = config.get("pad_token_id")
        positions -= (padding if isinstance(padding, int) else 1) + 1
    if positions < 3:
        raise FolderError(f"{where}: max_position_embeddings: expected room for at least 3 tokens, got {positions}")
    return positions


def _longest(option: int | None, declared: int | None, positions: int) -> int | None:
    if option is not None and not 3 <= option <= positions:
        raise FolderError(f"--max-tokens {option}: expected 3 to {positions} (the model's positions)")
    limit = option if option is not None else declared
    return limit if limit is None or 3 <= limit <= positions else positions


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / item).is_file() for item in _TOKENIZER_FILES):
        raise FolderError(
            f"{folder}: no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save one with tokenizer.save_pretrained"
        )


def _find_weights(folder: Path) -> tuple[str, int]:
    """Name of the weights file, and the size of all of them."""
    weights = next((item for item in _WEIGHTS if (folder / item).is_file()), None)
    if weights is None and (folder / MANIFEST_FILE).is_file():
        raise FolderError(
            f"{folder}: a bundle, which export has written; serve it with: python -m deploy serve {folder}"
        )
    if weights is None:
        raise FolderError(
            f"{folder}: no weights (none of {', '.join(_WEIGHTS)}); save them there with model.save_pretrained"
        )
    if weights.endswith(".index.json"):
        _check_shards(folder / weights)
    else:
        _refuse_pointer(folder / weights)
    return weights, sum(path.stat().st_size for path in folder.glob(_WEIGHTS[weights]))


def _check_shards(index: Path) -> None:
    """Checks that an index names files of its own folder only, which are there; transformers reads what it names."""
    try:
        files = files_of_index(index, read_json(index, dict).get("weight_map"))
    except (FileNotFoundError, ValueError) as error:
        raise FolderError(str(error)) from error
    for file in files:
        _refuse_pointer(file)


def _refuse_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            refuse_pointer(file.read(64), str(path))
    except OSError as error:
        raise FolderError(f"{path}: cannot be read: {error.strerror or error}") from error


def _named_activation(config: Mapping[str, Any], sentence: SentenceFiles) -> str | None:
    """The class over the logits, in the order in which sentence-transformers looks for it."""
    newer = config.get("sentence_transformers")
    for named in (
        sentence.activation,
        newer.get("activation_fn") if isinstance(newer, dict) else None,
        config.get("sbert_ce_default_activation_function"),
    ):
        if isinstance(named, str):
            return named
    return None
