"""A specification and its packed weights: what encoders and heads have in common."""

from __future__ import annotations

import copyreg
from collections.abc import Iterable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

import torch_ext.ops  # noqa: F401 - registers the ops
from torch_ext.encoder.spec import Dtype, EncoderSpec, HeadSpec, check_dtype, is_matrix, is_table, scale_name
from torch_ext.encoder.weights import TABLE_DTYPES, LazyWeights, check_weights
from torch_ext.patterns import select
from torch_ext.quantize import check_inputs, quantize_weight

__all__ = ["Inference", "Weighted"]

Spec = TypeVar("Spec", EncoderSpec, HeadSpec)

_linear = torch.ops.torch_ext.linear.default
_add_layer_norm = torch.ops.torch_ext.add_layer_norm.default
_pack = torch.ops.torch_ext.pack_linear_weight.default
_unpack = torch.ops.torch_ext.unpack_linear_weight.default
_pack_fp32 = torch.ops.torch_ext._pack_linear_weight_fp32.default
_unpack_fp32 = torch.ops.torch_ext._unpack_linear_weight_fp32.default
_pack_int8 = torch.ops.torch_ext.pack_linear_weight_int8.default
_unpack_int8 = torch.ops.torch_ext.unpack_linear_weight_int8.default


class Inference:
    """Gradients off, and below autograd's dispatch keys: each call of an op saves torch's fallback for them.

    Unlike ``torch.inference_mode()`` it yields ordinary tensors, which may take part in autograd later (someone trains
    a head of their own on them).
    """

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._below = torch._C._AutoDispatchBelowAutograd()
        self._below.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        self._below.__exit__(*error)
        torch._C._set_grad_enabled(self._grad)


