"""A linear layer with a packed bf16 weight, and :func:`optimize`, which puts it into a model that exists."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

__all__ = ["PackedLinear", "Skip", "optimize"]

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]

_linear = torch.ops.torch_ext.linear.default
_pack = torch.ops.torch_ext.pack_linear_weight.default
_unpack = torch.ops.torch_ext.unpack_linear_weight.default

_FLOATS = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """Stands for an :class:`torch.nn.Linear` in inference: bf16 products, fp32 sums, fp32 bias.

    It has no parameters. The packed weight belongs to this kind of CPU, and whatever leaves the process is unpacked:
    ``state_dict()`` and pickles have ``weight`` and ``bias`` under the names and in the dtypes of the layer that was
    replaced, so that an ``nn.Linear`` can load them; the values of ``weight`` are the bf16 rounding of what it was.
    ``load_state_dict()`` packs again. ``model.float()``, ``.bfloat16()`` and ``.half()`` leave the layer as it is;
    moving it off the CPU is an error.

    Args:
        weight: fp32 or bf16 ``[N, K]`` on the CPU.
        bias: fp32 or bf16 ``[N]``, or None.
        packed: the weight as :func:`torch_ext.pack_linear_weight` returned it, if that was done before.

    Attributes:
        in_features: K.
        out_features: N.

    Raises:
        TypeError: a tensor is neither fp32 nor bf16.
        ValueError: a shape does not fit, or a tensor is not on the CPU.
    """

    in_features: int
    out_features: int

    def __init__(self, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> None:
        super().__init__()
        _check_tensors("PackedLinear", weight, bias)
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                f"PackedLinear: expected weight [N, K] and bias [N], got {list(weight.shape)} and "
                f"{None if bias is None else list(bias.shape)}"
            )
        self.out_features, self.in_features = weight.shape
        # Neither is a parameter or a buffer, so that no cast of the model reaches them.
        self._packed = _pack(weight.detach().contiguous()) if packed is None else packed
        self._bias = None if bias is None else _as_bias(bias)
        self._weight_dtype = weight.dtype
        self._bias_dtype = None if bias is None else bias.dtype

    @classmethod
    def from_linear(cls, module: nn.Linear) -> PackedLinear:
        """Pack a layer; see :class:`PackedLinear` for errors.

        Args:
            module: the layer; it is left as it is.

        Returns:
            The layer that stands for it.
        """
        return cls(module.weight, module.bias)

    @property
    def weight(self) -> Tensor:
        """The weight ``[N, K]`` in its original dtype, rounded to bf16; unpacked anew at every access."""
        unpacked: Tensor = _unpack(self._packed)
        return unpacked.to(self._weight_dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[N]`` in its original dtype, or None."""
        return None if self._bias is None else self._bias.to(self._bias_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise RuntimeError(
                f"PackedLinear: {name} cannot be assigned, since it is packed: change the model before "
                "torch_ext.optimize(), or use load_state_dict()"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``.

        Args:
            x: fp32 or bf16 ``[..., K]``.

        Returns:
            ``[..., N]`` in the dtype of ``x``.

        Raises:
            RuntimeError: ``x`` requires grad while gradients are enabled, or its shape or dtype does not fit.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "PackedLinear: the input requires grad, but torch_ext.optimize() makes a model for inference only: "
                "call the model under torch.inference_mode() or torch.no_grad(), or train the original model"
            )
        result: Tensor = _linear(x, self._packed, self._bias)
        return result

    def extra_repr(self) -> str:
        """What print() shows in the parentheses."""
        has_bias = self._bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, dtype=bf16"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # Called by to(), float(), cuda() and their like with what they do to a tensor.
        device = fn(torch.empty(0)).device
        if device.type != "cpu":
            raise RuntimeError(
                f"PackedLinear: cannot move to {device}: packed weights are for the CPU. Move the original model, "
                "before torch_ext.optimize()"
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self._bias is not None:
            destination[prefix + "bias"] = self.bias

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
        if "weight" in found:
            weight = found["weight"]
            self._packed = _pack((weight if weight.dtype in _FLOATS else weight.float()).contiguous())
        if "bias" in found:
            self._bias = _as_bias(found["bias"])
        if strict:
            known = {prefix + name for name in names}
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_packed"] = _unpack(self._packed)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_packed": _pack(state["_packed"])})  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        # Nothing writes into a packed weight (load_state_dict puts a new one in its place): a copy may share it.
        for name, value in self.__dict__.items():
            result.__dict__[name] = value if name == "_packed" else copy.deepcopy(value, memo)
        return result


def _as_bias(bias: Tensor) -> Tensor:
    """An fp32 copy."""
    return bias.detach().to(torch.float32, copy=True).contiguous()


