"""Faster ``F.linear`` and ``torch.matmul`` of bf16 CPU tensors for models that nobody touched.

How calls are caught. While at least one :class:`Acceleration` is enabled, kernels of this module are registered with
PyTorch's dispatcher, for the CPU alone. That reaches every thread, ``nn.Linear`` and PyTorch's own modules in C++, and
costs nothing anywhere else. A ``TorchFunctionMode`` would hold for one thread, see calls from Python only and slow down
all other functions; functions put in the place of ``F.linear`` would be another object than the one that tensor
subclasses and captured references know. What is not accelerated runs the kernel that was there before:
``linear`` and ``matmul`` are compositions, which are asked for by name, and ``mm``, ``bmm`` and ``addmm`` have the same
kernel behind their ``out=`` forms. Both let go of Python's lock while they compute.

PyTorch's dispatcher may not be changed while another thread reads it. So the kernels are unregistered only where no
other thread of Python's is alive; else they stay, and pass every call on to PyTorch until they are needed again.
Unregistering leaves the dispatcher's tables as they were. ``torch.compile``, ``torch.export`` and ``make_fx`` trace
what they trace without it, since their tensors are not plain ones; code that was compiled calls no kernel of this
module.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

from torch_ext.ops import isa_report

__all__ = ["Acceleration", "accelerate"]

_linear = torch.ops.torch_ext.linear.default
_pack = torch.ops.torch_ext.pack_linear_weight.default
_fingerprint = torch.ops.torch_ext._weight_fingerprint.default
_matmul = torch.ops.torch_ext.matmul.default
_bmm = torch.ops.torch_ext.bmm.default
_addmm = torch.ops.torch_ext.addmm.default

_aten = torch.ops.aten

_PLAIN = (Tensor, torch.nn.Parameter)


def _plain_keys() -> int:
    """The bits that dispatch keys of plain CPU tensors have; modes, tracers and transforms have others."""
    keys = (DispatchKey.CPU, DispatchKey.AutogradCPU, DispatchKey.ADInplaceOrView)
    bits = 0
    for key in keys:
        bits |= DispatchKeySet(key).raw_repr()
    return bits


_OTHER_KEYS = ~_plain_keys()


def _routable(keys: DispatchKeySet, *tensors: Tensor | None) -> bool:
    """Whether a call is ours: plain bf16 tensors on the CPU, no gradients, no transform, no autocast.

    Args:
        keys: what the dispatcher called the kernel with.
        tensors: the operands.

    Returns:
        False wherever PyTorch does more than compute, or might.
    """
    if keys.raw_repr() & _OTHER_KEYS:
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.dtype is not torch.bfloat16 or not tensor.is_cpu:
            return False
        if grad and tensor.requires_grad:
            return False
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return False
    if torch._C._current_graph_task_id() != -1:  # in backward()
        return False
    # Autocast hides itself from the kernels that it calls, but not how deep it is nested.
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting() == 0


def _compose(op: torch._ops.OpOverload[..., Any], *args: Tensor | None) -> Tensor:
    """What PyTorch makes of ``linear`` and ``matmul``, in C++, or in Python while it traces with symbolic shapes."""
    if torch._C._dispatch_tls_is_dispatch_key_included(DispatchKey.PythonDispatcher):
        return cast(Tensor, op.decompose(*args))
    return cast(Tensor, op._op_dk(DispatchKey.CompositeImplicitAutograd, *args))


class _Packed(NamedTuple):
    """A packed weight, and what tells that it is still that of the tensor."""

    weight: weakref.ref[Tensor]
    state: tuple[object, ...]
    packed: Tensor


def _state(weight: Tensor) -> tuple[object, ...]:
    """What changes when a weight does: its version, memory and layout, and some of its elements.

    The version knows of writes to the tensor and its views. The elements are for those through ``weight.data`` and
    through numpy, which have no version.
    """
    return (weight._version, weight.data_ptr(), weight.shape, weight.stride(), _fingerprint(weight))


class _Routes:
    """The kernels that are registered, and the weights that they packed.

    Attributes:
        active: whether they take calls; else PyTorch gets them all.
    """

    def __init__(self) -> None:
        self.active = True
        self._packed: dict[int, _Packed] = {}
        self._library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        kernels: list[tuple[str, Any, tuple[str, ...]]] = [("linear", self.linear, ("CPU", "AutogradCPU"))]
        if isa_report()["linear"] == "torch_ext":
            # Elsewhere a product that is not packed beforehand is PyTorch's own anyway.
            kernels += [
                ("matmul", self.matmul, ("CPU", "AutogradCPU")),
                ("mm", self.mm, ("CPU",)),
                ("bmm", self.bmm, ("CPU",)),
                ("addmm", self.addmm, ("CPU",)),
            ]
        with warnings.catch_warnings():
            # PyTorch warns of a second kernel for the same key; it is the purpose here, and undone.
            warnings.simplefilter("ignore")
            for name, kernel, keys in kernels:
                for key in keys:
                    self._library.impl(name, kernel, key, with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]

    def pause(self) -> None:
        """Let go of the packed weights, and leave all calls to PyTorch."""
        self.active = False
        self._packed.clear()

    def remove(self) -> None:
        """Unregister the kernels, and let go of the packed weights."""
        self.pause()
        self._library._destroy()

    def _takes(self, keys: DispatchKeySet, *tensors: Tensor | None) -> bool:
        return self.active and _routable(keys, *tensors)

    def packed(self, weight: Tensor) -> Tensor:
        """The packed form of a weight, made if there is none or the weight has changed."""
        key = id(weight)
        state = _state(weight)
        entry = self._packed.get(key)
        if entry is not None and entry.weight() is weight and entry.state == state:
            return entry.packed
        with torch.inference_mode(False), torch.no_grad():
            packed = cast(Tensor, _pack(weight.detach()))
        # The callback runs wherever the weight dies, at worst in the middle of this function: so no lock is taken.
        entries = self._packed

        def forget(dead: weakref.ref[Tensor]) -> None:
            entry = entries.get(key)
            if entry is not None and entry.weight is dead:
                del entries[key]

        if self.active:
            entries[key] = _Packed(weakref.ref(weight, forget), state, packed)
        return packed

    def linear(self, keys: DispatchKeySet, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``aten::linear``."""
        if (
            self._takes(keys, x, weight, bias)
            and x.dim() >= 1
            and weight.dim() == 2
            and x.shape[-1] == weight.shape[1]
            and weight.numel() > 0
            and (bias is None or bias.shape == weight.shape[:1])
            # A view is made anew for each call, so it would be packed for each call. A tensor made in inference mode
            # has no version.
            and (type(weight) is torch.nn.Parameter or not weight._is_view())
            and not weight.is_inference()
        ):
            return cast(Tensor, _linear(x, self.packed(weight), bias))
        return _compose(_aten.linear.default, x, weight, bias)

    def matmul(self, keys: DispatchKeySet, a: Tensor, b: Tensor) -> Tensor:
        """``aten::matmul``, that is ``torch.matmul`` and ``@``."""
        if self._takes(keys, a, b) and a.dim() >= 1 and b.dim() >= 1:
            inner = b.shape[-2] if b.dim() > 1 else b.shape[0]
            if a.shape[-1] == inner and _broadcasts(a.shape[:-2], b.shape[:-2]):
                return cast(Tensor, _matmul(a, b))
        return _compose(_aten.matmul.default, a, b)

    def mm(self, keys: DispatchKeySet, a: Tensor, b: Tensor) -> Tensor:
        """``aten::mm``."""
        if self._takes(keys, a, b) and a.dim() == 2 and b.dim() == 2 and a.shape[1] == b.shape[0]:
            return cast(Tensor, _matmul(a, b))
        return cast(Tensor, _aten.mm.out(a, b, out=a.new_empty(0)))

    def bmm(self, keys: DispatchKeySet, a: Tensor, b: Tensor) -> Tensor:
        """``aten::bmm``."""
        if (
            self._takes(keys, a, b)
            and a.dim() == 3
            and b.dim() == 3
            and a.shape[0] == b.shape[0]
            and a.shape[2] == b.shape[1]
        ):
            return cast(Tensor, _bmm(a, b))
        return cast(Tensor, _aten.bmm.out(a, b, out=a.new_empty(0)))

    def addmm(
        self, keys: DispatchKeySet, bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> Tensor:
        """``aten::addmm``."""
        if (
            self._takes(keys, bias, a, b)
            and a.dim() == 2
            and b.dim() == 2
            and a.shape[1] == b.shape[0]
            and bias.dim() <= 2
            and all(
                have in (1, want) for have, want in zip(reversed(bias.shape), (b.shape[1], a.shape[0]), strict=False)
            )
            and not isinstance(beta, complex)
            and not isinstance(alpha, complex)
        ):
            return cast(Tensor, _addmm(bias, a, b, float(beta), float(alpha)))
        return cast(Tensor, _aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=bias.new_empty(0)))


