"""Token ids of texts, and where each token is in its text: for answers that point into it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers.pre_tokenizers import Metaspace

from ...engines.batch import PairIds
from ...tasks import Ids
from ...tasks.answers import Window
from ...tasks.entities import TokenText
from ..errors import ApiError
from ..limits.bounds import exceeded
from .tokens import SLICE_TEXTS, TextTokenizer, check_length

if TYPE_CHECKING:
    from tokenizers import Encoding

__all__ = ["Asked", "Located", "LocatingTokenizer"]

_SPACE = "\u2581"
"""What Metaspace makes of a space."""


@dataclass(frozen=True, slots=True)
class Located:
    """Token ids of a text, and what is known of each token.

    Attributes:
        text: The text.
        ids: Token ids, special ones included.
        starts: Where each token begins in the text, in code points, i32 [tokens].
        ends: Where it ends.
        special: 1 for each token that stands around the text, u8 [tokens].
    """

    text: str
    ids: Ids
    starts: array[int]
    ends: array[int]
    special: bytes

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a text, as the model reads it: in windows that overlap, if the text is long.

    Attributes:
        text: The text.
        windows: Its parts.
        ids: Token ids of each window, the question included.
    """

    text: str
    windows: list[Window]
    ids: list[PairIds]

    def __len__(self) -> int:
        """Tokens of all windows."""
        return sum(map(len, self.ids))


