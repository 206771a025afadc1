"""OWL: blocks with more outliers are pruned less (paper, section 2.2, equation 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

# No block is emptied: the rest of a block's path (norms, residual) was never meant to run without its linears.
_MAX_SPARSITY = 0.99


def outlier_percent(scores: Iterable[torch.Tensor], m: float) -> float:
    """Layerwise Outlier Distribution of one block: `D = 100 * mean(A > M * mean(A))`.

    Args:
        scores: the outlier scores `A = |W| * ||X||_2` of each of its linears, taken together as one.
        m: the paper's M, how many times the mean an outlier exceeds.

    Returns:
        Percent of the block's weights that are outliers.
    """
    flat = torch.cat([score.flatten() for score in scores])
    return 100.0 * (flat > m * flat.mean()).sum().item() / flat.numel()


def owl_sparsities(lod: Sequence[float], sparsity: float, owl_lambda: float, weights: Sequence[int]) -> list[float]:
    """Block sparsities from the LOD: `d = minmax(D) * 2 lambda`, `S_b = 1 - (d_b - mean(d) + (1 - S))`.

    This is the published code's formula. Its mean is taken over blocks; ours is over weights, which is the same
    for blocks of equal size and delivers the sparsity asked for when they differ. Equal LODs give the uniform
    allocation (the published code divides by zero). Where the formula leaves [0, 1), sparsities are clipped and
    the excess is spread over the other blocks (the published code clamps to 0.01 and misses its target).

    Args:
        lod: D of each block of the dense model, percent (any unit will do).
        sparsity: S, the global sparsity, in [0, 1).
        owl_lambda: half the width of the range of sparsities. The range is centred on the mean of d, so it can
            leave the [S - lambda, S + lambda] that the paper promises.
        weights: number of weights in each block.
    """
    D = np.asarray(lod, dtype=np.float64)
    spread = D.max() - D.min()
    d = (D - D.min()) / spread * 2 * owl_lambda if spread > 0 else np.zeros_like(D)
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    return fit_to_range(1 - (d - d @ share + (1 - sparsity)), sparsity, share).tolist()  # type: ignore[no-any-return]


def fit_to_range(sparsities: NDArray[np.float64], target: float, share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Clip sparsities to [0, 0.99] and shift them all so that their mean, weighted by `share`, stays `target`.

    Sparsities already in range come back unchanged.
    """
    high = max(_MAX_SPARSITY, target)
    if sparsities.min() >= 0 and sparsities.max() <= high:
        return sparsities
    below, above = (
        -sparsities.max(),
        high - sparsities.min(),
    )  # shifts that clip every block at 0, or at `high`
    for _ in range(100):  # bisection: the mean of the clipped values rises with the shift
        shift = (below + above) / 2
        if np.clip(sparsities + shift, 0, high) @ share < target:
            below = shift
        else:
            above = shift
    fitted: NDArray[np.float64] = np.clip(sparsities + (below + above) / 2, 0, high)
    return fitted
