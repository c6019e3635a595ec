"""What `sentence_bert_config.json` says of the Transformer module of sentence-transformers.

| setting | what becomes of it |
|---|---|
| `max_seq_length`, `do_lower_case` | taken |
| `tokenizer_args`, since 6 `processor_kwargs` | taken as settings of the tokenizer |
| `config_args`, since 6 `config_kwargs` | refused, unless `config.json` says the same |
| `model_args`, since 6 `model_kwargs` | how weights are loaded: nothing here |
| `processing_kwargs` | lengths and what the chat template is given are taken, others that change tokens refused |
| `modality_config`, `module_output_name` | refused, unless the module gives what its task usually gives |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.folder.errors import FolderError, count_or_none
from deploy.folder.json_files import read_json

__all__ = ["TransformerSettings", "check_config_options", "read_transformer_settings"]

_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""The first one that says something counts, as in sentence-transformers."""

_LOADING = frozenset((
    "attn_implementation",
    "cache_dir",
    "code_revision",
    "dtype",
    "force_download",
    "local_files_only",
    "output_attentions",
    "output_hidden_states",
    "proxies",
    "resume_download",
    "return_dict",
    "revision",
    "token",
    "torch_dtype",
    "trust_remote_code",
    "use_auth_token",
    "use_cache",
    "use_fast",
))  # fmt: skip
"""Options of transformers that change how files are found and computed with, not what is answered."""

_ELSEWHERE = ("gguf_file", "subfolder", "tokenizer_file", "tokenizer_type", "vocab_file")
"""Options by which a tokenizer is not that of the folder."""

_OUTPUTS: Mapping[object, tuple[str, str]] = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "fill-mask": ("logits", "token_embeddings"),
    "sequence-classification": ("logits", "scores"),
}
"""By `transformer_task`: what the module takes of the model's output, and what it calls that."""

_PROCESSING: Mapping[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "truncation": (True, "longest_first"),
    "return_tensors": ("pt",),
}
"""Options of a tokenizer's call, with their values that change no tokens."""

_PADDING = ("logits_to_keep", "max_length", "pad_to_multiple_of", "padding", "padding_side")
"""Options that are taken, or that are about padding, which is left out."""

_OF_TEMPLATES = (
    "add_special_tokens",
    "chat_template",
    "continue_final_message",
    "documents",
    "max_length",
    "padding",
    "restore_suffix",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tools",
    "truncation",
)
"""Options of `apply_chat_template` that are no variables of the template alone."""


@dataclass(frozen=True)
class TransformerSettings:
    """What the file says.

    Attributes:
        content: All of it.
        where: The file; None: there is none.
        max_tokens: Longest input, or None.
        lowercase: Whether texts are lower-cased before the tokenizer.
        tokenizer: Settings that go over those of `tokenizer_config.json`.
        config: Values that would go over those of `config.json`; see `check_config_options`.
        chat: How messages of the tokenizer's chat template look that texts go through, or None.
        chat_options: What the template is given besides.
    """

    content: Mapping[str, Any] = field(default_factory=dict)
    where: Path | None = None
    max_tokens: int | None = None
    lowercase: bool = False
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    chat: str | None = None
    chat_options: Mapping[str, Any] = field(default_factory=dict)


def read_transformer_settings(folders: tuple[Path, ...]) -> TransformerSettings:
    """Reads the settings of the Transformer module.

    Args:
        folders: Where the file may be, best first.

    Raises:
        FolderError: The file is damaged, or asks for what is not supported.
    """
    paths = (folder / name for folder in dict.fromkeys(folders) for name in _FILES)
    found = ((path, read_json(path, dict)) for path in paths if path.is_file())
    first = next((item for item in found if item[1]), None)
    if first is None:
        return TransformerSettings()
    where, content = first
    tokenizer = _options(content, where, "tokenizer_args", "processor_kwargs")
    for name in _ELSEWHERE:
        if name in tokenizer:
            raise FolderError(f"{where}: tokenizer_args: {name} is not supported; put the tokenizer into the folder")
    _check_output(content, where)
    processing = _options(content, where, "processing_kwargs")
    calls = {**_part(processing, where, "common"), **_part(processing, where, "text")}
    for name, value in calls.items():
        if name not in _PADDING and value not in _PROCESSING.get(name, ()):
            raise FolderError(f"{where}: processing_kwargs: {name}={value!r:.80} is not supported")
    kinds = content.get("modality_config")
    message = kinds.get("message") if isinstance(kinds, dict) else None
    chat = None
    if isinstance(kinds, dict) and "message" in kinds:
        chat = str(message.get("format")) if isinstance(message, dict) else "flat"
    templates = _part(processing, where, "chat_template") if chat is not None else {}
    for name in _OF_TEMPLATES:
        if name in templates:
            raise FolderError(f"{where}: processing_kwargs: chat_template: {name} is not supported")
    # The last one that is said counts.
    limits = (content.get("max_seq_length"), tokenizer.get("model_max_length"), calls.get("max_length"))
    return TransformerSettings(
        content=content,
        where=where,
        max_tokens=next((limit for limit in map(count_or_none, reversed(limits)) if limit is not None), None),
        lowercase=content.get("do_lower_case") is True,
        tokenizer=tokenizer,
        config=_options(content, where, "config_args", "config_kwargs"),
        chat=chat,
        chat_options=templates,
    )


def check_config_options(settings: TransformerSettings, config: Mapping[str, Any]) -> None:
    """Checks that the options of a module's configuration change nothing.

    Args:
        settings: What the file says.
        config: Content of the model's `config.json`.

    Raises:
        FolderError: One does: the model would be another one than its `config.json` says.
    """
    for name, value in settings.config.items():
        if name not in config or config[name] != value:
            raise FolderError(
                f"{settings.where}: config_args: {name}={value!r:.80} goes over config.json, which is not supported; "
                "write it there"
            )


def _options(content: Mapping[str, Any], where: Path, *names: str) -> dict[str, Any]:
    """The options of a setting that has several names, without those that change no answers."""
    merged: dict[str, Any] = {}
    for name in names:
        merged |= _part(content, where, name)
    return {name: value for name, value in merged.items() if name not in _LOADING}


def _part(content: Mapping[str, Any], where: Path, name: str) -> Mapping[str, Any]:
    given = content.get(name)
    if given is not None and not isinstance(given, dict):
        raise FolderError(f"{where}: {name}: expected an object, got {given!r:.80}")
    return given or {}


def _check_output(content: Mapping[str, Any], where: Path) -> None:
    """Checks that the module gives what its task usually gives: hidden states of the last layer, or logits."""
    kinds = content.get("modality_config")
    if kinds is None:
        return
    task = content.get("transformer_task") or "feature-extraction"
    usual = _OUTPUTS.get(task) if isinstance(task, str) else None
    if usual is None:
        raise FolderError(
            f"{where}: transformer_task: expected one of {', '.join(map(str, _OUTPUTS))}, got {task!r:.80}"
        )
    name = content.get("module_output_name", usual[1])
    for kind in ("text", "message"):
        entry = _part(_part(content, where, "modality_config"), where, kind)
        output = entry.get("method_output_name", usual[0])
        taken = output[0] if isinstance(output, list) and len(output) == 1 else output
        if (entry.get("method", "forward"), taken, name) != ("forward", *usual):
            raise FolderError(
                f"{where}: expected {kind}s to give {usual[1]} of {usual[0]}, got {name!r:.40} of {output!r:.80}, "
                "which is not supported"
            )
