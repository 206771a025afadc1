"""Magnitude pruning (Han et al. 2015, as Wanda's code runs it): the smallest weights of each linear go."""

from __future__ import annotations

import torch

from owl_deploy.pruning.methods.selection import smallest_of_each_group, smallest_of_layer
from owl_deploy.pruning.plan import NM


def magnitude_mask(weight: torch.Tensor, sparsity: float, pattern: NM | None = None) -> torch.Tensor:
    """Which weights of one linear to zero: `|W| <= sorted(|W|)[int(numel * s)]`, or the N smallest of every M.

    Args:
        weight: [out, in], fp32.
        sparsity: fraction of the linear's weights, in [0, 1); 0 prunes nothing. Ignored with a `pattern`.

    Returns:
        bool [out, in], true where pruned.
    """
    scores = weight.abs()
    return smallest_of_layer(scores, sparsity) if pattern is None else smallest_of_each_group(scores, pattern)
