"""A linear layer with a packed bf16 or int8 weight, which reads, copies and saves like an ``nn.Linear``."""

from __future__ import annotations

import copy
import copyreg
import functools
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from torch_ext.layer_weights import FLOATS, PackedDtype, as_bias, check_dtype, check_tensors, pack_as, state_of
from torch_ext.ops import check_arguments, layer_weight
from torch_ext.read_only import ReadOnlyTensor

__all__ = ["PackedLinear"]

_linear = torch.ops.torch_ext.linear.default
_pack = torch.ops.torch_ext.pack_linear_weight.default
_unpack = torch.ops.torch_ext.unpack_linear_weight.default

_pack_int8 = torch.ops.torch_ext.pack_linear_weight_int8.default
_unpack_int8 = torch.ops.torch_ext.unpack_linear_weight_int8.default

_WIDENED = (torch.float16, torch.float64)
"""Of inputs, what is converted to fp32."""

_ADVICE = (
    "a torch_ext.PackedLinear computes with a packed copy of its weight and bias, which the write would not reach. "
    "Change the model before torch_ext.optimize() (merge adapters there, too), call the layer's load_state_dict(), or "
    "write into a copy: tensor.clone()"
)


def _unpacked_for(layer: weakref.ref[PackedLinear], *args: Any) -> Tensor:
    """The same, for a layer, which is to hold it no longer than whoever reads it."""
    owner = layer()
    if owner is not None:
        owner._unread = None
    return layer_weight(*args)


_layer_weight = torch.ops.torch_ext._layer_weight.default


