"""Typed wrappers of ``torch.ops.torch_ext.*``: one for each op, with what it takes and returns, to be looked up here.

All ops run on CPU tensors and are for inference only: under enabled gradients they refuse tensors that require grad.
Sequences are concatenated without padding: ``cu_seqlens`` is i32 ``[B + 1]``, starts at 0, ends at T, and sequence
``b`` is rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.

The file is longer than others since it is one table: most of its lines say what an op takes, returns and refuses.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import is_tensor_like

from torch_ext._imports import when_imported
from torch_ext._library import load_library
from torch_ext.encoder.spec import ACTIVATIONS, POOLING_MODES, PoolingMode
from torch_ext.quantize import check_inputs, dequantize_weight

__all__ = [
    "ACTIVATIONS",
    "POOLING_MODES",
    "Activation",
    "PoolingMode",
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
]

Activation = Literal["none", "gelu", "gelu_tanh", "relu", "tanh", "silu", "quick_gelu", "sigmoid", "leaky_relu"]

load_library()
importlib.import_module("torch_ext._fakes")  # They are registered with the ops, which are there now.


def isa_report() -> dict[str, Any]:
    """Which kernels are in use on this CPU, and why.

    Returns:
        ``arch``; ``isa``, the kernels in use; ``candidates`` in order of priority, each with ``name``, ``supported``
        and ``requires`` (CPU features); ``cpu_features``; ``forced``, whether ``TORCH_EXT_ISA`` chose.

    Raises:
        RuntimeError: ``TORCH_EXT_ISA`` names something unknown, or something that this CPU cannot run.
    """
    return cast("dict[str, Any]", json.loads(torch.ops.torch_ext._isa_report()))


def pack_linear_weight(weight: Tensor, transposed: bool = False) -> Tensor:
    """Bring the weight of a linear layer into the order that this CPU's kernel reads it in.

    Args:
        weight: fp32 or bf16 ``[N, K]``, as in :class:`torch.nn.Linear`; fp32 is rounded to bf16. Any strides.
        transposed: whether the weight is ``[K, N]`` instead, as in ``x @ weight`` and in GPT-2's ``Conv1D``.

    Returns:
        An opaque tensor with ``shape[0] == N``, to be passed to :func:`linear`. It is valid on this kind of CPU only:
        store :func:`unpack_linear_weight` of it, never the tensor itself.

    Raises:
        RuntimeError: the weight has another dtype or number of dimensions, is not on the CPU, or requires grad.
    """
    return cast(Tensor, torch.ops.torch_ext.pack_linear_weight(weight, transposed))


def unpack_linear_weight(packed: Tensor) -> Tensor:
    """The weight that was packed.

    Args:
        packed: what :func:`pack_linear_weight` returned.

    Returns:
        bf16 ``[N, K]``, exactly the bf16 rounding of what was packed.

    Raises:
        RuntimeError: the tensor is not a packed weight, or was packed for another kind of CPU.
    """
    return cast(Tensor, torch.ops.torch_ext.unpack_linear_weight(packed))


def pack_linear_weight_int8(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Quantize the weight of a linear layer to int8, and bring it into the order that this CPU's kernel reads it in.

    Symmetric, one scale for each output: ``weight[j] = scale[j] * q[j]`` with ``q`` from -127 to 127. :func:`linear`
    quantizes the rows of its input in the same way while it reads them, adds up products exactly in 32 bits, and
    multiplies the sums by both scales. Outliers of a row, four at most, are multiplied in fp32 instead: see
    :func:`torch_ext.quantize.row_limits`.

    Args:
        weight: fp32 or bf16 ``[N, K]``, finite, to be quantized by the largest magnitude of each row; or i8 ``[N, K]``,
            already quantized. K is at most 133,144, so that sums fit into 32 bits.
        scale: fp32 ``[N]``, with an i8 weight only.

    Returns:
        An opaque tensor with ``shape[0] == N``, to be passed to :func:`linear`; valid on this kind of CPU only.

    Raises:
        ValueError: K is too large.
        RuntimeError: a shape, dtype or value does not fit, a tensor is not on the CPU, or requires grad.
    """
    # Compiled, K may be a number that no guard can look at; the op checks it, too.
    if weight.dim() == 2 and not torch.compiler.is_compiling():
        check_inputs("pack_linear_weight_int8", weight.shape[1])
    return cast(Tensor, torch.ops.torch_ext.pack_linear_weight_int8(weight, scale))


