"""What the files of sentence-transformers say: pooling, limits, prompts, activation.

| file | what it says |
|---|---|
| `modules.json` | the modules in their order, each with a folder; `_MODULES` has those that are supported |
| `1_Pooling/config.json` | how hidden states become an embedding |
| `sentence_bert_config.json`, or one of its older names | the longest input, and whether texts are lower-cased |
| `config_sentence_transformers.json` | prompts, shorter embeddings, and for cross-encoders the activation |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploy.bundle import POOLING_MODES, BundleError, Prompts, Reader, Sparse
from deploy.folder.errors import FolderError, at_least_one
from deploy.folder.json_files import read_json, read_settings
from deploy.folder.token_vectors import TokenFiles
from deploy.folder.transformer_settings import TransformerSettings, read_transformer_settings

__all__ = ["DenseModule", "SentenceFiles", "read_sentence_files"]

_POOLING_KEYS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Keys of old pooling modules; new ones name their modes under `pooling_mode`."""


_DENSE_ACTIVATIONS: Mapping[str, str] = {
    "Identity": "none",
    "Tanh": "tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "GELU": "gelu",
    "Sigmoid": "sigmoid",
    "LeakyReLU": "leaky_relu",
}
"""Of Dense modules, by the class of torch that their files name."""


@dataclass(frozen=True)
class DenseModule:
    """A linear stage behind the pooling.

    Attributes:
        folder: Where its weights are.
        activation: One of `DENSE_ACTIVATIONS` of the bundle.
    """

    folder: Path
    activation: str


@dataclass
class SentenceFiles:
    """What the files say.

    Attributes:
        folder: Where the transformer is.
        embeds: Whether they describe a model that makes embeddings.
        cross_encoder: Whether they describe one that scores pairs of texts.
        mode: Pooling, several joined by `+`, or None where nothing is said or it is not supported.
        include_prompt: Whether the tokens of prompts are pooled, too.
        normalize: Whether embeddings are normalized.
        dimensions: Leading dimensions that embeddings keep, or None.
        transformer: Settings of the Transformer module.
        prompts: None where there are none.
        dense: Linear stages between pooling and norm.
        tokens: What becomes of vectors of tokens, of a MultiVectorEncoder; None of other models.
        sparse: How logits of a masked-LM head become one sparse vector, or None.
        activation: Name of the class in torch that makes scores of a cross-encoder's logits, or None.
        where: The file that decides.
        problem: Why embeddings of ours would differ, or None.
    """

    folder: Path
    embeds: bool = False
    cross_encoder: bool = False
    mode: str | None = None
    normalize: bool = False
    dimensions: int | None = None
    transformer: TransformerSettings = field(default_factory=TransformerSettings)
    prompts: Prompts | None = None
    activation: str | None = None
    sparse: Sparse | None = None
    tokens: TokenFiles | None = None
    dense: list[DenseModule] = field(default_factory=list)
    where: str = ""
    problem: str | None = None
    pooling_file: Path | None = field(default=None, repr=False)
    include_prompt: bool = True


def read_sentence_files(root: Path) -> SentenceFiles:
    """Reads them; those that are missing say nothing.

    Raises:
        FolderError: A file is damaged, or leads out of the folder.
    """
    files = SentenceFiles(root)
    path = root / "config_sentence_transformers.json"
    if _kind(read_settings(path)) in _MULTI_VECTOR:
        files.tokens = TokenFiles()
    _read_modules(root, files)
    _read_pooling(root, files)
    _read_settings(root, files)
    _read_model_settings(root, files)
    if files.where == "modules.json" and files.embeds and files.sparse is None:
        files.problem = (
            files.problem or f"{root / 'modules.json'}: no Pooling module, without which there is no embedding"
        )
    if files.sparse is not None and (files.problem is not None or files.normalize):
        raise FolderError(
            files.problem or f"{root / 'modules.json'}: Normalize behind a SpladePooling is not supported"
        )
    return files


def _kind(settings: Mapping[str, Any]) -> object:
    """Which class saved a model; the first versions of PyLate do not say so."""
    return settings.get("model_type", _PYLATE if "query_prefix" in settings else "SentenceTransformer")


# One function per module: what it means for us.

_PYLATE = "ColBERT"
_MULTI_VECTOR = ("MultiVectorEncoder", _PYLATE)
_PACKAGES = ("", "sentence_transformers", "pylate")
"""Whose modules are known; models may have code of their own."""

_NAMES_OF_STREAMS = ("module_input_name", "module_output_name")
"""What newer modules call what they take and what they give."""


def _transformer(files: SentenceFiles, place: Path, index: int) -> None:
    if index == 0:
        files.folder = place
    else:
        files.problem = files.problem or f"{place}: a second Transformer module is not supported"


