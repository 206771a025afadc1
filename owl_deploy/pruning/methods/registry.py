"""Every method behind one function: which statistics it needs, and how it prunes one linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from owl_deploy.pruning.calibration.statistics import InputStatistics, Statistic
from owl_deploy.pruning.methods.admm import admm
from owl_deploy.pruning.methods.magnitude import magnitude_mask
from owl_deploy.pruning.methods.ria import ria_scores
from owl_deploy.pruning.methods.selection import smallest_of_each_group, smallest_of_layer, smallest_per_row
from owl_deploy.pruning.methods.sparsegpt import Scores, saliency, sparsegpt
from owl_deploy.pruning.methods.wanda import wanda_mask, wanda_scores, wanda_variant_mask
from owl_deploy.pruning.plan import NM, Method, PruningPlan
from owl_deploy.rounding import GRIDS, Grid, Rounded

_ROUNDING_DAMPENING = 0.01


@dataclass(frozen=True)
class Task:
    """One linear to prune.

    Attributes:
        weight: [out, in], fp32.
        sparsity: of this linear; an N:M `pattern` takes its place.
        correlation: what ADMM is to reproduce, `T^T X` [out, in]; None for the linear's own output.
        weights: the grid that what is kept is rounded to.
    """

    name: str
    weight: torch.Tensor
    sparsity: float
    pattern: NM | None
    plan: PruningPlan
    inputs: InputStatistics | None
    correlation: torch.Tensor | None = None
    weights: Rounded | None = None

    @property
    def statistics(self) -> InputStatistics:
        if self.inputs is None:
            raise ValueError(f"{self.plan.method} needs the inputs of {self.name}")
        return self.inputs

    def smallest(self, scores: torch.Tensor, sparsity: float | None = None) -> torch.Tensor:
        """Mark the smallest scores, in the plan's shape and granularity: bool [out, in], true where pruned."""
        sparsity = self.sparsity if sparsity is None else sparsity
        if self.pattern is not None:
            return smallest_of_each_group(scores, self.pattern)
        if self.plan.granularity == "row":
            return smallest_per_row(scores, int(scores.shape[1] * sparsity))
        return smallest_of_layer(scores, sparsity)


@dataclass(frozen=True)
class Pruned:
    """The weights [out, in] of a pruned linear, and the damping its Hessian needed, if one was inverted."""

    weight: torch.Tensor
    dampening: float | None = None


def prune_linear(task: Task) -> Pruned:
    """Prune one linear by the plan's method, and round what is kept if the plan says so."""
    is_dense = task.sparsity == 0 and task.pattern is None
    pruned = Pruned(task.weight) if is_dense else _METHODS[task.plan.method].prune(task)
    if task.weights is None or (task.plan.method == "sparsegpt" and not is_dense):  # which rounds as it prunes
        return pruned
    return _rounded(task, pruned, GRIDS[task.weights])


def needed_statistics(plan: PruningPlan) -> frozenset[Statistic]:
    """What the method, and the rounding, have to know about a linear's inputs."""
    return _METHODS[plan.method].statistics | (_GRAM if plan.is_rounded else frozenset())


# -------------------- the methods


def _magnitude(task: Task) -> Pruned:
    return _masked(task, task.smallest(task.weight.abs()))


def _wanda(task: Task) -> Pruned:
    return _masked(task, task.smallest(wanda_scores(task.weight, task.statistics.mean_square(task.name))))


def _wanda_variant(task: Task) -> Pruned:
    return _masked(task, wanda_variant_mask(task.weight, task.statistics.mean_square(task.name), task.sparsity))


def _ria(task: Task) -> Pruned:
    return _masked(task, task.smallest(ria_scores(task.weight, task.statistics.mean_square(task.name))))


def _sparsegpt(task: Task, scores: Scores = saliency, fixed_mask: torch.Tensor | None = None) -> Pruned:
    """SparseGPT; with another metric's scores or mask, its update of what that metric leaves (the ablations)."""
    result = sparsegpt(
        task.weight,
        task.statistics.hessian(task.name),
        task.sparsity,
        pattern=task.pattern,
        block_size=task.plan.block_size,
        dampening=_given(task.plan.dampening),
        scores=scores,
        fixed_mask=fixed_mask,
        grid=GRIDS[task.weights] if task.weights and task.plan.method == "sparsegpt" else None,
    )
    return Pruned(result.weight, result.dampening)


def _rounded(task: Task, pruned: Pruned, grid: Grid) -> Pruned:
    """GPTQ on the weights that are kept, which make up for what rounding the others changes."""
    result = sparsegpt(
        pruned.weight,
        task.statistics.hessian(task.name),
        task.sparsity,
        block_size=task.plan.block_size,
        dampening=_ROUNDING_DAMPENING,
        fixed_mask=pruned.weight == 0,
        grid=grid,
    )
    return Pruned(result.weight, pruned.dampening)


def _admm(task: Task) -> Pruned:
    result = admm(
        task.weight,
        task.statistics.hessian(task.name),
        task.sparsity,
        task.smallest,
        correlation=task.correlation,
        steps=task.plan.admm_steps,
        dampening=_given(task.plan.dampening),
    )
    return Pruned(result.weight, result.dampening)


def _ablate_magnitude(task: Task) -> Pruned:
    """Wanda's paper, Table 6, and its code."""
    fixed = magnitude_mask(task.weight, task.sparsity, task.pattern) if task.plan.ablation == "seq" else None
    return _sparsegpt(task, lambda weights, _, __: weights.abs(), fixed)


def _ablate_wanda(task: Task) -> Pruned:
    """Wanda's paper, Table 6, and its code."""
    squares = task.statistics.ablation_square(task.name)
    fixed = wanda_mask(task.weight, squares, task.sparsity, task.pattern) if task.plan.ablation == "seq" else None
    return _sparsegpt(task, lambda weights, _, where: wanda_scores(weights, squares[where]), fixed)


def _masked(task: Task, mask: torch.Tensor) -> Pruned:
    return Pruned(task.weight.masked_fill(mask, 0))


def _given(value: float | None) -> float:
    if value is None:
        raise ValueError("the plan sets the damping of every method that has one")
    return value


@dataclass(frozen=True)
class _Method:
    prune: Callable[[Task], Pruned]
    statistics: frozenset[Statistic] = frozenset()


_SQUARES: frozenset[Statistic] = frozenset({"squares"})
_GRAM: frozenset[Statistic] = frozenset({"gram"})
_METHODS: dict[Method, _Method] = {
    "magnitude": _Method(_magnitude),
    "wanda": _Method(_wanda, _SQUARES),
    "wanda-variant": _Method(_wanda_variant, _SQUARES),
    "ria": _Method(_ria, _SQUARES),
    "sparsegpt": _Method(_sparsegpt, _GRAM),
    "admm": _Method(_admm, _GRAM),
    "ablate-magnitude": _Method(_ablate_magnitude, _GRAM),
    "ablate-wanda": _Method(_ablate_wanda, _GRAM | {"ablation"}),
}
