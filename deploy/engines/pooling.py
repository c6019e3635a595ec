"""From hidden states to one vector per text, in every mode of a bundle; padded and packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pool_packed", "pool_padded"]

Floats = npt.NDArray[np.float32]


def _shares(mode: str, lengths: npt.NDArray[np.int64], longest: int) -> Floats:
    """What each token counts for in the vector of its text, f32 [texts, longest]; padding counts for nothing."""
    places = np.arange(longest)
    sizes = lengths[:, None].astype(np.float64)
    if mode == "weightedmean":
        # Later tokens have seen more of the text in a model that reads from left to right.
        shares = (places + 1) / (sizes * (sizes + 1) / 2)
    elif mode == "mean_sqrt_len_tokens":
        shares = 1 / np.sqrt(sizes)
    else:
        shares = 1 / sizes
    return np.where(places < sizes, shares, 0.0).astype(np.float32)


def pool_padded(hidden: Floats, lengths: npt.NDArray[np.int64], mode: str) -> Floats:
    """Vectors of padded texts, not normalised, f32 [texts, width].

    Args:
        hidden: Hidden states f32 [texts, longest, width]; padding follows the tokens.
        lengths: Tokens of each text, i64 [texts], at least 1.
        mode: One of the bundle's pooling modes.
    """
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden[np.arange(len(lengths)), lengths - 1]
    if mode == "max":
        here = np.arange(hidden.shape[1]) < lengths[:, None]
        return np.asarray(np.where(here[..., None], hidden, -np.inf).max(axis=1), np.float32)
    shares = _shares(mode, lengths, hidden.shape[1])
    return np.asarray(np.matmul(shares[:, None], hidden)[:, 0])


def pool_packed(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    """Vectors of packed texts, not normalised, fp32 [texts, width].

    torch_ext has kernels for `mean`, `cls` and `max`; the others are made of `mean`.

    Args:
        hidden: Hidden states bf16 or fp32 [tokens, width].
        cu_seqlens: i32 [texts + 1].
        mode: One of the bundle's pooling modes.
    """
    import torch

    import torch_ext

    if mode in {"mean", "cls", "max"}:
        kernel: Any = mode
        return torch_ext.pool(hidden, cu_seqlens, mode=kernel)
    if mode == "lasttoken":
        return hidden.index_select(0, cu_seqlens[1:] - 1).float()
    lengths = cu_seqlens.diff()
    if mode == "weightedmean":
        starts, counts = cu_seqlens[:-1].long(), lengths.long()
        place = torch.arange(len(hidden)) - torch.repeat_interleave(starts, counts)
        share = 2 * (place + 1) / torch.repeat_interleave(counts + 1, counts)
        return torch_ext.pool(hidden.float() * share[:, None], cu_seqlens)
    return torch_ext.pool(hidden, cu_seqlens) * lengths.sqrt()[:, None]
