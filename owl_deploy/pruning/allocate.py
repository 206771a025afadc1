"""How sparse each linear becomes, by the plan's allocation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from owl_deploy.allocation.baselines import (
    dlp_sparsities,
    erdos_renyi_sparsities,
    linear_sparsities,
    owl_inverse_sparsities,
)
from owl_deploy.allocation.mixed import mixed_counts
from owl_deploy.allocation.owl import outlier_percent, owl_sparsities
from owl_deploy.allocation.threshold import global_threshold
from owl_deploy.errors import UserError
from owl_deploy.models.structure import Block, matrix_of
from owl_deploy.pruning.calibration.dense import DenseStatistics
from owl_deploy.pruning.plan import NM, BlockShare, MixedNM, PruningPlan
from owl_deploy.pruning.weights import BlockWeights


@torch.no_grad()
def allocate(
    plan: PruningPlan, blocks: list[Block], weights: BlockWeights, dense: DenseStatistics | None
) -> list[BlockShare]:
    """The share of each block; `dense` is needed where the allocation looks at outlier scores.

    Raises:
        UserError: an explicit list is not of this model.
    """
    if plan.needs_lod and dense is None:
        raise ValueError(f"{plan.allocation} allocates by outlier scores")
    if plan.pattern is not None and not isinstance(plan.pattern, MixedNM):
        return [_same(block, plan.pattern.ratio, plan.pattern) for block in blocks]
    if plan.allocation == "explicit":
        return _explicit(plan, blocks)
    if plan.sparsity == 0 or plan.allocation == "uniform":
        return [_same(block, plan.sparsity) for block in blocks]
    sizes = [block.weights for block in blocks]
    if plan.allocation == "linear":
        return _per_block(blocks, linear_sparsities(plan.sparsity, _half_range(plan), sizes))
    if plan.allocation in ("erdos-renyi", "er-plus"):
        return _erdos_renyi(plan, blocks)
    if plan.allocation == "global":
        return _global(plan, blocks, weights, None if plan.method == "magnitude" else dense)
    assert dense is not None
    if plan.allocation == "dlp":
        means = [_mean(dense.scores(block)) for block in _held(blocks, weights)]
        return _per_block(blocks, dlp_sparsities(means, plan.sparsity, _half_range(plan), sizes))
    if plan.allocation == "owl-per-layer":
        return _per_linear(plan, blocks, weights, dense)
    lod = outlier_percents(blocks, weights, dense, plan.owl_m)
    if isinstance(plan.pattern, MixedNM):
        counts = mixed_counts(lod, plan.pattern.prune, plan.pattern.of, _half_range(plan), sizes)
        patterns = [NM(count, plan.pattern.of) for count in counts]
        return [_same(*item) for item in zip(blocks, [p.ratio for p in patterns], patterns, lod, strict=True)]
    formula = owl_inverse_sparsities if plan.allocation == "owl-inverse" else owl_sparsities
    return _per_block(blocks, formula(lod, plan.sparsity, _half_range(plan), sizes), lod)


def _same(block: Block, sparsity: float, pattern: NM | None = None, lod: float | None = None) -> BlockShare:
    return BlockShare(dict.fromkeys(block.linears, sparsity), pattern, lod)


def _per_block(
    blocks: list[Block], sparsities: Sequence[float], lod: Sequence[float] | None = None
) -> list[BlockShare]:
    measured: Sequence[float | None] = lod or [None] * len(blocks)
    return [_same(block, value, lod=d) for block, value, d in zip(blocks, sparsities, measured, strict=True)]


def _half_range(plan: PruningPlan) -> float:
    if plan.half_range is None:
        raise ValueError("the plan sets the range of every allocation that has one")
    return plan.half_range


@torch.no_grad()
def outlier_percents(blocks: Sequence[Block], weights: BlockWeights, dense: DenseStatistics, m: float) -> list[float]:
    """OWL's D of each dense block, percent."""
    return [outlier_percent(dense.scores(block), m) for block in _held(blocks, weights)]


def _held(blocks: Sequence[Block], weights: BlockWeights) -> Iterator[Block]:
    """Each block while its weights are there."""
    for block in blocks:
        with weights.held(block):
            yield block


def _mean(scores: Iterator[torch.Tensor]) -> float:
    return torch.cat([score.flatten() for score in scores]).mean().item()


def _explicit(plan: PruningPlan, blocks: list[Block]) -> list[BlockShare]:
    if plan.block_sparsities is not None:
        if len(plan.block_sparsities) != len(blocks):
            raise UserError(
                f"{len(plan.block_sparsities)} block sparsities were given; this model has {len(blocks)} blocks"
            )
        return _per_block(blocks, plan.block_sparsities)
    given = dict(plan.linear_sparsities or {})
    names = [block.full_name(name) for block in blocks for name in block.linears]
    if missing := [name for name in names if name not in given]:
        raise UserError(f"no sparsity was given for {missing[0]} ({len(missing)} of {len(names)} linears lack one)")
    if unknown := sorted(set(given) - set(names)):
        raise UserError(f"a sparsity was given for {unknown[0]}, which is no linear of this model's blocks")
    return [BlockShare({name: given[block.full_name(name)] for name in block.linears}) for block in blocks]


def _cut(blocks: list[Block], sparsities: Sequence[float], lod: Sequence[float] | None = None) -> list[BlockShare]:
    """One value per linear of the whole model, as shares of blocks."""
    values = iter(sparsities)
    shares = [{name: next(values) for name in block.linears} for block in blocks]
    measured: Sequence[float | None] = lod or [None] * len(blocks)
    return [BlockShare(share, lod_percent=d) for share, d in zip(shares, measured, strict=True)]


def _erdos_renyi(plan: PruningPlan, blocks: list[Block]) -> list[BlockShare]:
    """By linear; ER-plus keeps the last linear of the last block dense."""
    shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in _matrices(blocks)]
    dense = (len(shapes) - 1,) if plan.allocation == "er-plus" else ()
    return _cut(blocks, erdos_renyi_sparsities(shapes, plan.sparsity, dense=dense))


def _matrices(blocks: list[Block]) -> Iterator[torch.Tensor]:
    return (matrix_of(linear) for block in blocks for linear in block.linears.values())


def _global(
    plan: PruningPlan, blocks: list[Block], weights: BlockWeights, dense: DenseStatistics | None
) -> list[BlockShare]:
    """What one threshold over all blocks leaves of each linear: on A, or without `dense` on |W|."""

    def scores() -> Iterator[torch.Tensor]:
        for block in _held(blocks, weights):
            yield from dense.scores(block) if dense else (matrix.abs() for matrix in _matrices([block]))

    total = sum(block.weights for block in blocks)
    threshold = global_threshold(scores, max(1, int(total * plan.sparsity)))
    highest = 1 - 1e-9  # a linear that lies below the threshold as a whole is emptied, but for one weight
    return _cut(blocks, [min((score <= threshold).float().mean().item(), highest) for score in scores()])


def _per_linear(
    plan: PruningPlan, blocks: list[Block], weights: BlockWeights, dense: DenseStatistics
) -> list[BlockShare]:
    """OWL with a D for each linear (paper, appendix F)."""
    of_linears: list[float] = []
    of_blocks: list[float] = []
    for block in _held(blocks, weights):
        of_linears += [outlier_percent([score], plan.owl_m) for score in dense.scores(block)]
        of_blocks.append(outlier_percent(dense.scores(block), plan.owl_m))
    sizes = [matrix.numel() for matrix in _matrices(blocks)]
    return _cut(blocks, owl_sparsities(of_linears, plan.sparsity, _half_range(plan), sizes), of_blocks)
