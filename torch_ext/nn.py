"""A linear layer with a packed bf16 or int8 weight, and :func:`optimize`, which puts it into a model that exists."""

from __future__ import annotations

import copy
import copyreg
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from torch_ext.ops import layer_weight, refuse_derivatives
from torch_ext.patterns import as_patterns, matches
from torch_ext.quantize import check_inputs, quantize_weight
from torch_ext.read_only import ReadOnlyTensor
from torch_ext.sensitivity import Report, Sample, Similarity, choose_layers, output_rows, similarity

__all__ = ["PackedLinear", "Skip", "optimize"]

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]

_linear = torch.ops.torch_ext.linear.default
_pack = torch.ops.torch_ext.pack_linear_weight.default
_unpack = torch.ops.torch_ext.unpack_linear_weight.default

_pack_int8 = torch.ops.torch_ext.pack_linear_weight_int8.default
_unpack_int8 = torch.ops.torch_ext.unpack_linear_weight_int8.default

_fingerprint = torch.ops.torch_ext._weight_fingerprint.default

# What the op takes, and what a layer can be made of.
_FLOATS = (torch.float32, torch.bfloat16)
_WEIGHT_DTYPES = (*_FLOATS, torch.float16)

PackedDtype = Literal["bf16", "int8"]
_DTYPES: tuple[str, ...] = ("bf16", "int8")

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
    the parameter, the next call packs it again (a call of compiled code does not).

    Args:
        weight: fp32, bf16 or fp16 ``[N, K]`` on the CPU.
        bias: fp32, bf16 or fp16 ``[N]``, or None.
        packed: the weight as it was packed before into ``dtype``, to be shared.
        dtype: ``"bf16"``; or ``"int8"``: weights with one scale for each output, rows of the input quantized by their
            largest magnitude while they are read.
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
        _check_dtype("PackedLinear", dtype)
        _check_tensors("PackedLinear", weight, bias)
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                f"PackedLinear: expected weight [N, K] and bias [N], got {list(weight.shape)} and "
                f"{None if bias is None else list(bias.shape)}"
            )
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        # Neither is a parameter or a buffer, so that no cast of the model reaches them.
        self._packed = _pack_as(dtype, weight.detach()) if packed is None else packed
        self._bias = None if bias is None else _as_bias(bias)
        self._weight_dtype = weight.dtype
        self._bias_dtype = None if bias is None else bias.dtype
        # What `weight` returned, unless its values were read since.
        self._unread: ReadOnlyTensor | None = None
        # Registered without assignment, which goes by the properties of the same names.
        self._parameters.update(tied or {})
        self._tied_states = {name: _state(parameter) for name, parameter in self._tied.items()}

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
        columns, dtype, is_int8 = self.in_features, self._weight_dtype, self._is_int8
        if torch.compiler.is_compiling():
            result: Tensor = _layer_weight(self._packed, columns, dtype, is_int8)
            return result
        self._follow_ties()
        unread = self._unread
        if unread is None or unread.dtype is not dtype or not unread.is_from(self._packed):
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
            RuntimeError: ``x`` requires grad while gradients are enabled, or its shape or dtype does not fit.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "PackedLinear: the input requires grad, but torch_ext.optimize() makes a model for inference only: "
                "call the model under torch.inference_mode() or torch.no_grad(), or train the original model"
            )
        refuse_derivatives("PackedLinear", x)
        if not torch.compiler.is_compiling() and self._parameters:
            self._follow_ties()
        dtype = out_dtype = x.dtype
        if torch.is_autocast_enabled("cpu") and dtype is not torch.float64:
            out_dtype = torch.get_autocast_dtype("cpu")
        if dtype not in _FLOATS and x.is_floating_point():
            x = x.float()
        if out_dtype in _FLOATS:
            result: Tensor = _linear(x, self._packed, self._bias, "none", out_dtype)
            return result
        if not x.is_floating_point():
            raise RuntimeError(f"PackedLinear: expected x of fp32, bf16, fp16 or fp64, got {dtype}")
        wide: Tensor = _linear(x, self._packed, self._bias, "none", torch.float32)
        return wide.to(out_dtype)

    def _follow_ties(self) -> None:
        """Pack anew what is tied to a parameter that was written to since."""
        for name, parameter in self._tied.items():
            state = _state(parameter)
            if state == self._tied_states.get(name):
                continue
            if name == "weight":
                self._packed = _pack_as(self.dtype, parameter.detach())
            else:
                self._bias = _as_bias(parameter)
            self._tied_states[name] = state

    def extra_repr(self) -> str:
        """What print() shows in the parentheses."""
        has_bias = self._bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # Called by to(), float(), cuda() and their like with what they do to a tensor.
        weight = fn(torch.empty(0, dtype=self._weight_dtype))
        if weight.device.type != "cpu":
            raise RuntimeError(
                f"PackedLinear: cannot move to {weight.device}: packed weights are for the CPU. Move the original "
                "model, before torch_ext.optimize()"
            )
        if weight.is_floating_point():
            self._weight_dtype = weight.dtype
            if self._bias_dtype is not None:
                self._bias_dtype = fn(torch.empty(0, dtype=self._bias_dtype)).dtype
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
            if list(tensor.shape) != shape:
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
                self._tied_states[name] = _state(tied)
            if name == "bias":
                self._bias = _as_bias(tensor)
                continue
            try:
                self._packed = _pack_as(self.dtype, tensor)
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
        self._tied_states = {name: _state(parameter) for name, parameter in self._tied.items()}
        self._unread = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        # Nothing writes into a packed weight (load_state_dict puts a new one in its place): a copy may share it.
        for name, value in self._state().items():
            result.__dict__[name] = value if name == "_packed" else copy.deepcopy(value, memo)
        result._unread = None
        result._tied_states = {name: _state(parameter) for name, parameter in result._tied.items()}
        return result