def _pooling(files: SentenceFiles, place: Path, index: int) -> None:
    if files.pooling_file is None:
        files.pooling_file = place / "config.json"
    else:
        files.problem = files.problem or f"{place}: a second Pooling module is not supported"


def _dense(files: SentenceFiles, place: Path, index: int) -> None:
    path = place / "config.json"
    settings = read_settings(path)
    given = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _DENSE_ACTIVATIONS.get(given.rpartition(".")[2]) if given.startswith("torch.") else None
    inputs = {settings.get(name) for name in _NAMES_OF_STREAMS} - {None}
    if settings.get("use_residual"):
        files.problem = files.problem or f"{path}: a Dense module with use_residual is not supported"
    elif files.tokens is not None and inputs <= {"token_embeddings"} and not files.tokens.normalize and activation:
        files.dense.append(DenseModule(place, activation))
    elif activation is None:
        files.problem = files.problem or f"{path}: a Dense module with {given} is not supported"
    elif files.pooling_file is None or files.normalize or not inputs <= {"sentence_embedding"}:
        files.problem = files.problem or f"{path}: a Dense module elsewhere than between Pooling and Normalize"
    else:
        files.dense.append(DenseModule(place, activation))


def _splade_pooling(files: SentenceFiles, place: Path, index: int) -> None:
    path = place / "config.json"
    settings = read_settings(path)
    names = {"strategy": "pooling_strategy", "activation": "activation_function"}
    try:
        files.sparse = Sparse.read(Reader(str(path), {ours: settings.get(name) for ours, name in names.items()}))
    except BundleError as error:
        raise FolderError(str(error)) from error


def _normalize(files: SentenceFiles, place: Path, index: int) -> None:
    path = place / "config.json"
    settings = read_settings(path)
    inputs = {settings.get(name) for name in _NAMES_OF_STREAMS} - {None}
    if files.tokens is not None and inputs == {"token_embeddings"}:
        files.tokens.normalize = True
    elif inputs <= {"sentence_embedding"}:
        files.normalize = True
    else:
        files.problem = files.problem or f"{path}: a Normalize module of {', '.join(map(str, inputs))}: not supported"


def _mask(files: SentenceFiles, place: Path, index: int) -> None:
    path = place / "config.json"
    settings = read_settings(path)
    words, tasks = settings.get("skiplist_words") or [], settings.get("skiplist_tasks")
    tasks = ["document"] if tasks is None else [tasks] if isinstance(tasks, str) else tasks
    kept = settings.get("keep_only_token_ids") or []
    if files.tokens is None:
        files.problem = files.problem or f"{path}: a MultiVectorMask in a model of another kind is not supported"
        return
    for value, kind in ((words, str), (tasks, str), (kept, int)):
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise FolderError(f"{path}: expected arrays of words, of tasks and of token ids, got {value!r:.80}")
    files.tokens.skiplist_words, files.tokens.skiplist_tasks, files.tokens.kept = words, tasks, kept


def _dropout(files: SentenceFiles, place: Path, index: int) -> None:
    """Does nothing outside of training."""


_MODULES: Mapping[str, Callable[[SentenceFiles, Path, int], None]] = {
    "Transformer": _transformer,
    "MLMTransformer": _transformer,
    "SpladePooling": _splade_pooling,
    "Pooling": _pooling,
    "Dense": _dense,
    "MultiVectorMask": _mask,
    "Normalize": _normalize,
    "Dropout": _dropout,
}


def _read_modules(root: Path, files: SentenceFiles) -> None:
    listed = root / "modules.json"
    if not listed.is_file():
        if (root / "1_Pooling" / "config.json").is_file():
            files.pooling_file = root / "1_Pooling" / "config.json"
            files.normalize = (root / "2_Normalize").is_dir()
            files.embeds = True
        return
    for index, module in enumerate(read_json(listed, list)):
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise FolderError(f"{listed}: expected objects with a type, got {module!r:.80}")
        package, _, kind = module["type"].rpartition(".")
        place = _inside(root, module.get("path", ""), listed)
        if package.partition(".")[0] not in _PACKAGES and kind != "Transformer":
            files.problem = files.problem or (
                f"{listed}: module {module['type']!s:.80} is code of the model's own, which is not run: what it "
                "computes is not known"
            )
        elif kind in _MODULES:
            _MODULES[kind](files, place, index)
        else:
            files.problem = files.problem or f"{listed}: module {kind} changes the embeddings and is not supported"
    files.where, files.embeds = listed.name, True


