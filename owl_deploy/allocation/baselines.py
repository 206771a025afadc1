"""The allocations that OWL is compared with (paper, appendix B), and those that came after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from owl_deploy.allocation.spread import spread_by_importance


def owl_inverse_sparsities(
    lod: Sequence[float], sparsity: float, owl_lambda: float, weights: Sequence[int]
) -> list[float]:
    """OWL with 1 - D in place of D: blocks with more outliers are pruned more (paper, Table 4)."""
    return spread_by_importance([1 - value for value in lod], sparsity, owl_lambda, weights)


def dlp_sparsities(
    mean_scores: Sequence[float], sparsity: float, half_range: float, weights: Sequence[int]
) -> list[float]:
    """DLP (Chen et al. 2025, arXiv 2505.23807): blocks whose scores are larger on the mean are pruned more.

    A block's importance is `1 - mean(A_b) / sum over blocks of mean(A)`, and takes the place of OWL's D; the sum drops
    out of it.

    Args:
        mean_scores: the mean of the outlier scores A of each block.
        half_range: DLP's alpha; 0.15 is published.
    """
    return spread_by_importance([-score for score in mean_scores], sparsity, half_range, weights)


def linear_sparsities(sparsity: float, half_range: float, weights: Sequence[int]) -> list[float]:
    """ATP (2024): sparsity rises linearly with depth, from S - `half_range` to S + `half_range`."""
    return spread_by_importance([-float(depth) for depth in range(len(weights))], sparsity, half_range, weights)


def erdos_renyi_sparsities(
    shapes: Sequence[tuple[int, int]], sparsity: float, *, dense: Sequence[int] = ()
) -> list[float]:
    """Erdős-Rényi: the density of a linear is proportional to `(n_in + n_out) / (n_in * n_out)`, and at most 1.

    Args:
        shapes: (n_out, n_in) of every linear.
        dense: positions of linears that stay dense, as ER-plus keeps the last one; the others are the sparser for it.

    Returns:
        The sparsity of each linear; their mean over weights is `sparsity`, or as near as the dense ones leave room.
    """
    size = np.array([rows * columns for rows, columns in shapes], dtype=np.float64)
    raw = np.array([(rows + columns) / (rows * columns) for rows, columns in shapes])
    fixed = np.isin(np.arange(len(shapes)), list(dense))
    kept = (1 - sparsity) * size.sum()
    if kept <= size[fixed].sum():  # not even the dense ones can be kept whole
        return [sparsity] * len(shapes)
    low, high = 0.0, 1 / raw.min()
    for _ in range(100):  # bisection: what is kept rises with the factor
        factor = (low + high) / 2
        density = np.where(fixed, 1.0, np.minimum(1.0, factor * raw))
        low, high = (factor, high) if density @ size < kept else (low, factor)
    return (1 - np.where(fixed, 1.0, np.minimum(1.0, high * raw))).tolist()  # type: ignore[no-any-return]
