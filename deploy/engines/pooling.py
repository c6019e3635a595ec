"""From padded hidden states to one vector per text, in every mode of a bundle."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "pool_padded", "shortened"]

Floats = npt.NDArray[np.float32]


def _shares(mode: str, lengths: npt.NDArray[np.int64], longest: int, skipped: int) -> Floats:
    """What each token counts for in the vector of its text, f32 [texts, longest]; padding counts for nothing."""
    places = np.arange(longest)
    here = (places >= skipped) & (places < lengths[:, None])
    sizes = np.maximum(lengths[:, None] - skipped, 1).astype(np.float64)
    if mode == "weightedmean":
        # Later tokens have seen more of the text in a model that reads from left to right.
        shares = (places + 1) / (sizes * (skipped + 1 + lengths[:, None]) / 2)
    elif mode == "mean_sqrt_len_tokens":
        shares = 1 / np.sqrt(sizes)
    else:
        shares = 1 / sizes
    return np.where(here, shares, 0.0).astype(np.float32)


def pool_padded(hidden: Floats, lengths: npt.NDArray[np.int64], mode: str, skipped: int = 0) -> Floats:
    """Vectors of padded texts, not normalised, f32 [texts, width].

    Args:
        hidden: Hidden states f32 [texts, longest, width]; padding follows the tokens.
        lengths: Tokens of each text, i64 [texts], at least 1.
        mode: One of the bundle's pooling modes, or several joined by `+`: their vectors stand side by side.
        skipped: Leading tokens of each text that do not count; a text without others becomes 0.
    """
    parts = [_pooled(hidden, lengths, part, skipped) for part in mode.split("+")]
    vectors = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    return np.where((lengths > skipped)[:, None], vectors, np.float32(0)) if skipped else vectors


def _pooled(hidden: Floats, lengths: npt.NDArray[np.int64], mode: str, skipped: int) -> Floats:
    if mode == "cls":
        return hidden[:, min(skipped, hidden.shape[1] - 1)]
    if mode == "lasttoken":
        return hidden[np.arange(len(lengths)), lengths - 1]
    if mode == "max":
        places = np.arange(hidden.shape[1])
        here = (places >= skipped) & (places < lengths[:, None])
        return np.asarray(np.where(here[..., None], hidden, -np.inf).max(axis=1), np.float32)
    shares = _shares(mode, lengths, hidden.shape[1], skipped)
    return np.asarray(np.matmul(shares[:, None], hidden)[:, 0])


def shortened(vectors: Floats, normalize: bool, dimensions: int | None) -> Floats:
    """The vectors' leading dimensions, of length 1 if wanted; NaN where the length is more than fp32 holds.

    Args:
        vectors: f32 [texts, width].
        normalize: Divide each by its L2 norm.
        dimensions: How many to keep; None: all.
    """
    kept = vectors[:, :dimensions]
    if normalize:
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("ij,ij->i", kept, kept))
        kept = kept / np.where(np.isfinite(norms), np.maximum(norms, np.float32(1e-12)), np.float32(np.nan))[:, None]
    return np.ascontiguousarray(kept, np.float32)
