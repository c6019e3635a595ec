"""`POST /` for fill-mask: as a pipeline of transformers has it; answers are made while they are encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct

from ...bundle import Manifest
from ...tasks.rows import Items, Mapped, places
from ..http.bodies import VALUE_CHARS
from ..limits.bounds import MAX_TOP_K
from .route import encode_rows
from .schemas import MaskedInputs, bound, texts_of

if TYPE_CHECKING:
    from ..service import TextTokenizer
    from ..service.request import Result

__all__ = ["FILLINGS", "FillMaskParameters", "RootFillMaskRequest", "encode_fillings", "filling_values"]

_PREDICTION_VALUES = 4


class FillMaskParameters(Struct):
    """How a pipeline answers."""

    top_k: Annotated[int, Meta(ge=1, le=MAX_TOP_K)] | None = None
    targets: Annotated[list[str] | None, bound("nothing")] = None


class RootFillMaskRequest(Struct):
    """Texts with at least one mask token each."""

    inputs: MaskedInputs
    parameters: FillMaskParameters | None = None


class MaskFilling(Struct):
    """A token that may stand at the mask, and the text with it."""

    score: float
    token: int
    token_str: str
    sequence: str


FILLINGS = list[MaskFilling | list[MaskFilling | list[MaskFilling]]]


class _Filling(Items):
    """The best tokens of one mask, each with the text in which it stands there.

    The text is long, and there is one for each token: they are made when they are read.
    """

    __slots__ = ("_decode", "_ids", "_place", "_tokens")

    def __init__(
        self, ids: Sequence[int], place: int, tokens: Sequence[Any], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._ids = ids
        self._place = place
        self._tokens = tokens
        self._decode = decode

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self[index : index + 1][0]
        before, after = self._ids[: self._place], self._ids[self._place + 1 :]
        return [
            {
                "score": item["score"],
                "token": item["token_id"],
                "token_str": item["token"],
                "sequence": self._decode([*before, item["token_id"], *after]),
            }
            for item in self._tokens[index]
        ]

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])


def _values(top_k: int, longest: int) -> int:
    return top_k * (_PREDICTION_VALUES + longest // VALUE_CHARS)


def filling_values(manifest: Manifest, request: Any) -> int:
    """Numbers in the answer to each mask, those that the texts in it count as included."""
    top_k = (request.parameters and request.parameters.top_k) or 5
    return _values(top_k, max(map(len, texts_of(request.inputs)), default=0))


def encode_fillings(texts: Sequence[str], result: Result, tokenizer: TextTokenizer, mask: int, single: bool) -> Any:
    """The answer.

    A text is what its tokens read as, as a pipeline makes it: of one with a single mask without special tokens.

    Args:
        texts: Of the request.
        result: Per text, per mask its best tokens.
        tokenizer: Of the model.
        mask: Id of the mask token.
        single: Answer the first text alone, without a list around it.
    """
    found = result.values

    def fillings(index: int) -> Any:
        ids = result.ids[index]
        decode = partial(tokenizer.decode, skip_special_tokens=len(found[index]) == 1, clean=True)
        masks = zip(places(ids, mask), found[index], strict=True)
        rows = [_Filling(ids, place, tokens, decode) for place, tokens in masks]
        return rows[0] if len(rows) == 1 else rows

    each = _values(max((len(tokens) for tokens in found[0]), default=0), max(map(len, texts)))
    if not single:
        return encode_rows(Mapped(fillings, range(len(texts))), each * max(map(len, found)))
    rows = fillings(0)
    return encode_rows(rows, _values(1, len(texts[0])) if isinstance(rows, _Filling) else each)
