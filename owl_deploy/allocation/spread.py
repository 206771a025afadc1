"""Sparsities in a range around a target, by importance: what OWL, DLP and a linear profile have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Nothing is emptied: the rest of a block's path (norms, residual) was never meant to run without its linears.
_MAX_SPARSITY = 0.99


def spread_by_importance(
    importance: Sequence[float], sparsity: float, half_range: float, weights: Sequence[int]
) -> list[float]:
    """`d = minmax(importance) * 2 half_range`, `S_b = 1 - (d_b - mean(d) + (1 - S))`: the more important, the denser.

    The mean is over weights, so that the sparsity asked for is the one delivered. Equal importances give the uniform
    allocation. Where the formula leaves [0, 1), sparsities are clipped and the excess is spread over the others.

    Args:
        importance: of each block (or linear), in any unit.
        sparsity: S, the global sparsity, in [0, 1).
        half_range: half the width of the range of sparsities; it is centred on the mean of d, not on S.
        weights: number of weights of each.
    """
    values = np.asarray(importance, dtype=np.float64)
    width = values.max() - values.min()
    d = (values - values.min()) / width * 2 * half_range if width > 0 else np.zeros_like(values)
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    return fit_to_range(1 - (d - d @ share + (1 - sparsity)), sparsity, share).tolist()  # type: ignore[no-any-return]


def fit_to_range(sparsities: NDArray[np.float64], target: float, share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Clip sparsities to [0, 0.99] and shift them all so that their mean, weighted by `share`, stays `target`.

    Sparsities already in range come back unchanged.
    """
    high = max(_MAX_SPARSITY, target)
    if sparsities.min() >= 0 and sparsities.max() <= high:
        return sparsities
    below, above = -sparsities.max(), high - sparsities.min()  # shifts that clip every block at 0, or at `high`
    for _ in range(100):  # bisection: the mean of the clipped values rises with the shift
        shift = (below + above) / 2
        if np.clip(sparsities + shift, 0, high) @ share < target:
            below = shift
        else:
            above = shift
    fitted: NDArray[np.float64] = np.clip(sparsities + (below + above) / 2, 0, high)
    return fitted
