"""Wanda (Sun et al. 2023): prune by weight times input norm, row by row."""

from __future__ import annotations

import torch

from owl_deploy.pruning.methods.selection import smallest_of_each_group, smallest_per_row
from owl_deploy.pruning.plan import NM

_FIRST_ALPHA, _LAST_ALPHA = 0.4, 0.8
_TOLERANCE = 0.001


def wanda_scores(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """The metric, which is also OWL's outlier score: `A_ij = |W_ij| * ||X_j||_2`.

    Args:
        weight: [out, in], fp32.
        mean_square: `s_j`, the sum over tokens of `x_j ** 2` per calibration sequence, [in], fp32.
    """
    return weight.abs() * mean_square.sqrt()


def wanda_mask(
    weight: torch.Tensor, mean_square: torch.Tensor, sparsity: float, pattern: NM | None = None
) -> torch.Tensor:
    """Which weights to zero: the `int(columns * s)` smallest scores of each output row, or N of every M.

    The count is floored, as published, so what is achieved can fall short of `sparsity` by less than 1 / columns.

    Returns:
        bool [out, in], true where pruned.
    """
    scores = wanda_scores(weight, mean_square)
    if pattern is not None:
        return smallest_of_each_group(scores, pattern)
    return smallest_per_row(scores, int(scores.shape[1] * sparsity))


def wanda_variant_mask(weight: torch.Tensor, mean_square: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Wanda's variant: each row gives up what makes up the same share alpha of its scores' sum.

    Alpha is bisected in [0, 0.8] from 0.4 until `sparsity` is met within 0.001, as published; where no alpha meets it
    (a few large scores hold most of a row's sum), the nearest one is taken.

    Returns:
        bool [out, in], true where pruned.
    """
    scores = wanda_scores(weight, mean_square)
    if sparsity == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ascending = scores.sort(dim=1).values
    sums, totals = ascending.cumsum(dim=1), scores.sum(dim=1, keepdim=True)
    alpha, low, high = _FIRST_ALPHA, 0.0, _LAST_ALPHA
    while True:
        count = (sums <= totals * alpha).sum(dim=1, keepdim=True)
        threshold = ascending.gather(1, (count - 1).clamp(min=0))
        mask = (scores <= threshold) & (count > 0)
        found = mask.float().mean().item()
        if abs(found - sparsity) <= _TOLERANCE or high - low < _TOLERANCE:
            return mask
        low, high = (low, alpha) if found > sparsity else (alpha, high)
        alpha = (low + high) / 2
