"""RIA (Zhang et al. 2024): a weight's share of its row and of its column, times the input norm."""

from __future__ import annotations

import torch

_POWER = 0.5
"""The paper's a."""


def ria_scores(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """`(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2 ** a`, with a = 1/2.

    A row or column of zeros has no shares to give: its weights score 0.

    Args:
        weight: [out, in], fp32.
        mean_square: as for Wanda, [in].
    """
    size = weight.abs()
    shares = size / size.sum(dim=0, keepdim=True) + size / size.sum(dim=1, keepdim=True)
    return shares.nan_to_num(0.0) * mean_square.sqrt() ** _POWER