def _inside(root: Path, path: Any, where: Path) -> Path:
    """The folder of a module, which has to be the model's or below it.

    Raises:
        FolderError: It is not: whoever wrote the model would choose files of this machine.
    """
    if not isinstance(path, str):
        raise FolderError(f"{where}: path: expected a string, got {path!r:.80}")
    place = root / path
    if "\0" in path or not place.resolve().is_relative_to(root.resolve()):
        raise FolderError(f"{where}: path {path!r:.200} leads out of the model's folder; refused")
    return place


def _read_pooling(root: Path, files: SentenceFiles) -> None:
    path = files.pooling_file
    if path is None:
        return
    files.where = str(path.relative_to(root))
    if not path.is_file():
        files.problem = files.problem or f"{path}: missing, though modules.json names it"
        return
    settings = read_json(path, dict)
    files.include_prompt = settings.get("include_prompt") is not False
    declared = settings.get("pooling_mode")
    if declared is None:
        wanted = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
        # Several stand side by side in this order, whatever that of the file.
        order = sorted(wanted, key=[*_POOLING_KEYS, *wanted].index)
        declared = [_POOLING_KEYS.get(key, key.removeprefix("pooling_mode_")) for key in order] or ["mean"]
    modes = declared if isinstance(declared, list) else [declared]
    if modes and all(mode in POOLING_MODES for mode in modes):
        files.mode = "+".join(modes)
    else:
        files.problem = files.problem or (
            f"{path}: pooling {' + '.join(map(str, modes))} is not supported (only {', '.join(POOLING_MODES)})"
        )


def _read_settings(root: Path, files: SentenceFiles) -> None:
    files.transformer = read_transformer_settings((files.folder, root))
    if files.tokens is not None:
        files.tokens.read_lengths(files.transformer.content)


def _read_model_settings(root: Path, files: SentenceFiles) -> None:
    path = root / "config_sentence_transformers.json"
    if not path.is_file():
        return
    settings = read_json(path, dict)
    kind = _kind(settings)
    _take_kind(root, files, kind, path)
    if files.tokens is not None and kind == _PYLATE:
        settings["prompts"] = files.tokens.read_pylate(settings, path)
    if isinstance(settings.get("activation_fn"), str):
        files.activation = settings["activation_fn"]
    kept = settings.get("truncate_dim")
    if files.embeds and kept is not None:
        files.dimensions = at_least_one(kept, f"{path}: truncate_dim")
    most = settings.get("max_active_dims")
    if files.sparse is not None and most is not None:
        files.sparse = replace(files.sparse, most=at_least_one(most, f"{path}: max_active_dims"))
    _read_prompts(path, files, settings)


def _take_kind(root: Path, files: SentenceFiles, kind: object, path: Path) -> None:
    """Takes which class of sentence-transformers the model is of, and checks that its modules are those of one."""
    if kind == "CrossEncoder":
        files.cross_encoder, files.embeds = True, False
        if files.problem is not None or files.pooling_file is not None:
            raise FolderError(
                f"{root / 'modules.json'}: expected a cross-encoder of a Transformer module alone, which has its head; "
                "others are not supported"
            )
    elif kind == "SparseEncoder":
        files.embeds = False
        if files.problem is not None or files.sparse is None:
            raise FolderError(
                f"{root / 'modules.json'}: expected a sparse encoder of a masked-LM Transformer and a SpladePooling; "
                "others are not supported"
            )
    elif kind in _MULTI_VECTOR:
        files.embeds = False
        if files.problem is not None or files.pooling_file is not None or files.normalize or files.sparse is not None:
            raise FolderError(
                files.problem
                or f"{root / 'modules.json'}: expected a multi-vector encoder of Transformer, Dense, MultiVectorMask "
                "and Normalize of token_embeddings; others are not supported"
            )
    elif kind != "SentenceTransformer":
        files.problem = files.problem or f"{path}: a {kind!s:.40} makes other embeddings than one per text"


def _read_prompts(path: Path, files: SentenceFiles, settings: Mapping[str, Any]) -> None:
    declared = settings.get("prompts") or {}
    if not isinstance(declared, dict) or not all(isinstance(text, str | None) for text in declared.values()):
        raise FolderError(f"{path}: prompts: expected an object of strings, got {declared!r:.80}")
    texts = {name: text or "" for name, text in declared.items()}
    default = settings.get("default_prompt_name")
    known = (None, "query", "document", *texts)  # sentence-transformers knows two names without a text.
    if default not in known:
        raise FolderError(
            f"{path}: default_prompt_name: expected one of the prompts ({', '.join(texts) or 'there are none'}), got "
            f"{default!r:.80}"
        )
    if files.tokens is not None:
        # Both kinds of texts are asked for by name; who names none has documents.
        texts = {"query": "", "document": "", **texts}
        default = default or "document"
    elif default is not None:
        texts.setdefault(default, "")
    if files.tokens is None and not any(texts.values()):
        return
    files.prompts = Prompts(texts, default)
