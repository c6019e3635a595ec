"""A tensor that is computed only when its values are needed, and that refuses to be written into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

__all__ = ["ReadOnlyTensor"]


class _Values:
    """The values behind one or several tensors; made when they are first asked for, and kept from then on."""

    def __init__(self, make: Callable[[], Tensor], origin: object = None) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._values: Tensor | None = None
        self.origin = origin

    def get(self) -> Tensor:
        values, make = self._values, self._make
        if values is None:
            # Two threads may both get here: they make equal values, and the later ones stay.
            assert make is not None
            with torch.inference_mode(False), torch.no_grad():
                values = self._values = make()
            self._make = None
        return values


class ReadOnlyTensor(Tensor):
    """Stands for a tensor whose values are made from something else, to which a write could not get back.

    Shape, dtype, device and the like are known without values. Everything that reads values gets them: operations,
    ``numpy()``, ``data_ptr()``, ``torch.save``, safetensors. They are kept while the tensor lives. Results are ordinary
    tensors; views, ``detach()`` and ``.data`` are read-only, too. Copies (``clone()``, ``copy.deepcopy``, a pickle) are
    ordinary tensors of their own.

    What would write into it raises RuntimeError: in-place operations, ``out=``, assignment of other values to elements
    or to ``.data``. An array from ``numpy()`` is read-only, as NumPy has it. ``data_ptr()`` and
    ``untyped_storage()`` are raw memory, for reading only; nothing can guard that.

    An ``nn.Parameter`` made of one, as ``load_state_dict(..., assign=True)`` does, is an ordinary parameter.
    """

    _source: _Values
    _advice: str

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], Tensor] | _Values,
        shape: Sequence[int],
        dtype: torch.dtype,
        advice: str,
        origin: object = None,
        strides: Sequence[int] | None = None,
        storage_offset: int | None = None,
    ) -> ReadOnlyTensor:
        """Describe a tensor.

        Args:
            cls: the class.
            make: called at most once (twice, if two threads meet); returns the values, a CPU tensor.
            shape: that of the values.
            dtype: that of the values.
            advice: the end of the error for writes: why not, and what to do instead.
            origin: what the values are made from, for :meth:`is_from`.
            strides: that of the values; by default, contiguous.
            storage_offset: that of the values; only with strides.
        """
        with torch.inference_mode(False):
            self = Tensor._make_wrapper_subclass(
                cls,
                shape,
                strides=strides,
                storage_offset=storage_offset,
                dtype=dtype,
                device=torch.device("cpu"),
                requires_grad=False,
            )
        self._source = make if isinstance(make, _Values) else _Values(make, origin)
        self._advice = advice
        return self

    # Attributes such as dtype and shape come straight from C++.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        written, is_view = _effects(func)
        for index, name in written:
            target = args[index] if index < len(args) else kwargs.get(name)
            for tensor in _tensors(target):
                if isinstance(tensor, ReadOnlyTensor):
                    tensor._refuse(str(func))
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]._like(args[0]._source, args[0])
        result = func(*_unwrap(args), **_unwrap(kwargs))
        if is_view:
            base = next(tensor for tensor in _tensors(args) if isinstance(tensor, ReadOnlyTensor))
            if isinstance(result, Tensor):
                return base._like(_given(result), result)
            return type(result)(base._like(_given(tensor), tensor) for tensor in result)
        return result

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # How nn.Parameter() marks a tensor of a class that it does not know. This one becomes a parameter of PyTorch's.
        torch.utils.swap_tensors(self, nn.Parameter(self._source.get(), self.requires_grad))  # type: ignore[no-untyped-call]

    def is_from(self, origin: object) -> bool:
        """Whether its values are all those that are made from an object."""
        return origin is not None and self._source.origin is origin

    def _like(self, values: _Values, form: Tensor) -> ReadOnlyTensor:
        """A view of this tensor with other values, of the form (shape, strides, dtype) of a tensor."""
        return ReadOnlyTensor(
            values, form.shape, form.dtype, self._advice, None, form.stride(), int(form.storage_offset())
        )

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(f"{what}: cannot write into a read-only tensor: {self._advice}")

    # What reads memory without an operation.

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array of the values."""
        array = self._source.get().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """The values as nested lists."""
        return self._source.get().tolist()

    def data_ptr(self) -> int:
        """The address of the values, for reading only."""
        return self._source.get().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the values, for reading only."""
        return self._source.get().untyped_storage()

    def storage(self) -> Any:
        """The same, with a dtype."""
        return self._source.get().storage()  # type: ignore[no-untyped-call]

    def _typed_storage(self) -> Any:
        return self._source.get()._typed_storage()  # type: ignore[no-untyped-call]

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError(f"cannot lend the memory of a read-only tensor: {self._advice}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._source.get())

    # Copies are ordinary tensors.

    def __copy__(self) -> Tensor:
        return self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._source.get().clone()
        return cast(Tensor, memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._source.get().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    # What writes without an operation.

    @property
    def data(self) -> Tensor:
        """The tensor itself, read-only."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, ReadOnlyTensor) and value._source is self._source:
            return  # The end of `tensor.data += 1`, where that was allowed.
        # transformers assigns biases that it found to be long enough.
        if not (value.shape == self.shape and value.dtype == self.dtype and torch.equal(value, self)):
            self._refuse("assignment to .data")

    def apply_(self, callable: Any) -> Any:  # noqa: A002
        """Refused: it writes."""
        self._refuse("apply_")

    def map_(self, tensor: Tensor, callable: Any) -> Any:  # noqa: A002
        """Refused: it writes."""
        self._refuse("map_")


def _given(values: Tensor) -> _Values:
    return _Values(lambda: values)


# By operation. A dictionary, since torch.compile warns of functions in functools.cache.
_known_effects: dict[Any, tuple[tuple[tuple[int, str], ...], bool]] = {}


def _effects(func: Any) -> tuple[tuple[tuple[int, str], ...], bool]:
    """Which arguments an operation writes to, by position and name, and whether it returns a view of one."""
    known = _known_effects.get(func)
    if known is None:
        aliases = [(index, argument) for index, argument in enumerate(func._schema.arguments) if argument.alias_info]
        written = tuple((index, argument.name) for index, argument in aliases if argument.alias_info.is_write)
        known = _known_effects[func] = written, bool(aliases) and not written
    return known


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _unwrap(value: Any) -> Any:
    if isinstance(value, ReadOnlyTensor):
        return value._source.get()
    if isinstance(value, (list, tuple)):
        return type(value)(_unwrap(item) for item in value)
    if isinstance(value, dict):
        return {name: _unwrap(item) for name, item in value.items()}
    return value
