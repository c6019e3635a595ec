"""Token ids, and rows of numbers, as engines and tasks exchange them: arrays of the standard library.

What engines compute stays in their memory, whoever owns it, and is never copied to be looked at. Nothing here needs
numpy, and `numpy.asarray` takes all of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

__all__ = ["FilledIds", "Ids", "Items", "Mapped", "Rows", "places"]

if TYPE_CHECKING:
    Ids: TypeAlias = array[int]
else:
    Ids = array
"""Token ids or token types of a text: `array("q")`, i64 [tokens]."""


@dataclass(frozen=True)
class FilledIds:
    """Token ids of a text that is filled up with tokens that no token attends to, though they have vectors.

    Attributes:
        ids: Of all tokens.
        attended: How many of them are the text's own, special tokens included; they come first.
    """

    ids: Ids
    attended: int

    def __len__(self) -> int:
        return len(self.ids)


class Rows(Sequence[memoryview]):
    """Rows of numbers: one for each text, or for each of some tokens.

    A row is a `memoryview`: it has a length, slices and `tolist`. Rows hold on to the memory of all of them.

    Attributes:
        width: Numbers in a row.
    """

    __slots__ = ("_matrix", "_numbers", "width")

    def __init__(self, matrix: Any) -> None:
        """Wraps.

        Args:
            matrix: f32 or i64 [rows, width], rows one after the other: anything with the buffer protocol.
        """
        view: Any = memoryview(matrix)
        self._matrix = view
        self.width: int = view.shape[1]
        # A view of several dimensions has no views of its rows, and one without elements cannot be cast.
        self._numbers: memoryview = view.cast("B").cast(view.format) if view.nbytes else memoryview(b"")

    def __len__(self) -> int:
        return len(self._matrix)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"expected rows from 0 to {len(self) - 1}, got {index}")
        return self._numbers[index * self.width : (index + 1) * self.width]

    @property
    def finite(self) -> bytes:
        """For each row 1, or 0 if it holds NaN or infinity. For rows of f32."""
        from torch_ext.runtime import finite_rows

        return finite_rows(self._matrix)

    def tolist(self) -> list[list[Any]]:
        """The rows as lists of Python numbers."""
        rows: list[list[Any]] = self._matrix.tolist()
        return rows


class Items(Sequence[dict[str, Any]]):
    """What was found in a text, as dicts that are made when they are read: `_item` makes one, from its index."""

    __slots__ = ()

    def _item(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def owned(self) -> tuple[Items, int]:
        """The same without memory of a whole batch, and about how many bytes it takes."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._item(place) for place in range(*index.indices(len(self)))]
        return self._item(index)


class Mapped(Sequence[Any]):
    """What a function makes of the items of a sequence, each when it is read."""

    __slots__ = ("_function", "_items")

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self._function = function
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._function(item) for item in self._items[index]]
        return self._function(self._items[index])


def places(ids: Ids, wanted: int) -> list[int]:
    """Where a token id is in a text, in ascending order."""
    found: list[int] = []
    start = 0
    for _ in range(ids.count(wanted)):
        start = ids.index(wanted, start) + 1
        found.append(start - 1)
    return found