class PackedLinear(nn.Module):
    """Stands for an :class:`torch.nn.Linear` in inference: bf16 products or int8 ones, fp32 sums, fp32 bias.

    It has no parameters, except tied ones (see below). The packed weight belongs to this kind of CPU; ``state_dict()``,
    copies and pickles hold unpacked weights. ``state_dict()`` has ``weight`` and ``bias`` under the names and in the
    dtypes of the layer that was replaced, so that an ``nn.Linear`` can load them; the values of ``weight`` are what the
    layer computes with, the bf16 rounding of what it was or, in int8, ``scale * q``. ``load_state_dict()`` packs again,
    into the same ``dtype``: of an fp32 layer exactly what was there; of a bf16 or fp16 layer in int8 with one more
    rounding, since they cannot hold ``scale * q``. Copies and pickles are exact in every case. A process that is
    started by spawn or forkserver gets the packed weights themselves, in shared memory.

    ``weight``, ``bias`` and their values in ``state_dict()`` are read-only: a write into one raises RuntimeError, see
    :class:`torch_ext.read_only.ReadOnlyTensor`. Only what reads their values unpacks the weight.

    Inputs are fp32, bf16, fp16 or fp64, and outputs have their dtype; under ``torch.autocast`` outputs have autocast's,
    as those of an ``nn.Linear``. Products and sums are the same for all: fp16 and fp64 are converted to fp32 before,
    and from fp32 after. ``model.float()``, ``.bfloat16()``, ``.half()`` and ``.double()`` leave the packed weight as it
    is, and change the dtype that ``weight``, ``bias`` and ``state_dict()`` have; moving it off the CPU is an error.

    A weight or bias that is tied to a parameter of another module stays tied: the parameter is also a parameter of
    this layer, and ``state_dict()`` has it, unrounded, so that ``save_pretrained()`` finds it tied. After a write to
    the parameter, the next call packs it again (a call of compiled code does not). A write through ``.data`` or numpy,
    of which PyTorch keeps no record, is noticed only if it changes one of 64 elements, spread over the parameter.

    Args:
        weight: fp32, bf16 or fp16 ``[N, K]`` on the CPU.
        bias: fp32, bf16 or fp16 ``[N]``, or None.
        packed: the weight as it was packed before into ``dtype``, to be shared.
        dtype: ``"bf16"``; or ``"int8"``: weights with one scale for each output, rows of the input quantized by their
            largest magnitude without outliers while they are read.
        tied: by ``"weight"`` and ``"bias"``, the parameter that it is, if other modules have it too.

    Attributes:
        in_features: K.
        out_features: N.
        dtype: ``"bf16"`` or ``"int8"``, of products.

    Raises:
        TypeError: a tensor is neither fp32 nor bf16 nor fp16.
        ValueError: a shape does not fit, a tensor is not on the CPU, ``dtype`` is not known, or a weight for int8 is
            not finite.
    """

    in_features: int
    out_features: int
    dtype: PackedDtype

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        packed: Tensor | None = None,
        dtype: PackedDtype = "bf16",
        tied: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        check_dtype("PackedLinear", dtype)
        check_tensors("PackedLinear", weight, bias)
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                f"PackedLinear: expected weight [N, K] and bias [N], got {list(weight.shape)} and "
                f"{None if bias is None else list(bias.shape)}"
            )
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        # Neither is a parameter or a buffer, so that no cast of the model reaches them.
        self._packed = pack_as(dtype, weight.detach()) if packed is None else packed
        self._bias = None if bias is None else as_bias(bias)
        self._weight_dtype = weight.dtype
        self._bias_dtype = None if bias is None else bias.dtype
        # What `weight` returned, unless its values were read since.
        self._unread: ReadOnlyTensor | None = None
        # Registered without assignment, which goes by the properties of the same names.
        self._parameters.update(tied or {})
        self._tied_states = {name: state_of(parameter) for name, parameter in self._tied.items()}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ForkingPickler.register(cls, _reduce_for_process)

    @classmethod
    def from_linear(cls, module: nn.Linear, dtype: PackedDtype = "bf16") -> PackedLinear:
        """Pack a layer; see :class:`PackedLinear` for errors.

        Args:
            module: the layer; it is left as it is.
            dtype: ``"bf16"`` or ``"int8"``.

        Returns:
            The layer that stands for it.
        """
        return cls(module.weight, module.bias, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The weight ``[N, K]`` that it computes with, in its original dtype, read-only.

        It is unpacked when its values are read, and kept while the returned tensor lives.
        """
        dtype, is_int8 = self._weight_dtype, self._is_int8
        if torch.compiler.is_compiling():
            result: Tensor = _layer_weight(self._packed, self.in_features, dtype, is_int8)
            return result
        self._follow_ties()
        columns = self.in_features
        unread = self._unread
        # torch.utils.swap_tensors() may have made another tensor of it.
        if not isinstance(unread, ReadOnlyTensor) or unread.dtype is not dtype or not unread.is_from(self._packed):
            make = functools.partial(_unpacked_for, weakref.ref(self), self._packed, columns, dtype, is_int8)
            unread = ReadOnlyTensor(make, (self.out_features, columns), dtype, _ADVICE, self._packed)
            self._unread = unread
        return unread

    @property
    def _tied(self) -> dict[str, nn.Parameter]:
        """By ``"weight"`` and ``"bias"``, the parameters of other modules that this one is tied to."""
        return {name: parameter for name, parameter in self._parameters.items() if parameter is not None}

    @property
    def _is_int8(self) -> bool:
        return self.dtype == "int8"

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[N]`` in its original dtype, read-only; the parameter that it is tied to, if it is; or None."""
        if self._bias is None or self._bias_dtype is None:
            return None
        if torch.compiler.is_compiling():
            return self._bias.to(self._bias_dtype)
        if "bias" in self._parameters:
            return self._parameters["bias"]
        make = functools.partial(self._bias.to, self._bias_dtype, copy=True)
        return ReadOnlyTensor(make, (self.out_features,), self._bias_dtype, _ADVICE, self._bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            # What is there already may be assigned: transformers ties weights again, peft sets a layer's own weight.
            if value is self._tied.get(name, self) or self._is_own(name, value):
                return
            raise RuntimeError(
                f"PackedLinear: {name} cannot be assigned, since it is packed: change the model before "
                "torch_ext.optimize(), or use load_state_dict()"
            )
        super().__setattr__(name, value)

    def _is_own(self, name: str, value: object) -> bool:
        """Whether a value is what ``weight`` or ``bias`` returned, and would return again."""
        return isinstance(value, ReadOnlyTensor) and value.is_from(self._packed if name == "weight" else self._bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``.

        Args:
            x: fp32, bf16, fp16 or fp64 ``[..., K]``; fp16 and fp64 are converted to fp32.

        Returns:
            ``[..., N]`` in the dtype of ``x``; under autocast in that of autocast, unless ``x`` is fp64.

        Raises:
            RuntimeError: ``x`` requires grad while gradients are enabled, its shape or dtype does not fit, or it is
                sparse or nested.
            TypeError: ``x`` is no tensor.
        """
        given: Any = x
        if not isinstance(given, Tensor) and isinstance(given, fx.Proxy):
            # An nn.Linear is one node of what torch.fx traces, and so is what stands for it.
            tracer: Any = given.tracer
            return cast(Tensor, tracer.create_proxy("call_module", tracer.path_of_module(self), (given,), {}))
        check_arguments("PackedLinear", x)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "PackedLinear: the input requires grad, but torch_ext.optimize() makes a model for inference only: "
                "call the model under torch.inference_mode() or torch.no_grad(), or train the original model"
            )
        if not torch.compiler.is_compiling() and self._parameters:
            self._follow_ties()
        dtype = out_dtype = x.dtype
        if torch.is_autocast_enabled("cpu") and dtype is not torch.float64:
            out_dtype = torch.get_autocast_dtype("cpu")
        if dtype not in FLOATS:
            if dtype not in _WIDENED:
                raise RuntimeError(f"PackedLinear: expected x of fp32, bf16, fp16 or fp64, got {dtype}")
            x = x.float()
        if out_dtype in FLOATS:
            result: Tensor = _linear(x, self._packed, self._bias, "none", out_dtype)
            return result
        wide: Tensor = _linear(x, self._packed, self._bias, "none", torch.float32)
        return wide.to(out_dtype)

    def _follow_ties(self) -> None:
        """Pack anew what is tied to a parameter that was written to since."""
        for name, parameter in self._tied.items():
            state = state_of(parameter)
            if state == self._tied_states.get(name):
                continue
            if name == "weight":
                self._packed = pack_as(self.dtype, parameter.detach())
                # Whoever resizes an embedding assigns another size to `.data`.
                self.out_features, self.in_features = parameter.shape
            else:
                self._bias = as_bias(parameter)
            self._tied_states[name] = state

    def extra_repr(self) -> str:
        """What print() shows in the parentheses."""
        has_bias = self._bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # Called by to(), float(), cuda() and their like with what they do to a tensor.
        weight = fn(torch.empty(0, dtype=self._weight_dtype, device="cpu"))
        if weight.device.type != "cpu":
            raise RuntimeError(
                f"PackedLinear: cannot move to {weight.device}: packed weights are for the CPU. Move the original "
                "model, before torch_ext.optimize()"
            )
        if weight.is_floating_point():
            self._weight_dtype = weight.dtype
            if self._bias_dtype is not None:
                self._bias_dtype = fn(torch.empty(0, dtype=self._bias_dtype, device="cpu")).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in ("weight",) if self._bias is None else ("weight", "bias"):
            tied = self._tied.get(name)
            if tied is None:
                destination[prefix + name] = getattr(self, name)
            else:
                destination[prefix + name] = tied if keep_vars else tied.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = ("weight",) if self._bias is None else ("weight", "bias")
        found: dict[str, Tensor] = {}
        for name in names:
            key = prefix + name
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
                continue
            shape = [self.out_features, self.in_features][: 2 if name == "weight" else 1]
            tensor = state_dict[key]
            if not isinstance(tensor, Tensor):
                error_msgs.append(f"{key}: expected a tensor, got {type(tensor).__name__}")
            elif list(tensor.shape) != shape:
                error_msgs.append(f"size mismatch for {key}: expected {shape}, got {list(tensor.shape)}")
            elif not tensor.is_floating_point() or tensor.device.type != "cpu":
                error_msgs.append(
                    f"{key}: expected a floating-point tensor on the CPU, got {tensor.dtype}, {tensor.device}"
                )
            else:
                found[name] = tensor.detach()
        for name, tensor in found.items():
            tied = self._tied.get(name)
            if tied is not None and local_metadata.get("assign_to_params_buffers", False):
                # The parameters of the other modules are replaced: like an nn.Linear, it is tied to none of them now.
                del self._parameters[name]
            elif tied is not None:
                # As with layers that share a parameter: the last one that is loaded counts.
                with torch.no_grad():
                    tensor = tied.copy_(tensor).detach()
                self._tied_states[name] = state_of(tied)
            if name == "bias":
                self._bias = as_bias(tensor)
                continue
            try:
                self._packed = pack_as(self.dtype, tensor)
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}")
        if strict:
            known = {prefix + name for name in names}
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)

    def __getstate__(self) -> dict[str, Any]:
        state = self._state()
        state["_packed"] = _unpack_int8(self._packed) if self._is_int8 else _unpack(self._packed)
        return state

    def _state(self) -> dict[str, Any]:
        """The attributes that copies have, too: not what belongs to these objects, at these addresses."""
        self._follow_ties()
        return {name: value for name, value in self.__dict__.items() if name not in ("_tied_states", "_unread")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed = state["_packed"]
        if isinstance(packed, tuple):  # int8: the weight and its scales.
            packed = _pack_int8(*packed)
        elif packed.dtype != torch.uint8:  # Else it comes from another process on this machine.
            packed = _pack(packed)
        super().__setstate__({"dtype": "bf16", **state, "_packed": packed})  # type: ignore[no-untyped-call]
        self._tied_states = {name: state_of(parameter) for name, parameter in self._tied.items()}
        self._unread = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        # Nothing writes into a packed weight (load_state_dict puts a new one in its place): a copy may share it.
        for name, value in self._state().items():
            result.__dict__[name] = value if name == "_packed" else copy.deepcopy(value, memo)
        result._unread = None
        result._tied_states = {name: state_of(parameter) for name, parameter in result._tied.items()}
        return result


def _reduce_for_process(layer: PackedLinear) -> tuple[Any, ...]:
    """How a layer is sent to another process on this machine: packed, as it is, in shared memory.

    The tensors in what spawn and forkserver send must live until the process has started, since the new process gets
    their file descriptors; those that ``__getstate__`` unpacks would not.
    """
    return copyreg.__newobj__, (type(layer),), layer._state()  # type: ignore[attr-defined]


ForkingPickler.register(PackedLinear, _reduce_for_process)
