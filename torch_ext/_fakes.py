"""Fake kernels of the ops: shapes, dtypes and the errors that do not depend on data.

torch.compile, torch.export and meta tensors run them; :mod:`torch_ext.ops` imports this module once the library is
loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_ext.encoder.spec import ACTIVATIONS, POOLING_MODES

__all__: list[str] = []

_FLOATS = (torch.float32, torch.bfloat16)
_Kernel = TypeVar("_Kernel", bound=Callable[..., Tensor | tuple[Tensor, ...]])


def _fake(name: str) -> Callable[[_Kernel], _Kernel]:
    """Register a function as the fake kernel of an op."""

    def register(kernel: _Kernel) -> _Kernel:
        torch.library.register_fake(f"torch_ext::{name}", kernel)
        return kernel

    return register


def _check(condition: bool | torch.SymBool, message: str) -> None:
    """Raise RuntimeError unless the condition holds.

    A condition on sizes that are known only when a compiled program runs (tokens that a mask chose, columns of an
    unpacked weight) becomes a check at run time. It must be passed as it is: ``and``, ``or``, ``not`` and ``in`` would
    decide it while tracing.
    """
    torch._check(condition, lambda: message)  # type: ignore[no-untyped-call]


def _check_shape(message: str, shape: Sequence[int], *expected: int) -> None:
    """Raise RuntimeError unless a shape is the expected one."""
    _check(len(shape) == len(expected), message)
    for have, want in zip(shape, expected, strict=True):
        _check(have == want, message)


def _check_inference_only(op: str, **tensors: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            _check(
                tensor is None or not tensor.requires_grad,
                f"{op}: {name} requires grad, but torch_ext is for inference only and has no gradients: call it under "
                f"torch.inference_mode() or torch.no_grad(), or pass {name}.detach()",
            )


def _check_attended(op: str, attended: Tensor | None) -> None:
    _check(
        attended is None or (attended.dim() == 1 and attended.dtype == torch.int32),
        f"{op}: expected attended i32 [B], got another shape or dtype",
    )


def _check_packed(op: str, packed: Tensor) -> None:
    _check(
        packed.dim() == 2 and packed.dtype == torch.uint8,
        f"{op}: expected a weight packed by torch_ext::pack_linear_weight, got {packed.dtype} {list(packed.shape)}",
    )


@_fake("pack_linear_weight")
def _(weight: Tensor, transposed: bool = False) -> Tensor:
    _check_inference_only("pack_linear_weight", weight=weight)
    _check(
        weight.dim() == 2,
        f"pack_linear_weight: expected a weight {'[K, N]' if transposed else '[N, K]'}, got {weight.dim()} dimensions",
    )
    _check(weight.dtype in _FLOATS, f"pack_linear_weight: expected fp32 or bf16, got {weight.dtype}")
    # How many bytes depends on the CPU that packs.
    row_bytes = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty((weight.shape[1 if transposed else 0], row_bytes), dtype=torch.uint8)


@_fake("_pack_linear_weight_fp32")
def _(weight: Tensor) -> Tensor:
    _check(weight.dim() == 2, f"_pack_linear_weight_fp32: expected a weight [N, K], got {weight.dim()} dimensions")
    return weight.new_empty((weight.shape[0], torch.library.get_ctx().new_dynamic_size()), dtype=torch.uint8)


@_fake("_unpack_linear_weight_fp32")
def _(packed: Tensor) -> Tensor:
    _check_packed("_unpack_linear_weight_fp32", packed)
    return packed.new_empty((packed.shape[0], torch.library.get_ctx().new_dynamic_size()), dtype=torch.float32)


@_fake("unpack_linear_weight")
def _(packed: Tensor) -> Tensor:
    _check_packed("unpack_linear_weight", packed)
    columns = torch.library.get_ctx().new_dynamic_size()  # Only the header of a real tensor tells.
    return packed.new_empty((packed.shape[0], columns), dtype=torch.bfloat16)


@_fake("pack_linear_weight_int8")
def _(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    _check_inference_only("pack_linear_weight_int8", weight=weight, scale=scale)
    _check(weight.dim() == 2, f"pack_linear_weight_int8: expected a weight [N, K], got {weight.dim()} dimensions")
    _check(
        weight.dtype in ((torch.int8,) if scale is not None else _FLOATS),
        f"pack_linear_weight_int8: expected i8 with a scale, or fp32 or bf16 without, got {weight.dtype}",
    )
    row_bytes = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty((weight.shape[0], row_bytes), dtype=torch.uint8)


@_fake("unpack_linear_weight_int8")
def _(packed: Tensor) -> tuple[Tensor, Tensor]:
    _check_packed("unpack_linear_weight_int8", packed)
    columns = torch.library.get_ctx().new_dynamic_size()
    rows = packed.shape[0]
    return packed.new_empty((rows, columns), dtype=torch.int8), packed.new_empty((rows,), dtype=torch.float32)


@_fake("linear")
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    _check_inference_only("linear", x=x, bias=bias, residual=residual)
    _check(x.dtype in _FLOATS, f"linear: expected x of fp32 or bf16, got {x.dtype}")
    _check(x.dim() >= 1, "linear: expected x [..., K], got a scalar")
    _check_packed("linear", packed)
    _check(activation in ACTIVATIONS, f"linear: unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    _check(out_dtype is None or out_dtype in _FLOATS, f"linear: expected out_dtype fp32 or bf16, got {out_dtype}")
    rows = packed.shape[0]
    if bias is not None:
        _check_shape(f"linear: expected bias [{rows}], got {list(bias.shape)}", bias.shape, rows)
    shape = (*x.shape[:-1], rows)
    if residual is not None:
        _check_shape(f"linear: expected residual {list(shape)}, got {list(residual.shape)}", residual.shape, *shape)
    return x.new_empty(shape, dtype=out_dtype or x.dtype)


def _check_operands(op: str, a: Tensor, b: Tensor) -> None:
    _check_inference_only(op, a=a, b=b)
    _check(
        a.dtype in _FLOATS and a.dtype == b.dtype,
        f"{op}: expected a and b both in bf16 or both in fp32, got {a.dtype} and {b.dtype}",
    )


@_fake("matmul")
def _(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    _check_operands("matmul", a, b)
    _check(out_dtype is None or out_dtype in _FLOATS, f"matmul: expected out_dtype fp32 or bf16, got {out_dtype}")
    _check(a.dim() >= 1 and b.dim() >= 1, "matmul: expected a [..., M, K] and b [..., K, N], got a scalar")
    inner = b.shape[0 if b.dim() == 1 else -2]
    _check(a.shape[-1] == inner, f"matmul: expected b with K={a.shape[-1]}, as a ends with, got {inner}")
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    shape = (*batch, *a.shape[-2:-1], *(b.shape[-1:] if b.dim() > 1 else ()))
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


@_fake("bmm")
def _(a: Tensor, b: Tensor) -> Tensor:
    _check_operands("bmm", a, b)
    message = f"bmm: expected a [B, M, K] and b [B, K, N], got {list(a.shape)} and {list(b.shape)}"
    _check(a.dim() == 3 and b.dim() == 3, message)
    _check(a.shape[0] == b.shape[0], message)
    _check(a.shape[2] == b.shape[1], message)
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]))


@_fake("addmm")
def _(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    _check_operands("addmm", a, b)
    _check_inference_only("addmm", bias=bias)
    _check(bias.dtype == a.dtype, f"addmm: expected bias of the dtype of a and b, got {bias.dtype} and {a.dtype}")
    message = f"addmm: expected a [M, K] and b [K, N], got {list(a.shape)} and {list(b.shape)}"
    _check(a.dim() == 2 and b.dim() == 2, message)
    _check(a.shape[1] == b.shape[0], message)
    shape = (a.shape[0], b.shape[1])
    message = f"addmm: expected bias that broadcasts to {list(shape)}, got {list(bias.shape)}"
    _check(bias.dim() <= 2, message)
    for have, want in zip(reversed(bias.shape), reversed(shape), strict=False):
        _check((have == want) | (have == 1), message)
    return a.new_empty(shape)


@_fake("varlen_attention")
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    scale: float | None = None,
    window: int | None = None,
    relative_bias: Tensor | None = None,
    position_keys: Tensor | None = None,
    position_queries: Tensor | None = None,
    position_reach: int = 0,
    causal: bool = False,
    attended: Tensor | None = None,
) -> Tensor:
    positions = {"position_keys": position_keys, "position_queries": position_queries}
    _check_inference_only("varlen_attention", qkv=qkv, relative_bias=relative_bias, **positions)
    _check_attended("varlen_attention", attended)
    _check(window is None or window >= 0, f"varlen_attention: expected window of at least 0, got {window}")
    if relative_bias is not None:
        message = f"varlen_attention: expected relative_bias [{num_heads}, 2 * R + 1], got another shape"
        _check(relative_bias.dim() == 2, message)
        _check(relative_bias.shape[0] == num_heads, message)
    _check(qkv.dim() == 2, f"varlen_attention: expected qkv [T, 3 * H], got {qkv.dim()} dimensions")
    message = (
        f"varlen_attention: expected qkv [T, 3 * H] with H a multiple of num_heads={num_heads}, got {list(qkv.shape)}"
    )
    _check(num_heads > 0, message)
    _check(qkv.shape[1] % (3 * num_heads) == 0, message)
    for name, table in positions.items():
        if table is not None:
            message = f"varlen_attention: expected {name} [2 * S, {qkv.shape[1] // 3}], got {list(table.shape)}"
            _check(table.dim() == 2, message)
            _check(table.shape[1] == qkv.shape[1] // 3, message)
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3))


@_fake("add_layer_norm")
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual_scale: Tensor | None = None,
) -> Tensor:
    _check_inference_only(
        "add_layer_norm", x=x, residual=residual, weight=weight, bias=bias, residual_scale=residual_scale
    )
    return x.new_empty(x.shape)


@_fake("add_rms_norm")
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    _check_inference_only("add_rms_norm", x=x, residual=residual, weight=weight)
    return x.new_empty(x.shape)


@_fake("rotary_embedding")
def _(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, cos_sin: Tensor) -> Tensor:
    _check_inference_only("rotary_embedding", qkv=qkv, cos_sin=cos_sin)
    message = (
        f"rotary_embedding: expected qkv [T, 3 * H] with H / num_heads even, got {list(qkv.shape)}, {num_heads} heads"
    )
    _check(qkv.dim() == 2 and num_heads > 0, message)
    _check(qkv.shape[1] % (6 * num_heads) == 0, message)
    return qkv.new_empty(qkv.shape)


@_fake("gate")
def _(x: Tensor, activation: str) -> Tensor:
    _check_inference_only("gate", x=x)
    _check(activation in ACTIVATIONS, f"gate: unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    _check(x.dim() == 2, f"gate: expected x [T, 2 * I], got {list(x.shape)}")
    _check(x.shape[1] % 2 == 0, f"gate: expected x [T, 2 * I], got {list(x.shape)}")
    return x.new_empty((x.shape[0], x.shape[1] // 2))


@_fake("embed_layer_norm")
def _(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    position_offset: int,
    padding_id: int = -1,
) -> Tensor:
    _check_inference_only(
        "embed_layer_norm", word=word, position=position, token_type=token_type, weight=weight, bias=bias
    )
    return word.new_empty((input_ids.shape[0], word.shape[1]))


@_fake("pool")
def _(hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool) -> Tensor:
    _check_inference_only("pool", hidden=hidden)
    _check(mode in POOLING_MODES, f"pool: unknown mode {mode!r}; known: {', '.join(POOLING_MODES)}")
    return hidden.new_empty((cu_seqlens.shape[0] - 1, hidden.shape[1]), dtype=torch.float32)


@_fake("_pack_encoder")
def _(weights: list[Tensor], *, hidden_size: int, **_: Any) -> Tensor:
    row_bytes = torch.library.get_ctx().new_dynamic_size()
    return weights[0].new_empty((hidden_size, row_bytes), dtype=torch.uint8)


@_fake("_rotary_table")
def _(like: Tensor, positions: int, head_size: int, theta: float, factor: float = 1.0) -> Tensor:
    return like.new_empty((positions, head_size), dtype=torch.float32)


@_fake("_relative_bias_table")
def _(bias: Tensor, reach: int) -> Tensor:
    return bias.new_empty((bias.shape[1], 2 * reach + 1))


@_fake("_encoder_sections")
def _(packed: Tensor) -> Tensor:
    return packed.new_empty((torch.library.get_ctx().new_dynamic_size(), 2), dtype=torch.int64)


@_fake("encoder_forward")
def _(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    packed: Tensor,
    fp32: bool = False,
    attended: Tensor | None = None,
) -> Tensor:
    _check_attended("encoder_forward", attended)
    _check(input_ids.dim() == 1, f"encoder_forward: expected input_ids i64 [T], got {input_ids.dim()} dimensions")
    _check(
        packed.dim() == 2 and packed.dtype == torch.uint8,
        f"encoder_forward: expected an encoder packed by torch_ext.Encoder, got {packed.dtype}",
    )
    dtype = torch.float32 if fp32 else torch.bfloat16
    return packed.new_empty((input_ids.shape[0], packed.shape[0]), dtype=dtype)