def _broadcasts(a: torch.Size, b: torch.Size) -> bool:
    return all(left == right or 1 in (left, right) for left, right in zip(reversed(a), reversed(b), strict=False))


_lock = threading.Lock()
_enabled: set[Acceleration] = set()
_routes: _Routes | None = None


class Acceleration:
    """What :func:`accelerate` returns: enabled from the start, until :meth:`disable` or the end of a ``with`` block.

    Several may be enabled at a time, in any threads and any order; routing ends with the last one.

    The first one of a process registers kernels with PyTorch, which no other thread may be calling at that moment:
    enable one before threads begin to compute. Where other threads are alive when the last one ends, the kernels stay
    registered, and pass on what they get: PyTorch computes, a few microseconds of Python a call later.
    """

    def __init__(self) -> None:
        global _routes
        with _lock:
            if _routes is None:
                _routes = _Routes()
            _routes.active = True
            _enabled.add(self)

    @property
    def enabled(self) -> bool:
        """Whether this one still asks for routing."""
        return self in _enabled

    def disable(self) -> None:
        """Take back what the call of :func:`accelerate` did. A second call does nothing."""
        global _routes
        with _lock:
            _enabled.discard(self)
            if _enabled or _routes is None:
                return
            if threading.active_count() == 1:
                _routes.remove()
                _routes = None
            else:
                _routes.pause()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.disable()

    def __repr__(self) -> str:
        return f"<torch_ext.accelerate(): {'enabled' if self.enabled else 'disabled'}>"


