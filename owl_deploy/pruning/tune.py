"""Choosing an allocation and its parameters by perplexity on calibration text that was held out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.errors import UserError
from owl_deploy.evaluation.perplexity import perplexity
from owl_deploy.models.structure import Block
from owl_deploy.pruning.allocate import allocate
from owl_deploy.pruning.calibration.dense import measure_dense
from owl_deploy.pruning.driver import prune_blocks
from owl_deploy.pruning.manifest import TrialRecord
from owl_deploy.pruning.plan import Allocation, PruningPlan
from owl_deploy.pruning.weights import BlockWeights, restored
from owl_deploy.reporting import SILENT, Reporter
from owl_deploy.text.windows import held_out

_M = (3.0, 5.0, 7.0, 10.0)
_LAMBDA = (0.02, 0.05, 0.08, 0.1, 0.2)
_ALPHA = (0.05, 0.1, 0.15, 0.2)
_SLOPE = (0.03, 0.06, 0.09, 0.12, 0.15)
TUNABLE: tuple[Allocation, ...] = ("uniform", "owl", "dlp", "linear")


def tune(
    model: PreTrainedModel,
    blocks: list[Block],
    plan: PruningPlan,
    allocations: tuple[Allocation, ...],
    ids: NDArray[np.int64],
    weights: BlockWeights,
    *,
    known: Iterable[TrialRecord] = (),
    tried: Callable[[list[TrialRecord]], None] = lambda _: None,
    reporter: Reporter = SILENT,
) -> tuple[PruningPlan, list[TrialRecord]]:
    """The plan whose allocation gives the lowest perplexity on held-out windows, and all that was tried.

    Each of `allocations` is tried with its defaults, then the best one over its grid. Every trial prunes the model by
    the plan's own method with three quarters of the windows, measures the rest, and puts the dense weights back. All
    share one pass of the dense model.

    Args:
        ids: calibration windows [n, length], at least 2.
        known: trials of an earlier run, which are not made again.
        tried: told of all trials so far after each.
    """
    if len(ids) < 2:
        raise UserError("--tune needs at least 2 calibration windows: some to prune with, some to measure on")
    fitted, measured = held_out(ids)
    dense = measure_dense(model, blocks, fitted, weights, reporter)
    trials = list(known)

    def measure(candidate: PruningPlan) -> float:
        for trial in trials:
            if trial.is_of(candidate):
                return trial.perplexity
        with restored(blocks):
            shares = allocate(candidate, blocks, weights, dense)
            prune_blocks(model, blocks, candidate, shares, ids=fitted, dense=dense, weights=weights, reporter=reporter)
            value = perplexity(model, measured, reporter)
        trials.append(TrialRecord.of(candidate, value))
        tried(trials)
        reporter.step(f"tried {trials[-1]}")
        return value

    def best(candidates: list[PruningPlan]) -> PruningPlan:
        values = [measure(candidate) for candidate in candidates]
        return candidates[int(np.argmin([math.inf if math.isnan(value) else value for value in values]))]

    chosen = best([_with(plan, allocation=allocation) for allocation in allocations])
    chosen = best([chosen, *_grid(chosen)])
    return chosen, trials


def _grid(plan: PruningPlan) -> list[PruningPlan]:
    """Values of the allocation's parameters to try (the paper's, appendix G, for M and lambda)."""
    if plan.allocation in ("owl", "owl-per-layer", "owl-inverse"):
        return [_with(plan, owl_m=m, half_range=value) for m in _M for value in _LAMBDA]
    values = {"dlp": _ALPHA, "linear": _SLOPE}.get(str(plan.allocation), ())
    return [_with(plan, half_range=value) for value in values]


def _with(plan: PruningPlan, **changed: object) -> PruningPlan:
    """The plan with another allocation, or other parameters of it; the rest of them are the default ones."""
    granularity = None if "allocation" in changed and plan.granularity == "global" else plan.granularity
    return dataclasses.replace(plan, **({"half_range": None, "granularity": granularity} | changed))  # type: ignore[arg-type]
