"""What int8 layers read, brought to channels of similar range: exact for the encoder, easier to quantize.

A row is quantized with one scale, that of its largest element. In BERT-family models a few channels of the norms'
output are many times larger than the others, always the same ones, and cost all others their precision. So the norm
writes ``x' = (x - c) / s`` instead of ``x``, with a vector ``c`` and a vector ``s``, and everything that reads it is
changed to match; for the linear layer that reads it that is ``W' = W * s`` and ``b' = b + W c``. Weights are
quantized per output, and have precision to spare. The residual that is added after the layer is ``s * x' + c``: ``s``
becomes ``residual_scale``, which the next norm multiplies with while it adds, and ``c`` goes into the bias that is
added anyway.

``c`` is the mean of a channel and ``s`` the 0.75th power of its range, over texts of random tokens: what the channels
look like is a matter of the model far more than of the text, so no texts are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torch_ext.encoder.spec import EncoderSpec

__all__ = ["Observe", "balance", "random_texts"]

Observe = Callable[[str, Tensor], None]
"""Called with the name of a linear layer and its input, ``[T, K]``."""

_EXPONENT = 0.75
_LEAST_RANGE = 0.05
"""Of the mean range: channels that hardly move are not blown up."""

_TEXTS = 96
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)


def random_texts(spec: EncoderSpec) -> tuple[Tensor, Tensor]:
    """Texts of random tokens, the same ones at every call.

    Args:
        spec: of the encoder.

    Returns:
        ``input_ids``, i64 ``[T]``, and ``cu_seqlens``, i32 ``[B + 1]``.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [min(_LENGTHS[index % len(_LENGTHS)], spec.max_positions) for index in range(_TEXTS)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.randint(spec.vocab_size, (sum(lengths),), generator=generator), bounds


def balance(spec: EncoderSpec, weights: Mapping[str, Tensor], run: Callable[[Observe], object]) -> dict[str, Tensor]:
    """The weights of the same encoder with balanced inputs of its linear layers.

    Args:
        spec: of the encoder.
        weights: fp32 or bf16, by the names of ``spec.shapes()``; not balanced yet.
        run: runs the encoder with ``weights`` on some texts, and calls what it is given with the input of every linear
            layer that reads a norm.

    Returns:
        The weights, those that changed in fp32; with ``residual_scale`` of every layer if norms come after residuals.
    """
    seen: dict[str, Tensor] = {}  # mean, least, largest of every channel

    def observe(name: str, x: Tensor) -> None:
        x = x.float()
        seen[name] = torch.stack([x.mean(0), x.amin(0), x.amax(0)])

    run(observe)
    result = dict(weights)

    for name, (center, least, largest) in seen.items():
        source = _source(spec, name)
        if source is None:
            continue
        if spec.rms_norm:  # which has no bias to move channels with
            center = torch.zeros_like(center)
        reach = torch.maximum(largest - center, center - least)
        reach = reach.clamp_min(_LEAST_RANGE * float(reach.mean())).clamp_min(1e-30)
        scale = (reach / reach.log().mean().exp()) ** _EXPONENT
        weight, bias = (result[f"{name}.{kind}"].float() for kind in ("weight", "bias"))
        result[f"{name}.weight"], result[f"{name}.bias"] = weight * scale, bias + weight @ center
        weight = result[f"{source}.weight"].float()
        # A norm's weight is a vector; that of a linear layer has a row for each channel.
        result[f"{source}.weight"] = weight / (scale if weight.dim() == 1 else scale[:, None])
        if not spec.rms_norm:
            result[f"{source}.bias"] = (result[f"{source}.bias"].float() - center) / scale
        after = None if spec.norm_first else _adds_residual(name)
        if after is not None:
            result[f"{after}.bias"] = result[f"{after}.bias"].float() + center
            result[f"{after.rpartition('.')[0]}.residual_scale"] = scale
    return result


def _source(spec: EncoderSpec, name: str) -> str | None:
    """The layer whose output the linear layer ``name`` reads, and nobody else but a residual; None if there is none."""
    if name == "embeddings.projection":
        return "embeddings.norm"
    prefix, index = name.rpartition(".")[0], int(name.split(".")[1])
    if spec.norm_first:
        # Without a norm of its own the first layer reads what the residual stream holds.
        return f"{prefix}.norm" if index or spec.norm_first_attention or name.endswith("ffn.up") else None
    if name.endswith("ffn.up"):
        return f"layers.{index}.attention.norm"
    if index:
        return f"layers.{index - 1}.ffn.norm"
    return "embeddings.projection" if spec.embedding_size else "embeddings.norm"


def _adds_residual(name: str) -> str | None:
    """The linear layer after which the input of ``name`` is added."""
    if name == "embeddings.projection":
        return None
    return f"{name.rpartition('.')[0]}.{'down' if name.endswith('ffn.up') else 'out'}"
