"""Choosing the smallest scores: of a row, of a matrix, of every M."""

from __future__ import annotations

import numpy as np
import torch

from owl_deploy.pruning.plan import NM


def kth_smallest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Element `k` (from 0) of each sorted row: [rows, columns] fp32 -> [rows, 1].

    On a CPU, numpy's vectorised partition is several times faster than torch's sort.
    """
    if scores.device.type != "cpu":
        return scores.kthvalue(k + 1, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(scores.numpy(), k, axis=1)[:, k : k + 1])


def smallest_per_row(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the first `count` of each row in a stable ascending sort: among equals the leftmost.

    Args:
        scores: [rows, columns], fp32, without NaN.

    Returns:
        bool [rows, columns].
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = kth_smallest(scores, count - 1)
    below, ties = scores < threshold, scores == threshold
    missing = count - below.sum(dim=1, keepdim=True, dtype=torch.int32)  # in int64, twice the scores' memory
    return below | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= missing))


def smallest_of_layer(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Mark by one threshold for all rows, as published: `scores <= sorted(scores)[int(numel * s)]`.

    Equal scores at the threshold all go, one weight more than `sparsity` says at least; at 0 none does.

    Returns:
        bool [rows, columns].
    """
    if sparsity == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores <= kth_smallest(scores.flatten()[None], int(scores.numel() * sparsity))


def smallest_of_each_group(scores: torch.Tensor, pattern: NM) -> torch.Tensor:
    """Mark the N smallest of every M consecutive columns; a ragged last group gives up its rounded share.

    Args:
        scores: [rows, columns], fp32.

    Returns:
        bool [rows, columns].
    """
    rows, columns = scores.shape
    whole = columns - columns % pattern.of
    groups = scores[:, :whole].reshape(-1, pattern.of)
    mask = smallest_per_row(groups, pattern.prune).reshape(rows, whole)
    rest = scores[:, whole:]
    count = round(rest.shape[1] * pattern.prune / pattern.of)
    return torch.cat([mask, smallest_per_row(rest.contiguous(), count)], dim=1) if rest.numel() else mask
