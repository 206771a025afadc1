"""The grid of every linear, where a plan leaves it to OWL or names blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from owl_deploy.allocation.precision import equal_shares
from owl_deploy.errors import UserError
from owl_deploy.files import write_json
from owl_deploy.models.structure import Block
from owl_deploy.pruning.allocate import outlier_percents
from owl_deploy.pruning.calibration.dense import DenseStatistics
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.weights import BlockWeights
from owl_deploy.rounding import Rounded

GRIDS_FILE = "weights.json"


def with_grids(
    plan: PruningPlan, blocks: Sequence[Block], weights: BlockWeights, dense: DenseStatistics | None
) -> PruningPlan:
    """The plan with a grid for every linear in place of a mix of grids, or of names of blocks; others as they are.

    Args:
        dense: needed for a mix, which OWL shares out.

    Raises:
        UserError: a name is not of this model, a linear has no grid, or a mix has more grids than there are blocks.
    """
    if plan.mix is not None:
        if dense is None:
            raise ValueError("a mix is shared out by outlier scores")
        if len(plan.mix) > len(blocks):
            raise UserError(f"a mix of {len(plan.mix)} grids: this model has {len(blocks)} blocks")
        taken = equal_shares(outlier_percents(blocks, weights, dense, plan.owl_m), len(plan.mix))
        return replace(plan, mix=None, linear_weights=by_linear(blocks, [plan.mix[option] for option in taken]))
    if plan.linear_weights is not None:
        return replace(plan, linear_weights=_expanded(plan.linear_weights, blocks))
    return plan


def write_grids(plan: PruningPlan, blocks: Sequence[Block], directory: Path) -> None:
    """Write the grid of each block as `weights.json`, which `--weights` reads."""
    write_json(
        directory / GRIDS_FILE,
        {block.name: plan.weights_of(block.full_name(name)) for block in blocks for name in block.linears},
    )


def by_linear(blocks: Sequence[Block], grids: Sequence[Rounded]) -> dict[str, Rounded]:
    """One grid for each block, as one for each linear, by full name."""
    return {block.full_name(name): grid for block, grid in zip(blocks, grids, strict=True) for name in block.linears}


def _expanded(given: dict[str, Rounded], blocks: Sequence[Block]) -> dict[str, Rounded]:
    """A linear's own grid comes before its block's."""
    names = {block.full_name(name): block.name for block in blocks for name in block.linears}
    if unknown := sorted(given.keys() - names.keys() - set(names.values())):
        raise UserError(f"--weights: {unknown[0]} is no block of this model, and no linear of one")
    if missing := [name for name, block in names.items() if not given.keys() & {name, block}]:
        raise UserError(
            f"--weights: none were given for {missing[0]} ({len(missing)} of {len(names)} linears lack them)"
        )
    return {name: given.get(name) or given[block] for name, block in names.items()}
