"""Reads what a model folder says about itself, before any library is loaded.

Everything here takes milliseconds, so that a wrong folder, task or option is told at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle import CONFIG_FILE, POOLING_MODES, PROBLEM_TYPES, TASKS, Pooling
from deploy.export.errors import ExportError, first_line

__all__ = ["MODEL_TYPES", "Source", "find_model", "read_source"]

MODEL_TYPES: Mapping[str, bool] = {
    "bert": True,
    "roberta": True,
    "distilbert": True,
    "xlm-roberta": True,
    "camembert": True,
    "electra": True,
    "mpnet": True,
    "albert": False,
}
"""Encoders that can be exported, by `model_type`, and whether torch_ext runs them; others have ONNX variants only."""

_TASK_OF_SUFFIX = {
    "ForSequenceClassification": "text-classification",
    "ForMaskedLM": "fill-mask",
    "Model": "feature-extraction",
}

# Positions of these begin behind the padding index.
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


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
        pooling: None unless the task is feature-extraction.
        max_tokens: Longest input, or None: what the tokenizer says, within `max_positions`.
        max_positions: Longest input that the position table allows.
        lowercase: Whether sentence-transformers lower-cases texts before the tokenizer.
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
    max_tokens: int | None
    max_positions: int
    lowercase: bool
    weights: str
    weights_bytes: int
    notes: tuple[str, ...]

    @property
    def safe_format(self) -> bool:
        """Whether weights are in safetensors, which cannot hold code."""
        return "safetensors" in self.weights

    @property
    def supported_by_torch_ext(self) -> bool:
        """Whether torch_ext's encoder runs this kind of model."""
        return MODEL_TYPES[self.model_type]

    def problem_type(self) -> str:
        """How the logits of a classifier are read; what transformers' pipelines do when the config does not say."""
        told = self.config.get("problem_type")
        if told in PROBLEM_TYPES:
            return str(told)
        return "regression" if len(self.labels()) == 1 else "single_label_classification"

    def labels(self) -> tuple[str, ...]:
        """Names of a classifier's classes, in the order of its logits."""
        names = self.config.get("id2label")
        if isinstance(names, dict) and names:
            try:
                by_id = {int(key): str(value) for key, value in names.items()}
            except ValueError:
                by_id = {}
            if sorted(by_id) == list(range(len(by_id))) and by_id:
                return tuple(by_id[index] for index in range(len(by_id)))
            raise ExportError(
                f"{self.folder / CONFIG_FILE}: id2label: expected the ids 0 to n-1, got {sorted(names)[:5]}"
            )
        count = self.config.get("num_labels", 2)
        return tuple(f"LABEL_{index}" for index in range(int(count)))


def _hub_state() -> str:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{name}={os.environ[name]} is set, so nothing is downloaded: unset it, or pass a folder"
    return "HF_HUB_OFFLINE is not set: check the network and HF_ENDPOINT, or pass a folder"


