"""The reference: the model in transformers, fp32.

Folders saved by transformers 5 say some things in another way than transformers 4 reads them:

| file | field | transformers 5 | transformers 4 |
|---|---|---|---|
| `tokenizer_config.json` | `tokenizer_class` | `TokenizersBackend` | `PreTrainedTokenizerFast` |
| `tokenizer_config.json` | `model_input_names` | of most classes without token types | with them |
| `tokenizer_config.json` | `extra_special_tokens` | a list | `additional_special_tokens`, a list |
| `config.json` | `rope_parameters` | bases and scaling of rotary positions | fields of each model's own |

`readable_folder` makes a copy with the old fields; the user's folder is not changed.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from deploy.bundle import CONFIG_FILE, TASKS, TOKENIZER_FILE
from deploy.export.errors import ExportError, first_line, is_disk_full, pickle_refused, refused_pickle
from deploy.folder.json_files import read_json, read_settings
from deploy.folder.sentencepiece import KINDS as UNIGRAM_KINDS
from deploy.folder.source import Source
from deploy.folder.tokenizer import slow_tokenizer, told_token_types
from torch_ext.encoder.huggingface.folder import layers_left_out

__all__ = ["load_model", "older_config", "older_tokenizer_config", "readable_folder"]

_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"


def older_tokenizer_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `tokenizer_config.json` of transformers 5 says, for transformers 4; the same where it says nothing new."""
    result = dict(settings)
    if told_token_types(settings) is False:
        result.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if result.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = result.get("extra_special_tokens")
    if isinstance(extra, list):
        del result["extra_special_tokens"]
        known = result.get("additional_special_tokens") or []
        result["additional_special_tokens"] = [*known, *(token for token in extra if token not in known)]
    return result


