"""OWL: blocks with more outliers are pruned less (paper, section 2.2, equation 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from owl_deploy.allocation.spread import spread_by_importance


def outlier_percent(scores: Iterable[torch.Tensor], m: float, *, mean: float | None = None) -> float:
    """Layerwise Outlier Distribution of one block: `D = 100 * mean(A > M * mean(A))`.

    Args:
        scores: the outlier scores `A = |W| * ||X||_2` of each of its linears, taken together as one.
        m: the paper's M, how many times the mean an outlier exceeds.
        mean: the mean to compare with, in place of their own: for a pruned block, the dense one's (paper, Table 2).

    Returns:
        Percent of the block's weights, zeros among them, that are outliers.
    """
    flat = _joined([score.flatten() for score in scores])
    threshold = m * (flat.mean() if mean is None else mean)
    # sum() would make an int64 of each first
    return 100.0 * torch.count_nonzero(flat > threshold).item() / flat.numel()


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """`torch.cat(parts)`, which lets go of each part once it is there: a block's scores are not in memory twice."""
    whole = parts[0].new_empty(sum(part.numel() for part in parts))
    start = 0
    while parts:
        part = parts.pop(0)
        whole[start : start + part.numel()] = part
        start += part.numel()
    return whole


def owl_sparsities(lod: Sequence[float], sparsity: float, owl_lambda: float, weights: Sequence[int]) -> list[float]:
    """Block sparsities from the LOD: `d = minmax(D) * 2 lambda`, `S_b = 1 - (d_b - mean(d) + (1 - S))`.

    This is the published code's formula (`spread_by_importance` computes it). Its mean is taken over blocks; ours is
    over weights, which is the same for blocks of equal size and delivers the sparsity asked for when they differ.
    Equal LODs give the uniform allocation (the published code divides by zero). Where the formula leaves [0, 1),
    sparsities are clipped and the excess is spread over the other blocks (the published code clamps to 0.01 and
    misses its target).

    Args:
        lod: D of each block of the dense model, percent (any unit will do).
        sparsity: S, the global sparsity, in [0, 1).
        owl_lambda: half the width of the range of sparsities. The range is centred on the mean of d, so it can
            leave the [S - lambda, S + lambda] that the paper promises.
        weights: number of weights in each block.
    """
    return spread_by_importance(lod, sparsity, owl_lambda, weights)