def _reduce_for_process(layer: PackedLinear) -> tuple[Any, ...]:
    """How a layer is sent to another process on this machine: packed, as it is, in shared memory.

    The tensors in what spawn and forkserver send must live until the process has started, since the new process gets
    their file descriptors; those that ``__getstate__`` unpacks would not.
    """
    return copyreg.__newobj__, (type(layer),), layer._state()  # type: ignore[attr-defined]


ForkingPickler.register(PackedLinear, _reduce_for_process)


def _check_dtype(what: str, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"{what}: unknown dtype {dtype!r}; known: {', '.join(map(repr, _DTYPES))}")


def _pack_as(dtype: PackedDtype, weight: Tensor) -> Tensor:
    """Pack ``[N, K]`` of any floating-point dtype."""
    weight = weight if weight.dtype in _FLOATS else weight.float()
    packed: Tensor = _pack_int8(*quantize_weight(weight)) if dtype == "int8" else _pack(weight.contiguous())
    return packed


def _as_bias(bias: Tensor) -> Tensor:
    """An fp32 copy."""
    return bias.detach().to(torch.float32, copy=True).contiguous()


def _state(parameter: Tensor) -> tuple[object, ...]:
    """What changes when a parameter is written to: its memory, version, and some of its elements.

    The elements are for writes through ``parameter.data``, which have no version.
    """
    version = 0 if parameter.is_inference() else parameter._version
    bits = 0
    if parameter.is_contiguous() and parameter.numel() and parameter.element_size() > 1:
        bits = _fingerprint(parameter.detach().view(parameter.shape[0], -1).view(torch.bfloat16))
    return parameter.data_ptr(), version, parameter.dtype, bits


def _check_tensors(what: str, *tensors: Tensor | None) -> None:
    """Raise unless all are fp32, bf16 or fp16 on the CPU."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{what}: expected tensors on the CPU, got {tensor.device}: "
                + ("load the weights first" if tensor.device.type == "meta" else "call model.cpu() first")
            )
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise TypeError(f"{what}: expected fp32, bf16 or fp16, got {tensor.dtype}: call model.float() first")


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it does what nn.Linear does: no subclass, no parametrization, no forward of its own; and is not empty."""
    # accelerate leaves nn.Linear's own behind when it takes its hooks off.
    own = module.__dict__.get("forward")
    return (
        type(module) is nn.Linear
        and set(module._parameters) == {"weight", "bias"}
        and (own is None or getattr(own, "__func__", None) is nn.Linear.forward)
        and module.weight.numel() > 0
    )