class LocatingTokenizer:
    """The tokenizer of a bundle, keeping the places of tokens.

    Attributes:
        backend: The library's tokenizer, which neither cuts nor pads.
    """

    def __init__(self, tokenizer: TextTokenizer, unk_id: int | None) -> None:
        """Prepares.

        Args:
            tokenizer: The bundle's.
            unk_id: Of the token for what the vocabulary lacks; None: it has none.
        """
        self._tokenizer = tokenizer
        self.backend = tokenizer.backend
        self._unk_id = unk_id
        # Only a tokenizer of words marks the pieces that continue one.
        self._marks_pieces = bool(getattr(self.backend.model, "continuing_subword_prefix", None))
        self._spaces_within = isinstance(self.backend.pre_tokenizer, Metaspace)

    def encode(self, texts: Sequence[str], truncate: bool, first: int = 0) -> list[Located]:
        """Token ids and places of texts; see `TextTokenizer.encode`."""
        limit, head, tail = self._tokenizer.max_tokens, len(self._tokenizer.prefix), len(self._tokenizer.suffix)
        result = []
        for index, (text, encoding) in enumerate(zip(texts, self.encodings(texts), strict=True), first):
            count = len(encoding.ids)
            check_length(index, count, None if truncate else limit)
            kept = range(count)
            if count > limit and self._tokenizer.cuts_left:
                kept = [*range(head), *range(count - (limit - head), count)]  # type: ignore[assignment]
            elif count > limit:
                kept = [*range(limit - tail), *range(count - tail, count)]  # type: ignore[assignment]
            ids, offsets, special = encoding.ids, encoding.offsets, encoding.special_tokens_mask
            result.append(
                Located(
                    text,
                    array("q", [ids[place] for place in kept]),
                    array("i", [offsets[place][0] for place in kept]),
                    array("i", [offsets[place][1] for place in kept]),
                    bytes(special[place] for place in kept),
                )
            )
        return result

    def encode_questions(
        self,
        inputs: Sequence[tuple[str, str]],
        truncate: bool,
        first: int = 0,
        *,
        max_seq_len: int,
        doc_stride: int,
        null_id: int | None,
        most_tokens: int,
    ) -> list[Asked]:
        """Token ids of questions and texts, in windows of at most `max_seq_len` tokens.

        Args:
            inputs: Question and text.
            truncate: Not looked at: nothing is cut.
            first: Index of the first of them in its request, for messages.
            max_seq_len: Most tokens of a window, the question included.
            doc_stride: Tokens that windows have in common.
            null_id: Of the token that stands for no answer where it comes first; None: there is none.
            most_tokens: Most tokens in all windows of a text.

        Raises:
            ApiError: A question is so long that no room is left for the text, one of both is empty, or there are too
                many tokens in all windows.
        """
        result = []
        for index, ((question, text), encoding) in enumerate(zip(inputs, self.encodings(inputs), strict=True), first):
            if not question or not text:
                raise ApiError("invalid_request", f"input {index}: expected a question and a context, got an empty one")
            sides = encoding.sequence_ids
            begin = sides.index(1) if 1 in sides else len(sides)
            count = sides.count(1)
            others = len(sides) - count
            room = max_seq_len - others
            if room < 1 or (count > room and room <= doc_stride):
                raise ApiError(
                    "invalid_request",
                    f"input {index}: expected a question of at most {max_seq_len - doc_stride - 1} tokens with special "
                    f"tokens, so that more than doc_stride={doc_stride} of max_seq_len={max_seq_len} are left for the "
                    f"context, got {others}; send a shorter question",
                )
            # All windows but the last are full; what two have in common is read twice.
            step = room - doc_stride
            windows = 1 + max(0, -(-(count - room) // step) if step > 0 else 0)
            tokens = count + others + (windows - 1) * (others + doc_stride)
            if tokens > most_tokens:
                raise ApiError(
                    "too_large",
                    f"{exceeded('tokens', most_tokens, tokens, f'input {index}: ')}; its context is read in {windows} "
                    f"windows, which have doc_stride={doc_stride} tokens in common: send a shorter one, or a lower "
                    "doc_stride",
                )
            firsts = [begin + window * step for window in range(windows)]
            parts = [range(first, min(first + room, begin + count)) for first in firsts]
            result.append(self._asked(text, encoding, range(begin, begin + count), parts, null_id))
        return result

    def _asked(self, text: str, encoding: Encoding, whole: range, parts: Sequence[range], null_id: int | None) -> Asked:
        """The windows of a text: each has all tokens but the text's, and some of these.

        Args:
            text: The text.
            encoding: Of question and text.
            whole: Places of the text's tokens.
            parts: Places of those of each window.
            null_id: See `encode_questions`.
        """
        begin, stop = whole.start, whole.stop
        ids = array("q", encoding.ids)
        types = array("q", encoding.type_ids if self._tokenizer.token_types else bytes(8 * len(ids)))
        starts, ends = (array("i", [offset[side] for offset in encoding.offsets]) for side in (0, 1))
        words = array("i", [-1 if word is None else word for word in encoding.word_ids])
        null = null_id is not None and ids[0] == null_id
        asked = Asked(text, [], [])
        for part in parts:
            kept = slice(part.start, part.stop)
            asked.ids.append(PairIds(*(row[:begin] + row[kept] + row[stop:] for row in (ids, types))))
            asked.windows.append(Window(begin, starts[kept], ends[kept], words[kept], null))
        return asked

    def encodings(self, inputs: Sequence[str] | Sequence[tuple[str, str]]) -> Iterator[Encoding]:
        """Encodings with places, a few at a time: they take far more memory than what is kept of them."""
        for start in range(0, len(inputs), SLICE_TEXTS):
            yield from self.backend.encode_batch(list(inputs[start : start + SLICE_TEXTS]))

    def tokens(self, located: Located) -> list[TokenText]:
        """The tokens of a text but special ones, as the pipelines of transformers 5 see them.

        Tokenizers of XLM-R and CamemBERT that transformers 4 saved make a space a part of the token behind it
        (Metaspace), and transformers 4 counts it to the token's place: `text[start:end]` begins with it. transformers 5
        builds a tokenizer of its own for these, which splits texts at spaces first: the same ids, and places without
        the space, as clients expect them. So the folder's tokenizer makes the ids, and the space is taken off here. A
        tokenizer that has more steps than Metaspace (DeBERTa v3) has the space in its places in transformers 5, too.
        """
        text, found = located.text, []
        for index, token_id in enumerate(located.ids):
            if located.special[index]:
                continue
            start, end = located.starts[index], located.ends[index]
            word = self.backend.id_to_token(token_id) or ""
            if self._spaces_within and (word.startswith(_SPACE) or token_id == self._unk_id):
                start, end = _behind_space(text, start, end)
            if token_id == self._unk_id:
                found.append(TokenText(index, text[start:end], start, end, False))
                continue
            if self._marks_pieces:
                continues = len(word) != end - start
            else:
                continues = start > 0 and " " not in text[start - 1 : start + 1]
            found.append(TokenText(index, word, start, end, continues))
        return found

    def join(self, words: list[str]) -> str:
        """The text of how tokens read."""
        decoder = self.backend.decoder
        return " ".join(words) if decoder is None else str(decoder.decode(words))


def _behind_space(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's place without the space before it; of a token that is nothing else, the letter behind it."""
    first = start
    while first < end and text[first].isspace():
        first += 1
    if first == end < len(text) and start < end:
        return end, end + 1
    return (first, end) if first < end else (start, end)