def find_model(model: str, revision: str | None = None) -> tuple[Path, str, str | None]:
    """Finds a model on this machine or on the hub.

    Args:
        model: Path of a folder, or id on the hub.
        revision: Branch, tag or commit on the hub.

    Returns:
        Folder, name, and commit (None for a folder).

    Raises:
        ExportError: There is no such folder, or the hub does not give the model.
    """
    path = Path(model).expanduser()
    if not model:
        raise ExportError("MODEL is empty: no such folder, and not an id on the hub (expected NAME or OWNER/NAME)")
    if path.is_dir():
        if revision is not None:
            raise ExportError(f"--revision {revision}: only for models on the hub, and {model} is a folder")
        resolved = Path(os.path.realpath(path))
        return resolved, resolved.name, None
    if path.exists():
        raise ExportError(
            f"{model}: expected a model folder or an id on the hub, found a file; pass the folder it is in"
        )
    if not _REPO_ID.fullmatch(model) or ".." in model or model.startswith((".", "/", "~")):
        raise ExportError(f"{model}: no such folder, and not an id on the hub (expected NAME or OWNER/NAME)")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> tuple[Path, str, str | None]:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ExportError(f"{model}: no such folder, and huggingface_hub is not installed to download it") from error

    description = ["*.json", "*.txt", "*.model"]
    other_formats = ["onnx/*", "openvino/*", "coreml/*", "*.fp16.*", "*.onnx*", "tf_model*", "flax_model*"]
    try:
        for patterns in (["*.safetensors"], ["pytorch_model*.bin"]):
            folder = Path(
                huggingface_hub.snapshot_download(
                    model, revision=revision, allow_patterns=[*description, *patterns], ignore_patterns=other_formats
                )
            )
            if any(folder.rglob(patterns[0])):
                break
    except errors.GatedRepoError:
        raise ExportError(f"{model}: access is gated; accept its terms on the hub and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ExportError(f"{model}: the hub has no revision {revision!r} of it") from None
    except errors.RepositoryNotFoundError:
        raise ExportError(
            f"{model}: no such folder, and no such model on the hub (for a private one set HF_TOKEN)"
        ) from None
    except errors.HFValidationError:
        raise ExportError(f"{model}: no such folder, and not an id on the hub (expected NAME or OWNER/NAME)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        raise ExportError(
            f"{model}: no such folder, and the hub cannot be reached or does not answer for it. {_hub_state()}"
        ) from error
    except OSError as error:  # Connection errors of requests, and a full disk, are both of that kind.
        from deploy.export.errors import is_disk_full

        if is_disk_full(error):
            raise
        raise ExportError(f"{model}: no such folder, and the hub cannot be reached. {_hub_state()}") from error
    revision_found = folder.name if folder.parent.name == "snapshots" else None
    return folder, model, revision_found


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: expected JSON: {first_line(error)}") from error
    if not isinstance(value, kind):
        raise ExportError(
            f"{path}: expected a JSON {'object' if kind is dict else 'array'}, got {type(value).__name__}"
        )
    return value


@dataclass(frozen=True)
class _SentenceFiles:
    """What the files of sentence-transformers say."""

    folder: Path
    found: bool
    mode: str | None
    normalize: bool
    max_tokens: int | None
    lowercase: bool
    where: str
    problem: str | None
    notes: tuple[str, ...]


def _read_sentence_files(root: Path) -> _SentenceFiles:
    """Reads `modules.json`, the pooling module's `config.json` and `sentence_bert_config.json`."""
    folder, mode, normalize, where, problem, notes = root, None, False, "", None, []
    modules_file = root / "modules.json"
    pooling_file: Path | None = None
    if modules_file.is_file():
        modules = _read_json(modules_file, list)
        for index, module in enumerate(modules):
            if not isinstance(module, dict) or not isinstance(module.get("type"), str):
                raise ExportError(f"{modules_file}: expected objects with a type, got {module!r:.80}")
            kind = module["type"].rpartition(".")[2]
            place = root / str(module.get("path", ""))
            if index == 0 and kind == "Transformer":
                folder = place
            elif kind == "Pooling" and pooling_file is None:
                pooling_file = place / "config.json"
            elif kind == "Normalize":
                normalize = True
            else:
                problem = problem or f"{modules_file}: module {kind} changes the embeddings and is not supported"
        where = modules_file.name
    elif (root / "1_Pooling" / "config.json").is_file():
        pooling_file = root / "1_Pooling" / "config.json"
        normalize = (root / "2_Normalize").is_dir()
    if pooling_file is not None:
        where = str(pooling_file.relative_to(root))
        mode, trouble = _pooling_mode(pooling_file)
        problem = problem or trouble

    max_tokens, lowercase = None, False
    settings_file = next(
        (path for path in (folder / "sentence_bert_config.json", root / "sentence_bert_config.json") if path.is_file()),
        None,
    )
    if settings_file is not None:
        settings = _read_json(settings_file, dict)
        value = settings.get("max_seq_length")
        max_tokens = value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
        lowercase = settings.get("do_lower_case") is True
    prompts_file = root / "config_sentence_transformers.json"
    if prompts_file.is_file():
        settings = _read_json(prompts_file, dict)
        if any((settings.get("prompts") or {}).values()):
            default = settings.get("default_prompt_name")
            notes.append(
                "the model was trained with prompts; put them before your texts: "
                + json.dumps(settings["prompts"], ensure_ascii=False)
                + (f" (default: {default})" if default else "")
            )
    found = modules_file.is_file() or pooling_file is not None
    return _SentenceFiles(folder, found, mode, normalize, max_tokens, lowercase, where, problem, tuple(notes))


def _pooling_mode(path: Path) -> tuple[str | None, str | None]:
    """The mode in a pooling module's `config.json`, or what is wrong with it."""
    if not path.is_file():
        return None, f"{path}: missing, though modules.json names it"
    settings = _read_json(path, dict)
    told = settings.get("pooling_mode")
    if told is None:
        names = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
        told = [
            names.get(key.removeprefix("pooling_mode_"), key.removeprefix("pooling_mode_"))
            for key, value in settings.items()
            if key.startswith("pooling_mode_") and value
        ] or ["mean"]
    modes = [told] if isinstance(told, str) else list(told)
    if len(modes) == 1 and modes[0] in POOLING_MODES:
        return modes[0], None
    return None, f"{path}: pooling {' + '.join(map(str, modes))} is not supported (only {', '.join(POOLING_MODES)})"


def _infer_task(config: Mapping[str, Any], sentence: _SentenceFiles, where: Path) -> tuple[str, str]:
    if sentence.found:
        return "feature-extraction", sentence.where
    architectures = config.get("architectures") or []
    for architecture in architectures:
        for suffix, task in _TASK_OF_SUFFIX.items():
            if str(architecture).endswith(suffix):
                return task, str(architecture)
    named = ", ".join(map(str, architectures)) or "no architecture"
    raise ExportError(f"{where}: cannot tell the task from {named}; pass --task {'|'.join(TASKS)}")


def _whole(config: Mapping[str, Any], name: str, where: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ExportError(f"{where}: {name}: expected a whole number, got {value!r}")
    return value


def read_source(
    root: Path,
    name: str,
    revision: str | None,
    task: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_tokens: int | None = None,
) -> Source:
    """Reads a model folder.

    Args:
        root: The folder.
        name: Name for people.
        revision: Commit on the hub, or None.
        task: Overrides the task that the folder tells.
        pooling: Overrides the pooling mode.
        normalize: Overrides whether embeddings are normalized.
        max_tokens: Overrides the longest input.

    Raises:
        ExportError: It is not a model folder, or of a kind that cannot be exported, or an override does not fit.
    """
    sentence = _read_sentence_files(root)
    folder = sentence.folder
    where = folder / CONFIG_FILE
    if not where.is_file():
        raise ExportError(
            f"{folder}: not a model folder (no {CONFIG_FILE}); pass a folder saved by save_pretrained, or a hub id"
        )
    config = _read_json(where, dict)

    model_type = config.get("model_type")
    architectures = [str(item) for item in config.get("architectures") or []]
    if model_type not in MODEL_TYPES:
        kind = ", ".join(architectures) or "no architecture"
        raise ExportError(
            f"{where}: unknown architecture {model_type!r} ({kind}); supported model types: {', '.join(MODEL_TYPES)}"
        )
    if task is None:
        task, task_source = _infer_task(config, sentence, where)
    else:
        task_source = "--task"
    wanted = {value: key for key, value in _TASK_OF_SUFFIX.items()}[task]
    architecture = next(
        (item for item in architectures if item.endswith(wanted)), architectures[0] if architectures else model_type
    )

    notes = list(sentence.notes)
    chosen: Pooling | None = None
    if task == "feature-extraction":
        chosen, note = _choose_pooling(sentence, pooling, normalize)
        notes.extend([note] if note else [])
    elif pooling is not None or normalize is not None:
        raise ExportError(f"--pooling and --normalize are for feature-extraction; the task is {task} ({task_source})")

    positions = _whole(config, "max_position_embeddings", where)
    if model_type in _OFFSET_POSITIONS:
        padding = config.get("pad_token_id")
        positions -= (padding if isinstance(padding, int) else 1) + 1
    if positions < 3:
        raise ExportError(f"{where}: max_position_embeddings: expected room for at least 3 tokens, got {positions}")
    limit = max_tokens if max_tokens is not None else sentence.max_tokens
    if limit is not None and not 3 <= limit <= positions:
        if max_tokens is not None:
            raise ExportError(f"--max-tokens {max_tokens}: expected 3 to {positions} (the model's positions)")
        limit = positions

    if not any((folder / item).is_file() for item in _TOKENIZER_FILES):
        raise ExportError(
            f"{folder}: no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save one with tokenizer.save_pretrained"
        )
    weights = next((item for item in _WEIGHTS if (folder / item).is_file()), None)
    if weights is None:
        raise ExportError(
            f"{folder}: no weights (none of {', '.join(_WEIGHTS)}); save them there with model.save_pretrained"
        )
    pattern = "*.safetensors" if "safetensors" in weights else "pytorch_model*.bin"
    if not weights.endswith(".json"):
        pattern = weights
    return Source(
        folder=folder,
        name=name,
        revision=revision,
        config=config,
        model_type=model_type,
        architecture=architecture,
        task=task,
        task_source=task_source,
        pooling=chosen,
        max_tokens=limit,
        max_positions=positions,
        lowercase=sentence.lowercase,
        weights=weights,
        weights_bytes=sum(path.stat().st_size for path in folder.glob(pattern)),
        notes=tuple(notes),
    )


def _choose_pooling(sentence: _SentenceFiles, mode: str | None, normalize: bool | None) -> tuple[Pooling, str | None]:
    """Decides the pooling: options first, then the model's files, then what sentence-transformers does without them."""
    if sentence.problem is not None and mode is None:
        raise ExportError(f"{sentence.problem}; pass --pooling to make embeddings in another way on purpose")
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
        mode or sentence.mode or "mean", sentence.normalize if normalize is None else normalize, source
    ), note
