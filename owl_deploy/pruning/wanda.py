"""Wanda (Sun et al. 2023): prune by weight times input norm, row by row."""

from __future__ import annotations

import torch

from owl_deploy.pruning.plan import NM
from owl_deploy.pruning.selection import smallest_of_each_group, smallest_per_row


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