def _matcher(skip: Skip) -> tuple[Callable[[str, nn.Module], bool], Callable[[], list[str]]]:
    """The test that ``skip`` stands for, and a function that lists the patterns that matched nothing so far."""
    if callable(skip):
        return skip, list
    patterns = as_patterns(skip)
    unused = set(patterns)

    def test(name: str, module: nn.Module) -> bool:
        hits = matches(name, patterns)
        unused.difference_update(hits)
        return bool(hits)

    return test, lambda: [pattern for pattern in patterns if pattern in unused]


def optimize(
    model: nn.Module,
    dtype: PackedDtype = "bf16",
    skip: Skip = (),
    *,
    keep_bf16: Skip = (),
    accuracy: float | None = None,
    sample: Sequence[Sample] | None = None,
    report: Callable[[Report], object] | None = None,
) -> nn.Module:
    """Swap every ``nn.Linear`` of a model for a :class:`PackedLinear`, in place.

    The model is for inference afterwards: it is put into eval mode, ``requires_grad`` is off in all of it, and inputs
    that require grad are refused. A second call with the same dtype finds nothing to do; one that asks for another
    dtype of layers that are packed already is refused, since their original weights are gone. Only plain ``nn.Linear``
    is swapped: subclasses, such as the output projection of ``nn.MultiheadAttention``, and parametrized layers stay as
    they are. A layer that is used in several places stays one layer. A weight that is tied to an embedding is packed
    for the linear layer, while the embedding keeps its own, unrounded; what is saved is that one,
    tied as before.

    int8 is coarser here than in an :class:`torch_ext.Encoder`, which balances the channels that layers read: the norms
    of a model feed residuals, too, and stay as they are. The shortest texts show it: single words of all-MiniLM-L6-v2
    have a cosine of at least 0.979 to fp32, in an Encoder 0.992, and 0.993 if the layers that read a norm stay in bf16
    (``keep_bf16=["*.attention.self.*", "*.intermediate.dense"]``).

    Inputs and outputs may be fp32, bf16, fp16 or fp64, also after ``model.half()`` and its like and under
    ``torch.autocast``. Weights of the linear layers cannot be written to: see :class:`PackedLinear`.

    With ``accuracy``, layers that int8 would do too much damage to are found and stay in bf16: the sample is run
    through the model as it is, and then, if int8 in all layers misses the accuracy, once for each layer; see
    :func:`torch_ext.sensitivity.choose_layers`. That takes memory for a second and a third copy of the weights.

    Args:
        model: the model, its parameters fp32, bf16 or fp16 on the CPU. If it is itself an ``nn.Linear``, it cannot be
            swapped in place: use what is returned.
        dtype: what products are computed in: ``"bf16"`` or ``"int8"``.
        skip: layers to leave alone: a name or ``fnmatch`` pattern, several of them, or a function of name and layer. A
            pattern that matches a module's name leaves out all layers in that module.
        keep_bf16: with ``"int8"``, layers to pack in bf16 instead; like ``skip``.
        accuracy: with ``"int8"``, the mean cosine between outputs before and after that must be reached.
        sample: inputs to measure ``accuracy`` on, each what the model takes: a dictionary of keyword arguments, a
            tensor, a tuple of positional arguments, or a function of the model that returns what counts, such as
            pooled embeddings. Where nothing else is said, rows of ``logits`` or ``last_hidden_state`` are compared,
            without those that ``attention_mask`` leaves out.
        report: called with what was measured if ``accuracy`` is given; ``print`` shows it as a table.

    Returns:
        The model.

    Raises:
        ValueError: ``dtype`` is not known, the model has no ``nn.Linear``, a pattern in ``skip`` or ``keep_bf16``
            matches none, options do not go together, a weight is not on the CPU, a layer is packed in another dtype
            already, accelerate has put hooks on a layer (offloading), or a weight for int8 is not finite or has more
            than :data:`torch_ext.quantize.MAX_INT8_INPUTS` inputs. The model is unchanged then.
        TypeError: ``model`` is not a module, or a weight is neither fp32 nor bf16 nor fp16. The model is unchanged
            then.
        torch_ext.sensitivity.AccuracyError: a ValueError; not even bf16 is as accurate. The model is unchanged then.

    Example:
        >>> model = torch_ext.optimize(AutoModel.from_pretrained(name), skip="pooler")
        >>> with torch.inference_mode():
        ...     model(**inputs)
        >>> torch_ext.optimize(other, "int8", accuracy=0.998, sample=[inputs], report=print)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: expected a torch.nn.Module, got {type(model).__name__}")
    _check_dtype("optimize", dtype)
    if dtype != "int8" and (keep_bf16 != () or accuracy is not None):
        raise ValueError(f"optimize: keep_bf16 and accuracy mean nothing with dtype={dtype!r}, only with 'int8'")
    if (accuracy is None) != (not sample):
        raise ValueError("optimize: expected accuracy and a sample of inputs together, got one without the other")
    if accuracy is not None and not 0 < accuracy <= 1:
        raise ValueError(f"optimize: expected accuracy above 0 and at most 1, got {accuracy}")
    skipped, unused = _matcher(skip)
    in_bf16, unused_bf16 = _matcher(keep_bf16)
    targets: list[tuple[str, nn.Linear]] = []
    packed: dict[int, tuple[str, PackedLinear]] = {}
    seen = False
    kept: set[int] = set()
    bf16: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLinear):
            seen = True
            packed.setdefault(id(module), (name, module))
            if in_bf16(name, module):
                bf16.add(id(module))
            if skipped(name, module):
                kept.add(id(module))
        elif type(module) is nn.Linear and hasattr(module, "_hf_hook"):
            seen = True
            in_bf16(name, module)
            if not skipped(name, module):
                raise ValueError(
                    f"optimize: {name or 'the model'} has a hook of accelerate, which moves or offloads its weights "
                    "for each call, while a packed layer keeps them in memory, on the CPU: load the model without "
                    "device_map and offloading, or take the hooks off before: "
                    "accelerate.hooks.remove_hook_from_submodules(model)"
                )
        elif _is_plain(module):
            seen = True
            if in_bf16(name, module):
                bf16.add(id(module))
            if skipped(name, module):
                kept.add(id(module))  # Under its other names, too: a shared layer stays shared.
            else:
                targets.append((name, module))
    if not seen:
        raise ValueError(f"optimize: {type(model).__name__} has no nn.Linear that could be swapped")
    for option, left in (("skip", unused()), ("keep_bf16", unused_bf16())):
        if left:
            raise ValueError(f"optimize: {option} names no nn.Linear of the model: {', '.join(left)}")
    _check_packed(dtype, [layer for key, layer in packed.items() if key not in kept], bf16)
    targets = [(name, module) for name, module in targets if id(module) not in kept]
    for name, module in targets:
        if dtype == "int8" and id(module) not in bf16:
            check_inputs(f"optimize: {name or 'the model'}", module.in_features)
        _check_tensors(f"optimize: {name or 'the model'}", module.weight, module.bias)

    swap = _Swap(model, targets)
    low = {id(module) for _, module in targets} if dtype == "bf16" else bf16
    if accuracy is not None and sample is not None:
        result = _choose(swap, low, accuracy, sample)
        low = low | {swap.ids[name] for name in result.kept}
        if report is not None:
            report(result)
    model = swap(low)
    model.requires_grad_(False)
    return model.eval()


def _check_packed(dtype: PackedDtype, layers: Sequence[tuple[str, PackedLinear]], bf16: set[int]) -> None:
    """Raise unless layers that are packed already are in ``dtype``, or in bf16 those with these ids."""
    for name, layer in layers:
        wanted = "bf16" if id(layer) in bf16 else dtype
        if layer.dtype != wanted:
            wrong = sum(layer.dtype != ("bf16" if id(layer) in bf16 else dtype) for _, layer in layers)
            raise ValueError(
                f"optimize: {name or 'the model'}{f' and {wrong - 1} more layers' if wrong > 1 else ''}: expected "
                f"{wanted} or a layer that is not packed yet, got {layer.dtype}: optimize the original model, or name "
                f"what is to stay {layer.dtype} in {'skip' if wanted == 'bf16' else 'skip or keep_bf16'}"
            )


class _Swap:
    """Puts packed layers into a model in place of plain ones, as often as wanted.

    Attributes:
        ids: by the first name of each layer, the id of the plain one.
    """

    def __init__(self, model: nn.Module, targets: Sequence[tuple[str, nn.Linear]]) -> None:
        self._model, self._targets = model, targets
        self.ids: dict[str, int] = {}
        for name, module in targets:
            if id(module) not in self.ids.values():
                self.ids[name] = id(module)
        self._made: dict[tuple[int, PackedDtype], PackedLinear] = {}
        # By id, the parameters of all modules that stay: a linear layer may be tied to one.
        self._others = {
            id(parameter): parameter
            for part in model.modules()
            if id(part) not in self.ids.values()
            for parameter in part._parameters.values()
            if parameter is not None
        }
        # By parameter and dtype: layers that share a parameter share the packed weight.
        self._packed: dict[tuple[int, PackedDtype], Tensor] = {}
        # torch's fused path reads the weights of the layers instead of calling them: what turns it off.
        self._fused: list[tuple[nn.Module, str, Any]] = []
        for part in model.modules():
            if isinstance(part, nn.TransformerEncoderLayer):
                self._fused.append((part, "activation_relu_or_gelu", 0))
            elif isinstance(part, nn.TransformerEncoder):
                self._fused.append((part, "use_nested_tensor", False))
        self._before = [(module, name, getattr(module, name)) for module, name, _ in self._fused]

    def __call__(self, bf16: set[int]) -> nn.Module:
        """Pack every target: in bf16 those with these ids, the others in int8. Returns the model."""
        made = [(name, self._make(module, "bf16" if id(module) in bf16 else "int8")) for name, module in self._targets]
        for name, module in made:
            if not name:
                return module
            self._put(name, module)
        for layer, name, value in self._fused:
            setattr(layer, name, value)
        return self._model

    def undo(self) -> None:
        """Put the plain layers back."""
        for name, plain in self._targets:
            if name:
                self._put(name, plain)
        for layer, name, value in self._before:
            setattr(layer, name, value)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, module)

    def _make(self, module: nn.Linear, dtype: PackedDtype) -> PackedLinear:
        """The layer that stands for ``module``, with its hooks, in eval mode."""
        key = id(module), dtype
        if key not in self._made:
            weight = id(module.weight), dtype
            tied = {name: self._others[id(own)] for name, own in module._parameters.items() if id(own) in self._others}
            result = PackedLinear(module.weight, module.bias, self._packed.get(weight), dtype, tied)
            self._packed[weight] = result._packed
            for name in (
                "_forward_hooks",
                "_forward_hooks_with_kwargs",
                "_forward_pre_hooks",
                "_forward_pre_hooks_with_kwargs",
            ):
                result.__dict__[name] = module.__dict__[name]
            self._made[key] = result.eval()
        return self._made[key]


def _choose(swap: _Swap, low: set[int], accuracy: float, sample: Sequence[Sample]) -> Report:
    """Which layers to keep in bf16, besides ``low``; the model is left as it was.

    Raises:
        AccuracyError: not even all of them are enough.
        ValueError, TypeError: the model's output cannot be compared.
    """
    model = swap._model
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        exact = [output_rows(model, item) for item in sample]
        if not all(bool(torch.isfinite(rows).all()) for rows in exact):
            raise ValueError("optimize: the model's output on the sample is not finite: nothing compares with that")

        def measure(kept: frozenset[str]) -> Similarity:
            changed = swap(low | {swap.ids[name] for name in kept})
            return similarity(exact, (output_rows(changed, item) for item in sample))

        return choose_layers([name for name, key in swap.ids.items() if key not in low], measure, accuracy)
    finally:
        swap.undo()
        for module in training:
            module.training = True