def accelerate() -> Acceleration:
    """Run ``F.linear`` and products of bf16 CPU tensors on the kernels of torch_ext, in all threads, from now on.

    ``F.linear`` (so ``nn.Linear``) runs on :func:`torch_ext.linear` everywhere. ``torch.matmul``, ``@``, ``torch.mm``,
    ``torch.bmm`` and ``torch.addmm`` run on theirs where torch_ext has kernels of its own: on aarch64, and on x86-64
    with AVX2 or more (``isa_report()["linear"] == "torch_ext"``).

    Everything else goes to PyTorch as before: other dtypes, devices and layouts, tensor subclasses, operands that
    require grad while gradients are enabled, ``backward()``, autocast, ``torch.func`` and forward derivatives (though
    the plain products inside of those may be ours), ``torch.compile`` and other tracers. Every call of these functions
    on CPU tensors passes through Python once more.

    Products pack what they multiply at each call and keep nothing. A weight of ``F.linear`` is packed once, since
    packing costs as much as multiplying a few rows, and kept while the tensor lives, unless its version, memory,
    layout, or one of 64 sampled elements has changed. So the memory is at most one packed copy of each weight in use:
    as large as the weight, rounded up to whole panels, or twice as large with ``TORCH_EXT_ISA=torch``. It is freed with
    the weight, and with the last :meth:`Acceleration.disable`. A write that goes past the tensor's version, through
    ``weight.data`` or numpy, and hits none of the sampled elements is not noticed: disable and enable after it. Weights
    that are views or were made in inference mode are not kept: they are multiplied by ``addmm``, or else by PyTorch.

    :func:`torch_ext.optimize` does more, since it knows the layers and fuses what follows them; this is for models that
    cannot be changed.

    Returns:
        An object that is enabled already. As a context manager it ends with the block; otherwise call
        :meth:`Acceleration.disable`, or leave it on for the rest of the process.

    Raises:
        RuntimeError: ``TORCH_EXT_ISA`` names something unknown, or something that this CPU cannot run.

    Example:
        >>> with torch_ext.accelerate(), torch.inference_mode():
        ...     model(**batch)
        >>> handle = torch_ext.accelerate()
        >>> handle.disable()
    """
    return Acceleration()