class Weighted(Generic[Spec]):
    """A specification and its weights, in the form that the ops read."""

    spec: Spec
    dtype: Dtype
    kept_bf16: tuple[str, ...]

    def __init__(
        self,
        spec: Spec,
        weights: Mapping[str, Tensor],
        dtype: Dtype = "bf16",
        keep_bf16: str | Iterable[str] = (),
    ) -> None:
        """Pack weights.

        Args:
            spec: what to compute.
            weights: fp32 or bf16 tensors with the names and shapes of ``spec.shapes()``; they are copied. For an int8
                encoder matrices may be quantized already: i8, with fp32 ``NAME.weight_scale`` ``[N]`` beside them.
            dtype: ``"bf16"``, ``"fp32"`` or ``"int8"``.
            keep_bf16: linear layers of an int8 encoder to leave in bf16: names, or ``fnmatch`` patterns of names, such
                as ``"layers.0.ffn.down"``; ``"layers.0"`` means all in that layer.

        Raises:
            ValueError: ``dtype`` is not known, a name, shape or dtype is wrong, ``keep_bf16`` names no linear layer, or
                one that is quantized already, or a layer has too many inputs for int8
                (:data:`torch_ext.quantize.MAX_INT8_INPUTS`).
        """
        self.spec = spec
        self.dtype = check_dtype(dtype)
        outlines = weights.outlines() if isinstance(weights, LazyWeights) else weights
        check_weights(spec, outlines)
        self.kept_bf16 = self._select_kept(outlines, keep_bf16)
        self._tensors = {
            name: self._convert(name, weights)
            for name in weights
            if name in spec.shapes() or name in spec.optional_shapes()
        }

    def _select_kept(self, weights: Mapping[str, Tensor], keep_bf16: str | Iterable[str]) -> tuple[str, ...]:
        """The names of the linear layers that ``keep_bf16`` means, checked."""
        kind = type(self).__name__
        layers = [name.removesuffix(".weight") for name in self.spec.shapes() if is_matrix(name)]
        kept = select(f"{kind}: keep_bf16", layers, keep_bf16)
        quantized = {name for name in layers if weights[f"{name}.weight"].dtype == torch.int8}
        if kept and self.dtype != "int8":
            raise ValueError(f"{kind}: keep_bf16 means nothing with dtype={self.dtype!r}, only with 'int8'")
        if quantized and self.dtype != "int8":
            raise ValueError(f"{kind}: expected fp32 or bf16 weights for dtype={self.dtype!r}, got int8 ones")
        if quantized.intersection(kept):
            names = ", ".join(sorted(quantized.intersection(kept)))
            raise ValueError(f"{kind}: cannot keep {names} in bf16, being quantized already: start from other weights")
        if self.dtype == "int8":
            for name in layers:
                if name not in kept:
                    check_inputs(f"{kind}: {name}", self.spec.shapes()[f"{name}.weight"][1])
        return kept

    def _is_int8(self, name: str) -> bool:
        """Whether a weight is, or becomes, a packed matrix of int8."""
        return self.dtype == "int8" and is_matrix(name) and name.removesuffix(".weight") not in self.kept_bf16

    def _convert(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        if self._is_int8(name):
            tensor, scale = weights[name].detach(), weights.get(scale_name(name))
            quantized, scale = (tensor, scale) if scale is not None else quantize_weight(tensor)
            packed: Tensor = _pack_int8(quantized.contiguous(), scale.detach())
            return packed
        kind = TABLE_DTYPES[self.dtype] if is_matrix(name) or is_table(name) else torch.float32
        # Packing rounds to the same numbers.
        lazy = weights.make(name, kind, is_matrix(name)) if isinstance(weights, LazyWeights) else None
        if is_matrix(name):
            tensor = weights[name].detach().contiguous() if lazy is None else lazy
            return (_pack_fp32 if self.dtype == "fp32" else _pack)(tensor)  # type: ignore[no-any-return]
        return weights[name].detach().to(kind, copy=True).contiguous() if lazy is None else lazy

    def _linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        activation: str = "none",
        out_dtype: torch.dtype | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``activation(x @ weight.T + bias) + residual``, with a weight as :meth:`_convert` leaves it."""
        if self.dtype == "fp32":
            x = x.float()
        result: Tensor = _linear(x, weight, bias, activation, out_dtype, residual)
        return result

    def _norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual_scale: Tensor | None = None,
    ) -> Tensor:
        """The layer norm of ``x + residual_scale * residual``; ``x`` where there is no norm."""
        if weight is None:
            return x
        result: Tensor = _add_layer_norm(x, residual, weight, bias, self.spec.layer_norm_eps, residual_scale)
        return result

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, unpacked, as the constructor takes them.

        Returns:
            Matrices and tables in ``dtype``, the rest fp32. With int8: matrices i8 ``NAME.weight`` with fp32
            ``NAME.weight_scale`` ``[N]``, but bf16 in layers that are kept so; tables bf16.
        """
        result: dict[str, Tensor] = {}
        for name, tensor in self._tensors.items():
            if self._is_int8(name):
                result[name], result[scale_name(name)] = _unpack_int8(tensor)
            elif is_matrix(name):
                result[name] = _unpack_fp32(tensor) if self.dtype == "fp32" else _unpack(tensor)
            else:
                result[name] = tensor
        return result

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ForkingPickler.register(cls, _reduce_for_process)

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "dtype": self.dtype, "weights": self.weights(), "keep_bf16": self.kept_bf16}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "packed" in state:
            self._unflatten(state["packed"])
            return
        self.__init__(state["spec"], state["weights"], state["dtype"], state.get("keep_bf16", ()))  # type: ignore[misc]

    def _flatten(self) -> dict[str, Any]:
        """The attributes as they are, each tensor that is a view of another one described instead."""
        return dict(self.__dict__)

    def _unflatten(self, attributes: dict[str, Any]) -> None:
        """Take over what :meth:`_flatten` returned."""
        self.__dict__.update(attributes)


def _reduce_for_process(weighted: Weighted[Any]) -> tuple[Any, ...]:
    """How an object is sent to another process on this machine: packed, as it is, in shared memory.

    The tensors in what spawn and forkserver send must live until the process has started, since the new process gets
    their file descriptors, and no two may share memory, since a descriptor may be sent once. What ``__getstate__``
    unpacks would not do.
    """
    return copyreg.__newobj__, (type(weighted),), {"packed": weighted._flatten()}  # type: ignore[attr-defined]
