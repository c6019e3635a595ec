"""A model's folder as the manifest of a bundle, in memory: what the server needs to run it as it is."""

from __future__ import annotations

from deploy.bundle import CONFIG_FILE, TASKS, VARIANTS, Dense, Manifest, ModelInfo, Variant
from deploy.folder.errors import FolderError, at_least_one
from deploy.folder.hub import find_model
from deploy.folder.json_files import read_json
from deploy.folder.source import Source, read_source
from deploy.folder.token_vectors import read_token_vectors
from deploy.folder.tokenizer import read_tokenizer
from deploy.tasks import TaskError

__all__ = ["describe_folder"]

_VARIANTS = ("torch_ext-bf16", "torch_ext-fp32")
"""Those that need no measurement and no other library; the first is served if none is named."""

_SMALL_BYTES = 20 << 20
"""Models whose weights have less than this are served in fp32: there are no figures that say how close bf16 would be.

Four layers of 128 take 0.44 ms in fp32 and 0.26 ms in bf16 for a text of 50 tokens (AMD Zen 5, 2 threads), and HTTP as
much again.
"""

_MOST_STAGES = 2
"""Linear stages that the head of an encoder holds."""

_HIDDEN_SIZE = ("hidden_size", "dim", "n_embd", "d_model")


def describe_folder(model: str, task: str | None) -> Manifest:
    """The manifest of a model that nobody exported.

    Args:
        model: Path of a folder, or id on the hub.
        task: Overrides the task that the folder names.

    Returns:
        A manifest whose root is the folder. It lists no files, and its variants have no accuracy: nobody measured it.

    Raises:
        FolderError: There is no such model, its folder is damaged, or it cannot be served as it is.
    """
    import torch_ext
    from torch_ext.encoder import ARCHITECTURES

    root, name, revision = find_model(model)
    source = read_source(root, name, revision, task, model_types=ARCHITECTURES)
    if not source.safe_format:
        raise FolderError(
            f"{source.folder / source.weights}: a pickle, which can run code, and is not opened; save the model again "
            "with model.save_pretrained(folder, safe_serialization=True), or python -m deploy export it"
        )
    tokenizer = read_tokenizer(source)
    if TASKS[source.task].needs.mask_token and tokenizer.special["mask"] is None:
        raise FolderError(f"{source.folder}: the tokenizer has no mask token, and the task is {source.task}")
    try:
        fields = TASKS[source.task].read(source)
    except TaskError as error:
        raise FolderError(f"{source.folder / CONFIG_FILE}: {error}") from error
    vocabulary = source.config.get("vocab_size")
    names = _VARIANTS if source.weights_bytes >= _SMALL_BYTES else _VARIANTS[::-1]
    return Manifest(
        root=source.folder,
        model=ModelInfo(name, revision, source.architecture),
        created_with={"torch_ext": torch_ext.__version__},
        task=source.task,
        hidden_size=_hidden_size(source),
        max_tokens=tokenizer.max_tokens,
        truncation_side=tokenizer.truncation_side,
        token_types=tokenizer.token_types,
        cleans_up=tokenizer.cleans_up,
        pooling=source.pooling,
        sparse=source.sparse,
        token_vectors=read_token_vectors(source, tokenizer.ids.get, tokenizer.special),
        prompts=source.prompts,
        special_tokens=tokenizer.special,
        vocab_size=vocabulary if isinstance(vocabulary, int) else None,
        tokenizer_json=tokenizer.text,
        dense=_dense(source),
        files={},
        variants={name: _variant(name, source) for name in names},
        **{"labels": None, "problem_type": None, **fields},
    )


def _dense(source: Source) -> tuple[Dense, ...]:
    if len(source.dense) > _MOST_STAGES:
        raise FolderError(
            f"{source.folder}: {len(source.dense)} linear stages behind the pooling (Dense) are not served from a "
            f"folder, {_MOST_STAGES} at most; python -m deploy export it"
        )
    stages = []
    for module in source.dense:
        path = module.folder / CONFIG_FILE
        outputs = at_least_one(read_json(path, dict).get("out_features"), f"{path}: out_features")
        stages.append(Dense(outputs, module.activation, str(module.folder)))
    return tuple(stages)


def _variant(name: str, source: Source) -> Variant:
    kind = VARIANTS[name]
    # The folder itself: the engine reads it.
    return Variant(name, ".", kind.engine, kind.dtype, source.weights_bytes, accuracy=None)


def _hidden_size(source: Source) -> int:
    size = next((source.config[name] for name in _HIDDEN_SIZE if name in source.config), None)
    return at_least_one(size, f"{source.folder / CONFIG_FILE}: hidden_size")
