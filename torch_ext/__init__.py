"""Fast bf16 and int8 inference of BERT-family encoders in PyTorch on ARM cloud CPUs.

The ways in, from little to much:

* :func:`accelerate` runs ``F.linear`` and ``torch.matmul`` of bf16 tensors on our kernels while it is enabled.
* :func:`optimize` swaps the linear layers of a model that you have, in place.
* :class:`Encoder` runs a BERT, or one of its many relatives, without padding, as one ``[total_tokens, hidden]`` matrix.
* ``torch.ops.torch_ext.*``, wrapped with types in :mod:`torch_ext.ops`, for models of your own: :func:`linear` of
  packed weights, :func:`matmul`, :func:`bmm`, :func:`addmm`, attention, norms.

``python -m torch_ext.doctor`` tells what this machine can do, and what is set wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

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

_LIBRARY = Path(__file__).resolve().parent / "_C.abi3.so"


def _load_library() -> None:
    """Register ``torch.ops.torch_ext.*``.

    Raises:
        ImportError: torch is missing or too old, the library was not built, or it does not load; says what to do.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError("torch_ext needs torch>=2.10, which is not installed: pip install torch") from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise ImportError(f"torch_ext needs torch>=2.10, found {torch.__version__}: pip install -U torch")
    if not _LIBRARY.is_file():
        raise ImportError(
            f"torch_ext: {_LIBRARY} is missing: the package was not built for this environment. Install a wheel, or "
            "in a checkout run pip install --no-build-isolation -e . (python setup.py build_ext --inplace builds only "
            "the library)"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        text = str(error)
        if "static TLS block" in text:
            hint = "start Python with LD_PRELOAD set to the library named above"
        elif "wrong ELF class" in text or "cannot open shared object" in text or "invalid ELF header" in text:
            hint = "it was built for another architecture or system: reinstall torch-ext for this one"
        else:
            hint = (
                "rebuild it against the torch that is installed: pip install --no-build-isolation --force-reinstall ."
            )
        raise ImportError(f"torch_ext: cannot load {_LIBRARY}: {text}; {hint}") from error


try:
    _load_library()
except ImportError:
    # The doctor has to be able to say what is wrong.
    if not any("torch_ext.doctor" in argument for argument in sys.orig_argv):
        raise
else:
    from torch_ext.accelerate import Acceleration, accelerate
    from torch_ext.encoder import Encoder, EncoderSpec, Head, HeadSpec
    from torch_ext.flops import register_when_imported as _register_flop_formulas
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

    _register_flop_formulas()
