"""How many bits a weight of a pruned model takes."""

from __future__ import annotations

from collections.abc import Sequence

from owl_deploy.pruning.manifest import BlockRecord, LinearRecord
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.rounding import GRIDS, Rounded

UNROUNDED_BITS = 16
"""Of a weight that is on no grid, whatever dtype its checkpoint is in."""


def bits_per_weight(plan: PruningPlan, blocks: Sequence[BlockRecord]) -> float:
    """Mean over the weights of the blocks' linears, masks and scales included.

    A linear of which nothing was to be pruned is stored dense: weights that rounding made 0 do not make it sparse.
    """
    bits = sum(
        _bits(one, plan.weights_of(f"{block.name}.{one.name}")) * one.shape[0] * one.shape[1]
        for block in blocks
        for one in block.linears
    )
    return bits / sum(block.weights for block in blocks)


def _bits(linear: LinearRecord, weights: Rounded | None) -> float:
    sparsity = linear.sparsity_achieved if linear.sparsity_asked > 0 else 0.0
    if weights is not None:
        return GRIDS[weights].bits_per_weight(sparsity, linear.shape[1])
    return 1 + (1 - sparsity) * UNROUNDED_BITS if sparsity > 0 else UNROUNDED_BITS