def older_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` of transformers 5 says, for transformers 4; the same where it says nothing new."""
    result = dict(settings)
    rope = result.pop("rope_parameters", None)
    if not isinstance(rope, dict):
        return dict(settings)
    names = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    parts = {name: rope[kind] for kind, name in names.items() if isinstance(rope.get(kind), dict)}
    for name, part in (parts or {"rope_theta": rope}).items():
        if "rope_theta" in part:
            result.setdefault(name, part["rope_theta"])
        if part.get("rope_type", "default") != "default":
            result.setdefault("rope_scaling", {key: value for key, value in part.items() if key != "rope_theta"})
    return result


_OLDER = {
    _TOKENIZER_CONFIG: older_tokenizer_config,
    _SPECIAL_TOKENS: older_tokenizer_config,
    CONFIG_FILE: older_config,
}


@contextlib.contextmanager
def readable_folder(source: Source, work: Path) -> Iterator[Path]:
    """The model's folder as the installed transformers reads it.

    Args:
        source: What the folder says.
        work: Path of a folder to make if needed, with links to the model's files; removed at the end.

    Yields:
        The model's folder, or `work`.

    Raises:
        ExportError: A file is damaged.
    """
    import transformers

    changed: dict[str, Mapping[str, Any]] = {}
    if source.tokenizer_settings:
        declared = read_settings(source.folder / _TOKENIZER_CONFIG)
        changed[_TOKENIZER_CONFIG] = {**declared, **source.tokenizer_settings}
    if int(transformers.__version__.partition(".")[0]) < 5:
        for name, older in _OLDER.items():
            if (source.folder / name).is_file():
                given = changed.get(name, read_json(source.folder / name, dict))
                if (new := older(given)) != given:
                    changed[name] = new
    # transformers reads models of sentencepiece by another library.
    if not (source.folder / TOKENIZER_FILE).is_file() and (made := slow_tokenizer(source, UNIGRAM_KINDS)) is not None:
        changed[TOKENIZER_FILE] = made
    if not changed:
        yield source.folder
        return
    work.mkdir()
    try:
        for path in source.folder.iterdir():
            if path.is_file() and path.name not in changed:
                try:
                    (work / path.name).symlink_to(path.absolute())
                except OSError:  # Some file systems have no links.
                    shutil.copyfile(path, work / path.name)
        for name, settings in changed.items():
            (work / name).write_text(json.dumps(settings), encoding="utf-8")
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


_FLOATS = ("F32", "F16", "BF16", "F64")

_NOT_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What transformers raises of configurations that make no sense, and of weights that it cannot find."""

_LAYERS_FIELDS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
"""How `config.json` may call the number of layers."""

_LAYERS = 1000
"""No encoder has more; some share the weights of theirs."""

_LAYER = re.compile(r"^(.*?\b(?:layers?|block|h)\.)(\d+)\.")
"""A weight of a layer: what is before the layer's number, and that."""

_COMPUTED = ".inv_freq"
"""How buffers end that follow from `config.json`: transformers 4 writes those of ESM, transformers 5 none."""

_ENCODERS_OF_TWO = ("t5", "mt5", "umt5")
"""How `model_type` is called where AutoModel has a decoder, too, which does not embed texts."""


def load_model(source: Source, folder: Path, warn: Callable[[str], None]) -> Any:
    """The model in fp32, with every weight that its task needs.

    Args:
        source: What the model's folder says.
        folder: Where the installed transformers reads its files; see `readable_folder`.
        warn: Is told what is left out.

    Raises:
        ExportError: Files are damaged, hold code, or lack weights of the task.
    """
    import torch
    import transformers

    task = TASKS[source.task]
    auto_class = task.auto_class
    if auto_class == "AutoModel" and source.config.get("model_type") in _ENCODERS_OF_TWO:
        auto_class = "AutoModelForTextEncoding"
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()  # Of its own, since 5.
    try:
        _check_weights(source)
        model, info = getattr(transformers, auto_class).from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # Else the error does not name the weight.
            weights_only=True,
        )
    except _NOT_DAMAGE as error:
        if is_disk_full(error):
            raise
        if not source.safe_format and pickle_refused(error):
            raise refused_pickle(source.folder / source.weights) from error
        reason = f"transformers finds nothing under {error}" if isinstance(error, KeyError) else first_line(error)
        raise ExportError(f"{source.folder / source.weights}: cannot be loaded: {reason}") from error
    except Exception as error:
        # Of the kinds of pickle and safetensors, which share no base class.
        if not source.safe_format:
            raise refused_pickle(source.folder / source.weights) from error
        raise ExportError(
            f"{source.folder / source.weights}: damaged: {first_line(error)}; save the model again in safetensors"
        ) from error
    if left_out := _layers_left_out(model.state_dict().keys(), info["unexpected_keys"]):
        warn(left_out)
    absent = {
        name
        for name in info["missing_keys"]
        if not name.endswith(_COMPUTED) and not any(part in f".{name}" for part in task.spare_weights)
    }
    # An index may name a weight that its file lacks: transformers 4 then leaves it without memory.
    missing = sorted({*absent, *(name for name, tensor in model.state_dict().items() if tensor.is_meta)})
    # transformers 4 gives names, 5 names and shapes.
    for name in sorted(item if isinstance(item, str) else item[0] for item in info["mismatched_keys"]):
        shape = list(model.state_dict()[name].shape)
        raise ExportError(
            f"{source.folder / source.weights}: expected {name} {shape}, as config.json has it, got "
            f"{_shape_of(source, name)}"
        )
    if missing:
        names = ", ".join(missing[:3])
        raise ExportError(
            f"{source.folder / source.weights}: no weights for {names}..., which {source.task} needs; "
            "pass another --task, or a model that was trained for it"
        )
    model.eval()
    model.requires_grad_(False)
    # The texts need not come by it, as by the row of a rare token.
    for name, tensor in model.state_dict().items():
        spare = any(part in f".{name}" for part in task.spare_weights)
        if tensor.is_floating_point() and not spare and not bool(torch.isfinite(tensor.sum())):
            if bool(torch.isfinite(tensor).all()):  # Only their sum is too large.
                continue
            raise ExportError(
                f"{source.folder / source.weights}: expected finite weights, got NaN or infinity in {name}"
            )
    return model


def _weight_files(source: Source) -> list[Path]:
    """The files that hold the weights; others may lie beside them."""
    path = source.folder / source.weights
    if not path.name.endswith(".index.json"):
        return [path]
    return [source.folder / name for name in sorted(set(read_json(path, dict)["weight_map"].values()))]


def _check_weights(source: Source) -> None:
    """Checks what transformers does not: it converts whole numbers, and builds as many layers as it is told.

    Raises:
        ValueError: A weight is of a dtype that needs a scale, or `config.json` counts more layers than weights.
    """
    from safetensors import safe_open

    count = 0
    for path in _weight_files(source) if source.safe_format else ():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                count += 1
                kind = file.get_slice(name).get_dtype() if name.endswith((".weight", ".bias")) else _FLOATS[0]
                if kind not in _FLOATS:
                    raise ValueError(f"expected {name} of one of the dtypes {', '.join(_FLOATS)}, got {kind}")
    layers = next((source.config[name] for name in _LAYERS_FIELDS if name in source.config), None)
    if isinstance(layers, int) and layers > max(count, _LAYERS):
        raise ValueError(f"expected weights of {layers} layers, as config.json counts them, got {count} tensors")


def _layers(names: Collection[str]) -> list[tuple[str, int]]:
    """Of each weight of a layer, what its name has before the layer's number, and that."""
    return [(match[1], int(match[2])) for name in names if (match := _LAYER.match(name))]


def _layers_left_out(names: Collection[str], unexpected: Collection[str]) -> str | None:
    """What to say of weights of layers that `config.json` does not count, or None.

    Args:
        names: Of the model's weights.
        unexpected: Of weights in the files that it has not. Those of a part that is not used, such as a decoder, are no
            layers here.
    """
    layers = _layers(names)
    parts = {part for part, _ in layers}
    counted = max((number for _, number in layers), default=-1) + 1
    # Names in files may have the encoder's name in front, or lack it.
    more = (number for own, number in _layers(unexpected) if any(own.endswith(p) or p.endswith(own) for p in parts))
    found = max(more, default=-1) + 1
    if found <= counted:
        return None
    return layers_left_out(counted, found)


def _shape_of(source: Source, name: str) -> str:
    """The shape of a weight in the files, whose name may have the encoder's name in front."""
    from safetensors import safe_open

    for path in _weight_files(source) if source.safe_format else ():
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key == name or key.endswith(f".{name}") or name.endswith(f".{key}"):
                    return str(list(file.get_slice(key).get_shape()))
    return "another shape"
