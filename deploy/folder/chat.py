"""What a chat template puts around a text, for models of sentence-transformers whose texts go through one.

The template is a program of whoever made the model. It is run in jinja2's sandbox with a mark in place of the text:
what stands before the mark is a prompt, and what stands behind it becomes special tokens of the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bundle import Prompts
from deploy.folder.errors import FolderError, first_line
from deploy.folder.library import read_by_library

__all__ = ["Chat", "read_chat", "with_suffix"]

_MARK = "\u2af7text\u2af8"
_PLAIN = "chat template"
"""The name of what goes before a text without a prompt, where there is anything."""


@dataclass(frozen=True)
class Chat:
    """What stands around texts.

    Attributes:
        prompts: What stands before them, by the names of the model's prompts.
        suffix: What stands behind them; the tokenizer adds nothing else.
    """

    prompts: Prompts | None
    suffix: str


def read_chat(
    folder: Path, settings: Mapping[str, Any], prompts: Prompts | None, structured: bool, options: Mapping[str, Any]
) -> Chat:
    """Reads the template and runs it.

    Args:
        folder: Of the tokenizer.
        settings: Content of `tokenizer_config.json`.
        prompts: Of the model: they are messages of the system.
        structured: Whether the content of a message is an array of parts.
        options: Variables of the template, by their names.

    Raises:
        FolderError: There is no template, jinja2 is not installed, or the template fails or changes texts.
    """
    render = _renderer(folder, settings, options)

    def around(prompt: str) -> tuple[str, str]:
        texts = [("system", prompt), ("user", _MARK)] if prompt else [("user", _MARK)]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if structured else text} for role, text in texts
        ]
        parts = render(messages).split(_MARK)
        if len(parts) != 2:
            raise FolderError(f"{folder}: the chat template changes texts or repeats them, which is not supported")
        return parts[0], parts[1]

    named = {} if prompts is None else {name: around(text) for name, text in prompts.texts.items()}
    plain = around("")
    suffixes = {plain[1], *(suffix for _, suffix in named.values())}
    if len(suffixes) > 1:
        raise FolderError(f"{folder}: the chat template puts prompts behind texts, which is not supported")
    texts = {name: before for name, (before, _) in named.items()}
    default = None if prompts is None else prompts.default
    if default is None and plain[0]:
        texts[_PLAIN], default = plain[0], _PLAIN
    return Chat(Prompts(texts, default) if any(texts.values()) else None, plain[1])


def _renderer(folder: Path, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Callable[[Any], str]:
    path = folder / "chat_template.jinja"
    template: Any = settings.get("chat_template")
    if path.is_file():
        template = path.read_text(encoding="utf-8")
    elif isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise FolderError(f"{folder}: texts go through a chat template (modality_config: message), and there is none")
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise FolderError(
            f"{folder}: texts go through a chat template (modality_config: message), which takes jinja2: pip install "
            "jinja2, or export the model where it is"
        ) from error

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    tokens = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }

    def render(messages: Any) -> str:
        try:
            made = environment.from_string(template)
            return made.render(**{"add_generation_prompt": False, **tokens, **options, "messages": messages})
        except Exception as error:  # Of whatever the template does.
            raise FolderError(f"{folder}: the chat template fails: {first_line(error)}") from error

    return render


def with_suffix(text: str, suffix: str, folder: Path) -> str:
    """A tokenizer that puts the tokens of a suffix behind each text, and no special tokens.

    Args:
        text: Content of `tokenizer.json`.
        suffix: What stands behind texts.
        folder: For messages.

    Raises:
        FolderError: The suffix would be read together with the end of a text.
    """
    tokenizer = json.loads(text)
    tokenizer["post_processor"] = None
    if not suffix:
        return json.dumps(tokenizer, ensure_ascii=False)
    if not any(suffix.startswith(token["content"]) for token in tokenizer.get("added_tokens") or ()):
        raise FolderError(
            f"{folder}: the chat template puts {suffix[:40]!r} behind texts, expected that it begins with one of the "
            "tokenizer's special tokens; others are not supported"
        )
    encoding = read_by_library(json.dumps(tokenizer), folder).encode(suffix, add_special_tokens=False)
    end = {"SpecialToken": {"id": "suffix", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB"))
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, second, end],
        "special_tokens": {"suffix": {"id": "suffix", "ids": encoding.ids, "tokens": encoding.tokens}},
    }
    return json.dumps(tokenizer, ensure_ascii=False)
