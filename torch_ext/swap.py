"""Packed layers in place of the plain ones of a model, put in and taken out again, for :func:`torch_ext.optimize`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from torch_ext.layer_weights import PackedDtype
from torch_ext.packed_linear import PackedLinear
from torch_ext.patterns import as_patterns, matches
from torch_ext.sensitivity import Report, Sample, Similarity, choose_layers, output_rows, similarity

__all__ = ["Skip", "Swap", "check_packed", "choose", "is_plain", "matcher"]

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is what nn.Linear is: no subclass, no parametrization, no forward, buffers or modules of its own.

    And it is not empty.
    """
    # accelerate leaves nn.Linear's own behind when it takes its hooks off.
    own = module.__dict__.get("forward")
    return (
        type(module) is nn.Linear
        and set(module._parameters) == {"weight", "bias"}
        and not module._buffers
        and not module._modules
        and (own is None or getattr(own, "__func__", None) is nn.Linear.forward)
        and module.weight.numel() > 0
    )


def matcher(skip: Skip) -> tuple[Callable[[str, nn.Module], bool], Callable[[], list[str]]]:
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


def check_packed(dtype: PackedDtype, layers: Sequence[tuple[str, PackedLinear]], bf16: set[int]) -> None:
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


class Swap:
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
        made = [
            (name, self._make(name, module, "bf16" if id(module) in bf16 else "int8")) for name, module in self._targets
        ]
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

    def _make(self, name: str, module: nn.Linear, dtype: PackedDtype) -> PackedLinear:
        """The layer that stands for ``module``, with its hooks and attributes, in eval mode."""
        key = id(module), dtype
        if key not in self._made:
            weight = id(module.weight), dtype
            tied = {kind: self._others[id(own)] for kind, own in module._parameters.items() if id(own) in self._others}
            try:
                result = PackedLinear(module.weight, module.bias, self._packed.get(weight), dtype, tied)
            except ValueError as error:
                raise ValueError(f"optimize: {name or 'the model'}: {error}") from error
            self._packed[weight] = result._packed
            for shared in (
                "_forward_hooks",
                "_forward_hooks_with_kwargs",
                "_forward_hooks_always_called",
                "_forward_pre_hooks",
                "_forward_pre_hooks_with_kwargs",
                "_state_dict_hooks",
                "_state_dict_pre_hooks",
                "_load_state_dict_post_hooks",
            ):
                result.__dict__[shared] = module.__dict__[shared]
            for attribute, value in module.__dict__.items():
                if attribute != "forward":  # Those that a user gave it.
                    result.__dict__.setdefault(attribute, value)
            self._made[key] = result.eval()
        return self._made[key]


def choose(swap: Swap, low: set[int], accuracy: float, sample: Sequence[Sample]) -> Report:
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