def _check_tensors(what: str, *tensors: Tensor | None) -> None:
    """Raise unless all are fp32 or bf16 on the CPU."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{what}: expected tensors on the CPU, got {tensor.device}: "
                + ("load the weights first" if tensor.device.type == "meta" else "call model.cpu() first")
            )
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{what}: expected fp32 or bf16, got {tensor.dtype}: call model.float() first")


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module does what nn.Linear does: no subclass, no parametrization, no forward of its own."""
    return (
        type(module) is nn.Linear and set(module._parameters) == {"weight", "bias"} and "forward" not in module.__dict__
    )


def _matcher(skip: Skip) -> tuple[Callable[[str, nn.Module], bool], Callable[[], list[str]]]:
    """The test that ``skip`` stands for, and a function that lists the patterns that matched nothing so far."""
    if callable(skip):
        return skip, list
    patterns = [skip] if isinstance(skip, str) else list(skip)
    unused = set(patterns)

    def matches(name: str, module: nn.Module) -> bool:
        parts = name.split(".")
        prefixes = [".".join(parts[: count + 1]) for count in range(len(parts))]
        hits = {pattern for pattern in patterns if any(fnmatchcase(prefix, pattern) for prefix in prefixes)}
        unused.difference_update(hits)
        return bool(hits)

    return matches, lambda: [pattern for pattern in patterns if pattern in unused]


def optimize(model: nn.Module, dtype: str = "bf16", skip: Skip = ()) -> nn.Module:
    """Swap every ``nn.Linear`` of a model for a :class:`PackedLinear`, in place.

    The model is for inference afterwards: it is put into eval mode, ``requires_grad`` is off in all of it, and inputs
    that require grad are refused. A second call finds nothing to do. Only plain ``nn.Linear`` is swapped: subclasses,
    such as the output projection of ``nn.MultiheadAttention``, and parametrized layers stay as they are. A layer that
    is used in several places stays one layer. A weight that is tied to an embedding is packed for the linear layer,
    while the embedding keeps its own, unrounded.

    Args:
        model: the model, its parameters fp32 or bf16 on the CPU. If it is itself an ``nn.Linear``, it cannot be swapped
            in place: use what is returned.
        dtype: what products are computed in; ``"bf16"``.
        skip: layers to leave alone: a name or ``fnmatch`` pattern, several of them, or a function of name and layer. A
            pattern that matches a module's name leaves out all layers in that module.

    Returns:
        The model.

    Raises:
        ValueError: ``dtype`` is not known, the model has no ``nn.Linear``, a pattern in ``skip`` matches none, or a
            weight is not on the CPU. The model is unchanged then.
        TypeError: ``model`` is not a module, or a weight is neither fp32 nor bf16. The model is unchanged then.

    Example:
        >>> model = torch_ext.optimize(AutoModel.from_pretrained(name), skip="pooler")
        >>> with torch.inference_mode():
        ...     model(**inputs)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: expected a torch.nn.Module, got {type(model).__name__}")
    if dtype != "bf16":
        raise ValueError(f"optimize: unknown dtype {dtype!r}; known: 'bf16'")
    skipped, unused = _matcher(skip)
    targets: list[tuple[str, nn.Linear]] = []
    seen = False
    kept: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLinear):
            seen = True
            skipped(name, module)
        elif _is_plain(module):
            seen = True
            if skipped(name, module):
                kept.add(id(module))  # Under its other names, too: a shared layer stays shared.
            else:
                targets.append((name, module))
    if not seen:
        raise ValueError(f"optimize: {type(model).__name__} has no nn.Linear that could be swapped")
    if unused():
        raise ValueError(f"optimize: skip names no nn.Linear of the model: {', '.join(unused())}")
    targets = [(name, module) for name, module in targets if id(module) not in kept]
    for name, module in targets:
        _check_tensors(f"optimize: {name or 'the model'}", module.weight, module.bias)

    made: dict[int, PackedLinear] = {}
    packed: dict[int, Tensor] = {}
    for name, module in targets:
        if id(module) not in made:
            made[id(module)] = _pack_module(module, packed)
        if not name:
            return made[id(module)]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    for module in model.modules():
        # torch's fused path reads the weights of the layers instead of calling them.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    model.requires_grad_(False)
    return model.eval()


def _pack_module(module: nn.Linear, packed: dict[int, Tensor]) -> PackedLinear:
    """The layer that stands for ``module``, with its hooks.

    Args:
        module: the layer to replace.
        packed: packed weights by the id of the parameter; layers that share a parameter share the packed weight.

    Returns:
        The new layer, in eval mode.
    """
    result = PackedLinear(module.weight, module.bias, packed.get(id(module.weight)))
    packed[id(module.weight)] = result._packed
    for name in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    ):
        result.__dict__[name] = module.__dict__[name]
    return result.eval()