def unpack_linear_weight_int8(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 weight that was packed.

    Args:
        packed: what :func:`pack_linear_weight_int8` returned.

    Returns:
        ``q``, i8 ``[N, K]``, and ``scale``, fp32 ``[N]``, exactly as they were packed.

    Raises:
        RuntimeError: the tensor is not a packed int8 weight, or was packed for another kind of CPU.
    """
    return cast(tuple[Tensor, Tensor], torch.ops.torch_ext.unpack_linear_weight_int8(packed))


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ weight.T + bias) + residual``, with products of bf16 and sums in fp32, or in int8.

    Args:
        x: fp32 or bf16 ``[..., K]``; fp32 is rounded to bf16 while it is read, where products are computed in bf16.
            With an int8 weight every row is quantized, by its largest magnitude without outliers: see
            :func:`torch_ext.quantize.row_limits`.
        packed: the weight ``[N, K]``, from :func:`pack_linear_weight` or :func:`pack_linear_weight_int8`.
        bias: fp32 or bf16 ``[N]``.
        activation: applied in fp32, before rounding: ``none``, ``gelu`` (erf), ``gelu_tanh``, ``relu``, ``tanh``,
            ``silu``, ``quick_gelu`` (CLIP's: ``x * sigmoid(1.702 * x)``), ``sigmoid``, ``leaky_relu`` (0.01 x below 0).
        out_dtype: ``torch.float32`` or ``torch.bfloat16``; by default that of ``x``.
        residual: fp32 or bf16 ``[..., N]``, added after the activation, before rounding.

    Returns:
        ``[..., N]`` in ``out_dtype``.

    Raises:
        RuntimeError: a shape, dtype or activation does not fit, ``packed`` is not a packed weight of this CPU, or a
            tensor requires grad.
    """
    check_arguments("linear", x, packed, optional=(bias, residual))
    return cast(Tensor, torch.ops.torch_ext.linear(x, packed, bias, activation, out_dtype, residual))


def matmul(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """``a @ b`` with the rules of :func:`torch.matmul`, with sums in fp32.

    ``b`` is packed at every call, and nothing is kept: for a weight that is used again, :func:`linear` is faster.

    Args:
        a: bf16 or fp32 ``[..., M, K]`` or ``[K]``, any strides. fp32 is multiplied by PyTorch.
        b: the same dtype, ``[..., K, N]`` or ``[K]``, any strides; batch dimensions broadcast.
        out_dtype: ``torch.float32`` or ``torch.bfloat16``; by default that of the operands.

    Returns:
        ``[..., M, N]`` in ``out_dtype``, without the dimensions that a vector does not have.

    Raises:
        RuntimeError: a shape or dtype does not fit, or a tensor requires grad.
    """
    check_arguments("matmul", a, b)
    return cast(Tensor, torch.ops.torch_ext.matmul(a, b, out_dtype))


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """``a[i] @ b[i]`` for every i, as :func:`torch.bmm`, with sums in fp32; packed as in :func:`matmul`.

    Args:
        a: bf16 or fp32 ``[B, M, K]``, any strides.
        b: the same dtype, ``[B, K, N]``, any strides.

    Returns:
        ``[B, M, N]`` in the dtype of the operands.

    Raises:
        RuntimeError: a shape or dtype does not fit, or a tensor requires grad.
    """
    check_arguments("bmm", a, b)
    return cast(Tensor, torch.ops.torch_ext.bmm(a, b))


def addmm(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * (a @ b)``, as :func:`torch.addmm`, with sums in fp32; packed as in :func:`matmul`.

    Args:
        bias: bf16 or fp32, of a shape that broadcasts to ``[M, N]``.
        a: the same dtype, ``[M, K]``, any strides.
        b: the same dtype, ``[K, N]``, any strides.
        beta: factor on ``bias``, which is not read if it is 0.
        alpha: factor on the product.

    Returns:
        ``[M, N]`` in the dtype of the operands.

    Raises:
        RuntimeError: a shape or dtype does not fit, or a tensor requires grad.
    """
    check_arguments("addmm", bias, a, b)
    return cast(Tensor, torch.ops.torch_ext.addmm(bias, a, b, beta, alpha))


def varlen_attention(
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
    """Softmax attention of every sequence to itself, without padding.

    Args:
        qkv: bf16 or fp32 ``[T, 3 * H]``; a row is query, key, value, each ``num_heads * head_dim``.
        cu_seqlens: i32 ``[B + 1]``.
        num_heads: number of heads; divides H.
        scale: factor on the scores; by default ``1 / sqrt(kinds * H / num_heads)``, where ``kinds`` is 1 and the number
            of tables of positions.
        window: a token sees the tokens at most this many positions away, on either side; None for all.
        relative_bias: fp32 ``[num_heads, 2 * R + 1]``, added to scaled scores by distance: query ``i`` and key ``j`` of
            a sequence get ``relative_bias[head, clamp(j - i, -R, R) + R]``.
        position_keys: disentangled attention of DeBERTa: ``[2 * S, H]`` in the dtype of ``qkv``. Query ``i`` times row
            ``clamp(d + S, 0, 2 * S - 1)`` is added to its score for key ``j``, before ``scale``; ``d`` is ``i - j``.
        position_queries: the same with key ``j`` in place of query ``i``, and the same row.
        position_reach: 0, or the distance to which ``d`` grows by the logarithm from ``S / 2`` on.
        causal: a token sees itself and the tokens before it.
        attended: i32 ``[B]``: of each sequence the first tokens that are seen, at least one; the others see them, and
            are seen by none, not even by themselves. None: all. A token that sees none, where ``window`` leaves none of
            them, gets 0.

    Returns:
        ``[T, H]`` in the dtype of ``qkv``.

    Raises:
        RuntimeError: a shape or dtype does not fit, ``cu_seqlens`` does not go from 0 to T without falling, or ``qkv``
            requires grad.
    """
    optional = relative_bias, position_keys, position_queries, attended
    check_arguments("varlen_attention", qkv, cu_seqlens, optional=optional)
    more = relative_bias, position_keys, position_queries, position_reach, causal, attended
    return cast(Tensor, torch.ops.torch_ext.varlen_attention(qkv, cu_seqlens, num_heads, scale, window, *more))


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual_scale: Tensor | None = None,
) -> Tensor:
    """``layer_norm(x + residual_scale * residual)`` over the last dimension, computed in fp32.

    Args:
        x: bf16 or fp32 ``[T, H]``.
        residual: like ``x``, or None.
        weight: fp32 ``[H]``.
        bias: fp32 ``[H]``.
        eps: added to the variance.
        residual_scale: fp32 ``[H]``, or None for ones. Needs a residual.

    Returns:
        ``[T, H]`` in the dtype of ``x``.

    Raises:
        RuntimeError: a shape or dtype does not fit, or a tensor requires grad.
    """
    check_arguments("add_layer_norm", x, weight, bias, optional=(residual, residual_scale))
    return cast(Tensor, torch.ops.torch_ext.add_layer_norm(x, residual, weight, bias, eps, residual_scale))


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """``v / sqrt(mean(v^2) + eps) * weight`` with ``v = x + residual``, over the last dimension, computed in fp32.

    Args:
        x: bf16 or fp32 ``[T, H]``.
        residual: like ``x``, or None.
        weight: fp32 ``[H]``.
        eps: added to the mean of squares.

    Returns:
        ``[T, H]`` in the dtype of ``x``.

    Raises:
        RuntimeError: a shape or dtype does not fit, or a tensor requires grad.
    """
    check_arguments("add_rms_norm", x, weight, optional=(residual,))
    return cast(Tensor, torch.ops.torch_ext.add_rms_norm(x, residual, weight, eps))


def rotary_embedding(qkv: Tensor, cu_seqlens: Tensor, num_heads: int, cos_sin: Tensor) -> Tensor:
    """Rotary positions: every head of query and key turned by its token's position, values as they are.

    Dimensions ``i`` and ``i + D / 2`` of a head are a pair, which is turned by one angle; computed in fp32.

    Args:
        qkv: bf16 or fp32 ``[T, 3 * H]``; a row is query, key, value, each ``num_heads * D``, with D even.
        cu_seqlens: i32 ``[B + 1]``; positions start at 0 in every sequence.
        num_heads: number of heads; divides H.
        cos_sin: fp32 ``[P, D]``; row ``p`` holds the cosines of position ``p``'s D / 2 angles, then their sines.

    Returns:
        ``[T, 3 * H]`` in the dtype of ``qkv``.

    Raises:
        RuntimeError: a shape or dtype does not fit, a sequence is longer than P, or a tensor requires grad.
    """
    check_arguments("rotary_embedding", qkv, cu_seqlens, cos_sin)
    return cast(Tensor, torch.ops.torch_ext.rotary_embedding(qkv, cu_seqlens, num_heads, cos_sin))


def gate(x: Tensor, activation: Activation) -> Tensor:
    """``activation(x[:, :I]) * x[:, I:]``, a gated linear unit (GeGLU, SwiGLU) without its linear layer.

    Args:
        x: bf16 or fp32 ``[T, 2 * I]``.
        activation: as for :func:`linear`; computed in fp32.

    Returns:
        ``[T, I]`` in the dtype of ``x``.

    Raises:
        RuntimeError: a shape, dtype or activation does not fit, or ``x`` requires grad.
    """
    check_arguments("gate", x)
    return cast(Tensor, torch.ops.torch_ext.gate(x, activation))


def embed_layer_norm(
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
    """The embedding layer of a BERT: word, position and token type rows, added up and normalized.

    Args:
        input_ids: i64 ``[T]``.
        cu_seqlens: i32 ``[B + 1]``.
        token_type_ids: i64 ``[T]``, or None for type 0 everywhere.
        word: bf16 or fp32 ``[V, H]``.
        position: the same dtype, ``[P, H]``, or None for a model without; a token takes row "index in its sequence +
            position_offset".
        token_type: the same dtype, ``[S, H]``, or None for a model without.
        weight: fp32 ``[H]``.
        bias: fp32 ``[H]``.
        eps: added to the variance.
        position_offset: 0 for BERT, ``padding_idx + 1`` for RoBERTa.
        padding_id: -1 for BERT; ``padding_idx`` for RoBERTa, which counts positions over tokens with other ids: tokens
            with this one take row ``position_offset - 1``.

    Returns:
        ``[T, H]`` in the dtype of the tables.

    Raises:
        RuntimeError: a shape or dtype does not fit, an id is out of range, a sequence is longer than the position
            table, or a tensor requires grad.
    """
    optional = token_type_ids, position, token_type
    check_arguments("embed_layer_norm", input_ids, cu_seqlens, word, weight, bias, optional=optional)
    return cast(
        Tensor,
        torch.ops.torch_ext.embed_layer_norm(
            input_ids,
            cu_seqlens,
            token_type_ids,
            word,
            position,
            token_type,
            weight,
            bias,
            eps,
            position_offset,
            padding_id,
        ),
    )


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: PoolingMode | str = "mean", normalize: bool = False) -> Tensor:
    """One vector per sequence.

    Args:
        hidden: bf16 or fp32 ``[T, H]``.
        cu_seqlens: i32 ``[B + 1]``; every sequence has at least one token.
        mode: as sentence-transformers names them: ``mean`` over the tokens, ``cls`` for the first one, ``max`` per
            component, ``lasttoken``, ``weightedmean`` where token i of n counts ``i / (1 + ... + n)``,
            ``mean_sqrt_len_tokens`` for the sum divided by the square root of the number of tokens. Of several, such as
            ``cls+mean``, the vectors stand side by side.
        normalize: divide each vector by its Euclidean length.

    Returns:
        fp32 ``[B, H]``, of n modes ``[B, n * H]``.

    Raises:
        RuntimeError: a shape, dtype or mode does not fit, a sequence is empty, or ``hidden`` requires grad.
    """
    check_arguments("pool", hidden, cu_seqlens)
    if not isinstance(mode, str):
        raise TypeError(f"pool: expected the name of a mode, got {type(mode).__name__}")
    if "+" in mode:
        vectors = torch.cat([torch.ops.torch_ext.pool(hidden, cu_seqlens, part, False) for part in mode.split("+")], 1)
        return torch.nn.functional.normalize(vectors) if normalize else vectors
    return cast(Tensor, torch.ops.torch_ext.pool(hidden, cu_seqlens, mode, normalize))


def encoder_forward(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    packed: Tensor,
    fp32: bool = False,
    attended: Tensor | None = None,
) -> Tensor:
    """The forward pass of a whole encoder: no Python, no dispatch and no allocation between its layers.

    Activations are in a workspace that each thread keeps for its next call (up to 256 MiB). A batch of many texts is
    shared out among the threads in parts of at least 128 tokens, which each run through all layers on one thread; of a
    smaller one, all threads share each layer.

    Args:
        input_ids: i64 ``[T]``.
        cu_seqlens: i32 ``[B + 1]``.
        token_type_ids: i64 ``[T]``, or None for type 0 everywhere.
        packed: the encoder, u8 ``[H, bytes]``, as :class:`torch_ext.Encoder` packs it, whose ``run_reference`` is the
            same, op by op.
        fp32: whether ``packed`` is an encoder in fp32.
        attended: as for :func:`varlen_attention`.

    Returns:
        The last hidden state ``[T, H]``, bf16 or, with ``fp32``, fp32.

    Raises:
        RuntimeError: a shape or dtype does not fit, an id is out of range, a sequence is longer than the position
            table, or ``packed`` is not an encoder packed for this kind of CPU.
    """
    check_arguments("encoder_forward", input_ids, cu_seqlens, packed, optional=(token_type_ids, attended))
    return cast(
        Tensor, torch.ops.torch_ext.encoder_forward(input_ids, cu_seqlens, token_type_ids, packed, fp32, attended)
    )


def check_arguments(op: str, *tensors: Any, optional: Sequence[Any] = ()) -> None:
    """Raise for what kernels cannot refuse, or PyTorch would refuse in its dispatcher's words.

    That is what is no tensor, tensors without strides, and derivatives of ``torch.func`` and of forward mode, whose
    wrappers PyTorch takes off before it calls a kernel. What requires grad in the ordinary way, kernels refuse.

    Args:
        op: the name of what was called.
        tensors: its tensors.
        optional: those that may be None.

    Raises:
        TypeError: one of them is no tensor.
        RuntimeError: one of them is sparse, nested or being differentiated.
    """
    if torch.compiler.is_compiling():
        return
    given = (*tensors, *(tensor for tensor in optional if tensor is not None)) if optional else tensors
    for tensor in given:
        if isinstance(tensor, Tensor):
            if tensor.layout is not torch.strided or tensor.is_nested:
                what = "a nested tensor" if tensor.is_nested else str(tensor.layout)
                raise RuntimeError(f"{op}: expected tensors that are neither sparse nor nested, got {what}")
        elif not is_tensor_like(tensor):  # type: ignore[no-untyped-call]
            raise TypeError(f"{op}: expected a torch.Tensor, got {type(tensor).__name__}")
    if forward_ad._current_level < 0 and torch._C._functorch.maybe_current_level() is None:
        return
    for tensor in given:
        if tensor.is_floating_point() and _is_differentiated(tensor):
            raise RuntimeError(
                f"{op}: an argument is being differentiated, by torch.func or in forward mode, but torch_ext is for "
                "inference only and has no gradients: call it under torch.no_grad(), or pass tensor.detach()"
            )


def _is_differentiated(tensor: Tensor) -> bool:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        return True
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor) and torch.is_grad_enabled():
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def layer_weight(packed: Tensor, columns: int, dtype: torch.dtype, is_int8: bool) -> Tensor:
    """The weight ``[N, columns]`` that was packed for a :class:`torch_ext.PackedLinear`, in ``dtype``."""
    unpacked = dequantize_weight(*unpack_linear_weight_int8(packed)) if is_int8 else unpack_linear_weight(packed)
    return unpacked.to(dtype)


# The same as an op whose shapes are known while torch.compile traces: what reads only dtype or shape of a weight then
# leaves nothing in the compiled code.
_library = torch.library.Library("torch_ext", "FRAGMENT")  # type: ignore[no-untyped-call]
_schema = "_layer_weight(Tensor packed, int columns, ScalarType dtype, bool is_int8) -> Tensor"
_library.define(_schema)  # type: ignore[no-untyped-call]
_library.impl("_layer_weight", layer_weight, "CPU")  # type: ignore[no-untyped-call]


def _fake_layer_weight(packed: Tensor, columns: int, dtype: torch.dtype, is_int8: bool) -> Tensor:
    return packed.new_empty((packed.shape[0], columns), dtype=dtype)


torch.library.register_fake("torch_ext::_layer_weight", _fake_layer_weight, lib=_library)


# PyTorch's counter takes time to import, seconds where it brings triton along: our formulas wait for it.
when_imported("torch.utils.flop_counter", lambda counter: importlib.import_module("torch_ext.flops").register(counter))
