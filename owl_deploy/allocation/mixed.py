"""Mixed N:M: how many of every M weights each block gives up (paper, appendix E.1, Table 10)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_NEARER = 1e-9
"""Less is rounding."""


def mixed_counts(lod: Sequence[float], prune: int, of: int, strength: float, weights: Sequence[int]) -> list[int]:
    """`r = round(minmax(D) * strength - mean)`, half to even; block b prunes `prune - r_b` of every `of`.

    Counts are kept within 1 to `of` - 1. Where the rounded ones miss the average, which the published code accepts,
    the blocks that were rounded farthest move by one, until the mean over weights is as near to `prune` as it gets.

    Args:
        lod: D of each block of the dense model.
        strength: how many counts the range spans; 2 is published.
        weights: number of weights in each block.
    """
    D = np.asarray(lod, dtype=np.float64)
    width = D.max() - D.min()
    ratio = (D - D.min()) / width * strength if width > 0 else np.zeros_like(D)
    exact = prune - (ratio - ratio.mean())
    counts = np.clip(prune - np.round(ratio - ratio.mean()), 1, of - 1).astype(int)
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    while True:
        off = float(counts @ share - prune)
        step = -1 if off > 0 else 1
        free = (counts + step >= 1) & (counts + step <= of - 1) & (np.abs(off + step * share) < abs(off) - _NEARER)
        if not free.any():
            return counts.tolist()  # type: ignore[no-any-return]
        rounded_by = (counts - exact) * -step  # how far rounding carried a block away from where it now may go
        counts[int(np.argmax(np.where(free, rounded_by, -np.inf)))] += step
