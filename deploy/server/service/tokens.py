"""Texts to token ids, with the `tokenizers` library only.

`encode_batch_fast` is used even for one text: it keeps no character offsets (58 us for a text of 56 tokens, `encode`
72 us, Xeon with AMX) and it releases the GIL, so that the engine thread goes on meanwhile.
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# One thread per call: the threads of the machine belong to the engine, and the pool of the library would be started for
# every batch. Read when the library first encodes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Encoding, Tokenizer

from ...bundle import TOKENIZER_FILE, Prompts
from ...engines.batch import Ids, Item, PairIds
from ..errors import ApiError

if TYPE_CHECKING:
    from ...bundle import Manifest

__all__ = ["SLICE_TEXTS", "TextTokenizer", "check_length", "count_tokens"]

SLICE_TEXTS = 16
"""Texts whose encodings are in memory at a time; what is kept of one takes far less."""


_CLEANED = (
    *((f" {mark}", mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)
"""What `clean_up_tokenization` of transformers replaces, in its order."""


class TextTokenizer:
    """The tokenizer of a bundle, with the model's limit.

    Attributes:
        max_tokens: Longest input in tokens, special tokens included.
        vocab_size: Number of token ids; valid ids are below it.
        prefix: Special tokens put before a text.
        suffix: Special tokens put after it.
        prompts: What the model was trained to see before its inputs.
        token_types: Whether the model is given the token types of pairs.
        cleans_up: Whether `decode` may leave out spaces before marks.
        read_chars: How much of a long text is read at first; see `_enough`.
    """

    def __init__(
        self,
        source: Path | str,
        max_tokens: int,
        truncation_side: str = "right",
        prompts: Prompts | None = None,
        token_types: bool = True,
        cleans_up: bool = False,
    ) -> None:
        """Reads a tokenizer.

        Args:
            source: A `tokenizer.json`: its path, or its content as a string.
            max_tokens: Longest input in tokens, special tokens included.
            truncation_side: From which side longer texts are cut, `right` or `left`.
            prompts: What the model was trained to see before its inputs; None: nothing.
            token_types: Whether the model is given the token types of pairs.
            cleans_up: Whether `decode` may leave out spaces before marks.

        Raises:
            ValueError: `max_tokens` leaves no room beside the special tokens.
            Exception: It is not one of the library's files; the library raises nothing more special.
        """
        self._tokenizer = Tokenizer.from_str(source) if isinstance(source, str) else Tokenizer.from_file(str(source))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.max_tokens = max_tokens
        self.token_types = token_types
        self.cleans_up = cleans_up
        self.read_chars = 32_768
        self._cut_left = truncation_side == "left"
        self._pair_tokenizers: dict[bool, Tokenizer] = {}
        self._prompt_tokens: dict[str, int] = {}
        self.prompts = Prompts({}) if prompts is None else prompts
        self.vocab_size = count_tokens(self._tokenizer)
        # What stands around a text is read off an example, so that cutting needs no second pass over the text.
        whole = self._tokenizer.encode("a")
        mask = whole.special_tokens_mask
        first = mask.index(0) if 0 in mask else len(mask)
        last = len(mask) - mask[::-1].index(0) if 0 in mask else first
        self.prefix: list[int] = whole.ids[:first]
        self.suffix: list[int] = whole.ids[last:]
        special = len(self.prefix) + len(self.suffix)
        if special >= max_tokens:
            raise ValueError(f"max_tokens: expected more than the {special} special tokens, got {max_tokens}")

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> TextTokenizer:
        """The tokenizer of a bundle.

        Raises:
            ValueError: `tokenizer.json` is not one of the library's files, or does not fit the limit.
        """
        try:
            return cls(
                manifest.tokenizer_path if manifest.tokenizer_json is None else manifest.tokenizer_json,
                manifest.max_tokens,
                manifest.truncation_side,
                manifest.prompts,
                manifest.token_types,
                manifest.cleans_up,
            )
        except Exception as error:  # The library raises plain Exception.
            raise ValueError(f"{manifest.root / TOKENIZER_FILE}: not a usable tokenizer: {error}") from error

    def encode(
        self,
        texts: Sequence[str],
        truncate: bool,
        first: int = 0,
        prompt: str | None = None,
        cut_left: bool | None = None,
        limit: int | None = None,
    ) -> list[Ids]:
        """Token ids of texts, special tokens and the prompt included.

        Args:
            texts: At least one; no lone surrogates.
            truncate: Cut to `max_tokens`; otherwise a longer text is an error.
            first: Index of the first of them in its request, for messages.
            prompt: What to put before each text; None: the model's default prompt.
            cut_left: Cut off the beginning, or the end; None: on the side that the model cuts.
            limit: Instead of `max_tokens`, if it is less.

        Returns:
            Per text its ids, 1 <= tokens <= `max_tokens`.

        Raises:
            ApiError: A text is too long and `truncate` is false, or has no tokens at all (a tokenizer without special
                tokens and an empty text).
        """
        limit = self.max_tokens if limit is None else min(limit, self.max_tokens)
        if prompt is None:
            prompt = self.prompts.default_text
        if prompt:
            texts = [prompt + text for text in texts]
        cut_left = self._cut_left if cut_left is None else cut_left
        texts = [text if len(text) <= self.read_chars else self._enough(text, cut_left) for text in texts]
        result = []
        for index, encoding in enumerate(_encodings(self._tokenizer, texts), first):
            ids = encoding.ids
            check_length(index, len(ids), None if truncate else limit)
            if len(ids) > limit:
                head, tail = len(self.prefix), len(self.suffix)
                if cut_left:
                    ids = self.prefix + ids[len(ids) - (limit - head) :]
                else:
                    ids = ids[: limit - tail] + self.suffix
            result.append(array("q", ids))
        return result

    def check_ids(self, index: int, ids: Sequence[int]) -> Ids:
        """Token ids that a client sent, with special tokens added where they do not start with the first one.

        A prompt is text and is not added: who sends ids has made them of all that the model shall read.

        Raises:
            ApiError: No ids, an id outside of the vocabulary, or more than `max_tokens`.
        """
        if not ids:
            raise ApiError("invalid_request", f"input {index}: expected at least one token id, got an empty list")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            wrong = next(value for value in ids if not 0 <= value < self.vocab_size)
            raise ApiError(
                "invalid_request", f"input {index}: expected token ids from 0 to {self.vocab_size - 1}, got {wrong}"
            )
        whole = list(ids)
        if self.prefix and whole[: len(self.prefix)] != self.prefix:
            whole = [*self.prefix, *whole, *self.suffix]
        if len(whole) > self.max_tokens:
            raise ApiError(
                "invalid_request",
                f"input {index}: expected at most {self.max_tokens} tokens with special tokens, got {len(whole)}",
            )
        return array("q", whole)

    def _enough(self, text: str, cut_left: bool) -> str:
        """As much of a long text as makes more tokens than the model takes; all of it if it makes fewer.

        A part ends at a space: the tokens of a word that was cut would be others.
        """
        size = self.read_chars
        while size < len(text):
            if cut_left:
                part = text[-size:]
                part = part[max(part.find(" "), 0) :]
            else:
                part = text[:size]
                part = part[: part.rfind(" ")] if " " in part else part
            if len(self._tokenizer.encode_batch_fast([part])[0].ids) > self.max_tokens:
                return part
            size *= 2
        return text

    def _pair_tokenizer(self, cut_left: bool) -> Tokenizer:
        """One that cuts pairs, the longer text first, as transformers does. It is another one: `encode` cuts itself."""
        if cut_left not in self._pair_tokenizers:
            tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
            tokenizer.enable_truncation(self.max_tokens, direction="left" if cut_left else "right")
            self._pair_tokenizers[cut_left] = tokenizer
        return self._pair_tokenizers[cut_left]

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], truncate: bool, first: int = 0, cut_left: bool | None = None
    ) -> list[PairIds]:
        """Token ids of pairs of texts; the model's default prompt goes before the first of each.

        Args:
            pairs: At least one; no lone surrogates.
            truncate: Cut to `max_tokens`, the longer text first; otherwise a longer pair is an error.
            first: Index of the first of them in its request, for messages.
            cut_left: Cut off the beginnings, or the ends; None: on the side that the model cuts.

        Raises:
            ApiError: A pair is too long and `truncate` is false, or has no tokens at all.
        """
        cut_left = self._cut_left if cut_left is None else cut_left
        tokenizer = self._pair_tokenizer(cut_left) if truncate else self._tokenizer
        if prompt := self.prompts.default_text:
            pairs = [(prompt + one, two) for one, two in pairs]
        if any(len(text) > self.read_chars for pair in pairs for text in pair):
            pairs = [(self._enough(one, cut_left), self._enough(two, cut_left)) for one, two in pairs]
        result = []
        for index, encoding in enumerate(_encodings(tokenizer, pairs), first):
            if len(encoding.ids) > self.max_tokens:
                raise ApiError(
                    "invalid_request",
                    f"input {index}: expected at most {self.max_tokens} tokens in a pair, got {len(encoding.ids)}; "
                    "send shorter texts, or truncate: true",
                )
            if not encoding.ids:
                raise ApiError("invalid_request", f"input {index}: expected a pair with at least one token, got none")
            types = encoding.type_ids if self.token_types else [0] * len(encoding.ids)
            result.append(PairIds(array("q", encoding.ids), array("q", types)))
        return result

    def encode_mixed(
        self, inputs: Sequence[str | tuple[str, str]], truncate: bool, first: int = 0, cut_left: bool | None = None
    ) -> list[Item]:
        """Token ids of texts and pairs of texts in any order; see `encode` and `encode_pairs`."""
        result: list[Item] = []
        for single, run in itertools.groupby(inputs, key=lambda given: isinstance(given, str)):
            encode: Callable[..., list[Any]] = self.encode if single else self.encode_pairs
            result += encode(list(run), truncate, first + len(result), cut_left=cut_left)
        return result

    @property
    def backend(self) -> Tokenizer:
        """The library's tokenizer, which neither cuts nor pads."""
        return self._tokenizer

    @property
    def cuts_left(self) -> bool:
        """Whether longer texts lose their beginning."""
        return self._cut_left

    def prompt(self, name: str) -> str:
        """A prompt by its name.

        Raises:
            ApiError: The model has no such prompt.
        """
        if name not in self.prompts.texts:
            known = ", ".join(self.prompts.texts)
            raise ApiError(
                "invalid_request",
                f"prompt_name: expected {f'one of {known}' if known else 'none, this model has no prompts'}, got "
                f"{name[:80]!r}",
            )
        return self.prompts.texts[name]

    def prompt_tokens(self, name: str | None) -> int:
        """How many tokens of a text are those of its prompt and the special tokens in front of it.

        As sentence-transformers counts: tokens of the prompt alone, even if its last one would merge with the text's.

        Args:
            name: Of the prompt; None: the model's default prompt.

        Raises:
            ApiError: The model has no such prompt.
        """
        text = self.prompts.default_text if name is None else self.prompt(name)
        if text not in self._prompt_tokens:
            ids = self._tokenizer.encode(text).ids[: self.max_tokens] if text else []
            added = self._tokenizer.get_added_tokens_decoder()
            ends = bool(ids) and ids[-1] in added and added[ids[-1]].special
            self._prompt_tokens[text] = len(ids) - ends
        return self._prompt_tokens[text]

    def describe(self, text: str, special: bool, prompt: str | None = None) -> list[dict[str, Any]]:
        """The tokens of a text, uncut: id, text, whether it is a special one, and where it is in the text.

        Args:
            text: A text without lone surrogates.
            special: Add the special tokens that stand around a text.
            prompt: What to put before it; None: the model's default prompt.
        """
        whole = (self.prompts.default_text if prompt is None else prompt) + text
        encoding = self._tokenizer.encode(whole, add_special_tokens=special)
        rows = zip(encoding.ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True)
        return [
            {
                "id": token_id,
                "text": token if added else whole[start:stop],
                "special": bool(added),
                "start": None if added else start,
                "stop": None if added else stop,
            }
            for token_id, token, (start, stop), added in rows
        ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool, clean: bool = False) -> str:
        """The text of token ids.

        Args:
            ids: The ids.
            skip_special_tokens: Leave out special tokens.
            clean: Leave out spaces before marks, if transformers does so for this tokenizer.

        Raises:
            ApiError: An id outside of the vocabulary.
        """
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(value for value in ids if not 0 <= value < self.vocab_size)
            raise ApiError("invalid_request", f"ids: expected token ids from 0 to {self.vocab_size - 1}, got {wrong}")
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
        if clean and self.cleans_up:
            for spaced, plain in _CLEANED:
                text = text.replace(spaced, plain)
        return text

    def token(self, token_id: int) -> str:
        """How a token id reads."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))


def check_length(index: int, tokens: int, most: int | None) -> None:
    """Refuses a text without tokens, or with too many.

    Args:
        index: Of the text in its request, for messages.
        tokens: How many it has, special tokens included.
        most: How many it may have; None: a longer one is cut.

    Raises:
        ApiError: It has none, or more.
    """
    if not tokens:
        raise ApiError("invalid_request", f"input {index}: expected a text with at least one token, got none")
    if most is not None and tokens > most:
        raise ApiError(
            "invalid_request",
            f"input {index}: expected at most {most} tokens, got {tokens}; send a shorter text, or truncate: true",
        )


def count_tokens(tokenizer: Tokenizer) -> int:
    """How many tokens there are, added ones included: the library counts them by copying all, which takes 10 ms."""
    known = tokenizer.model
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return int(tokenizer.get_vocab_size(with_added_tokens=False)) + sum(
        known.token_to_id(text) is None for text in added
    )


def _encodings(tokenizer: Tokenizer, inputs: Sequence[str] | Sequence[tuple[str, str]]) -> Iterator[Encoding]:
    """Encodings of inputs, a few at a time: that of a long text takes far more memory than the ids that are kept."""
    for start in range(0, len(inputs), SLICE_TEXTS):
        yield from tokenizer.encode_batch_fast(list(inputs[start : start + SLICE_TEXTS]))
