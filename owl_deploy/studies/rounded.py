"""The dense model with every block rounded to a precision of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from owl_deploy.allocation.precision import equal_shares
from owl_deploy.errors import UserError
from owl_deploy.models.structure import Block, matrix_of, set_matrix
from owl_deploy.pruning.allocate import outlier_percents
from owl_deploy.pruning.calibration.dense import DenseStatistics
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.precision import by_linear
from owl_deploy.pruning.weights import BlockWeights
from owl_deploy.rounding import Rounded, rounded_asymmetrically
from owl_deploy.studies.cells import Precision


def options_of(
    precision: Precision, blocks: Sequence[Block], weights: BlockWeights, dense: DenseStatistics, m: float
) -> list[int | Rounded]:
    """What each block takes; `m` is OWL's.

    Raises:
        UserError: there are more options than blocks.
    """
    options, count = precision.options, len(precision.options)
    if count > len(blocks):
        raise UserError(f"a mix of {count} precisions: this model has {len(blocks)} blocks")
    if count == 1:
        importance = [0.0] * len(blocks)
    elif precision.by == "owl":
        importance = outlier_percents(blocks, weights, dense, m)
    elif precision.by == "l1":
        importance = [_mean_magnitude(block, weights) for block in blocks]
    else:
        importance = np.random.default_rng(precision.seed).permutation(len(blocks)).tolist()
    return [options[taken] for taken in equal_shares(importance, count)]


def with_options(plan: PruningPlan, blocks: Sequence[Block], options: Sequence[int | Rounded]) -> PruningPlan:
    """The plan with a grid for every linear, if the options are grids."""
    grids = [option for option in options if not isinstance(option, int)]
    return replace(plan, linear_weights=by_linear(blocks, grids)) if grids else plan


@torch.no_grad()
def round_to_nearest(blocks: Sequence[Block], options: Sequence[int | Rounded]) -> float | None:
    """Round by the paper's quantiser, in place, if the options are numbers of bits; their mean over weights."""
    bits = [option for option in options if isinstance(option, int)]
    if not bits:
        return None
    for block, width in zip(blocks, bits, strict=True):
        for linear in block.linears.values():
            set_matrix(linear, rounded_asymmetrically(matrix_of(linear).float(), width).contiguous())
    sizes = [block.weights for block in blocks]
    return float(np.average(bits, weights=sizes))


@torch.no_grad()
def _mean_magnitude(block: Block, weights: BlockWeights) -> float:
    with weights.held(block):
        total = sum(float(matrix_of(linear).abs().sum(dtype=torch.float64)) for linear in block.linears.values())
    return total / block.weights
