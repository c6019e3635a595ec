"""Fast bf16 and int8 inference of BERT-family encoders in PyTorch on ARM cloud CPUs.

The ways in, from little to much:

* :func:`accelerate` runs ``F.linear`` and ``torch.matmul`` of bf16 tensors on our kernels while it is enabled.
* :func:`optimize` swaps the linear layers of a model that you have, in place.
* :class:`Encoder` runs a BERT, or one of its many relatives, without padding, as one ``[total_tokens, hidden]`` matrix.
* ``torch.ops.torch_ext.*``, wrapped with types in :mod:`torch_ext.ops`, for models of your own: :func:`linear` of
  packed weights, :func:`matmul`, :func:`bmm`, :func:`addmm`, attention, norms.

``python -m torch_ext.doctor`` tells what this machine can do, and what is set wrong.

Importing this package imports no torch. The first use of one of its names does, and ``torch.ops.torch_ext.*`` are
registered as soon as both are imported, in either order.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch_ext._imports import lazy_names, when_imported
from torch_ext._register import register_ops

if TYPE_CHECKING:
    from torch_ext.accelerate import Acceleration, accelerate
    from torch_ext.encoder import Encoder, EncoderSpec, Head, HeadSpec
    from torch_ext.nn import PackedLinear, optimize
    from torch_ext.ops import (
        add_layer_norm,
        add_rms_norm,
        addmm,
        bmm,
        embed_layer_norm,
        encoder_forward,
        gate,
        isa_report,
        linear,
        matmul,
        pack_linear_weight,
        pack_linear_weight_int8,
        pool,
        rotary_embedding,
        unpack_linear_weight,
        unpack_linear_weight_int8,
        varlen_attention,
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "optimize",
    "accelerate",
    "Acceleration",
    "PackedLinear",
    "Encoder",
    "EncoderSpec",
    "Head",
    "HeadSpec",
    "linear",
    "matmul",
    "bmm",
    "addmm",
    "pack_linear_weight",
    "unpack_linear_weight",
    "pack_linear_weight_int8",
    "unpack_linear_weight_int8",
    "varlen_attention",
    "add_layer_norm",
    "add_rms_norm",
    "rotary_embedding",
    "gate",
    "embed_layer_norm",
    "encoder_forward",
    "pool",
    "isa_report",
]

# Names by the module that has them, for the first use; type checkers read the imports above.
_HOMES = {
    "torch_ext.accelerate": ("Acceleration", "accelerate"),
    "torch_ext.encoder.model": ("Encoder", "Head"),
    "torch_ext.encoder.spec": ("EncoderSpec", "HeadSpec"),
    "torch_ext.nn": ("PackedLinear", "optimize"),
    "torch_ext.ops": (
        "add_layer_norm",
        "add_rms_norm",
        "addmm",
        "bmm",
        "embed_layer_norm",
        "encoder_forward",
        "gate",
        "isa_report",
        "linear",
        "matmul",
        "pack_linear_weight",
        "pack_linear_weight_int8",
        "pool",
        "rotary_embedding",
        "unpack_linear_weight",
        "unpack_linear_weight_int8",
        "varlen_attention",
    ),
}
_SUBMODULES = (
    "encoder",
    "flops",
    "nn",
    "ops",
    "packed_linear",
    "patterns",
    "quantize",
    "read_only",
    "runtime",
    "sensitivity",
)

if not TYPE_CHECKING:  # Else any misspelt name would be right.
    __getattr__, __dir__ = lazy_names(__name__, _HOMES, _SUBMODULES)


class _Package(ModuleType):
    """Keeps ``torch_ext.accelerate`` the function, although an import binds the module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "accelerate" and isinstance(value, ModuleType):
            value = value.accelerate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

when_imported("torch", register_ops)
