"""Pruning a model block by block: run a block, see its inputs, prune it, run it again for the next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.errors import UserError
from owl_deploy.models.structure import Block, Linear, matrix_of, set_matrix, without_indices, zeros
from owl_deploy.pruning.calibration.dense import DenseStatistics
from owl_deploy.pruning.calibration.statistics import InputStatistics
from owl_deploy.pruning.calibration.stream import CalibrationStream
from owl_deploy.pruning.calibration.target import DenseBlock, DenseTargets, observe
from owl_deploy.pruning.manifest import BlockRecord, LinearRecord
from owl_deploy.pruning.methods.registry import Task, needed_statistics, prune_linear
from owl_deploy.pruning.plan import BlockShare, PruningPlan
from owl_deploy.pruning.weights import BlockWeights, InMemory
from owl_deploy.reporting import SILENT, Reporter

Finished = Callable[[Block], BlockRecord | None]
"""Puts back what an earlier run made of a block, and returns its record; None if no run finished it."""
Done = Callable[[Block, BlockRecord], None]
"""Told of every block that was pruned, with its weights in their own dtype."""
Timed = Callable[[], contextlib.AbstractContextManager[None]]
"""What surrounds the pruning of each linear, once its statistics are known."""


@torch.no_grad()
def prune_blocks(
    model: PreTrainedModel,
    blocks: list[Block],
    plan: PruningPlan,
    shares: Sequence[BlockShare],
    *,
    ids: NDArray[np.int64] | None,
    dense: DenseStatistics | None = None,
    weights: BlockWeights | None = None,
    finished: Finished = lambda _: None,
    done: Done = lambda _, __: None,
    timed: Timed = contextlib.nullcontext,
    reporter: Reporter = SILENT,
) -> list[BlockRecord]:
    """Prune every block of `model` in place, each seeing what the pruned blocks before it put out.

    Args:
        shares: what each block gives up, from `allocate`.
        ids: calibration windows [n, length]; None where the method looks at weights only.
        dense: input statistics of the dense model, if they were measured: a method that looks at these and no more
            runs no pass of its own.
        weights: where the blocks' weights are; by default in memory.
        timed: a stopwatch for the metric and the choice of weights alone, without forward passes (paper, Table 7).
    """
    weights = weights or InMemory()
    known = dense if plan.statistics == "dense" and needed_statistics(plan) == {"squares"} else None
    stream = None
    is_dense = not any(any(share.sparsities.values()) for share in shares)
    if needed_statistics(plan) and known is None and not (is_dense and not plan.is_rounded):
        if ids is None:
            raise ValueError(f"{plan.method} needs calibration windows")
        stream = weights.stream(model, blocks, ids)
    pruner = _Pruner(plan, stream, known, timed)
    records = []
    for index, block in enumerate(reporter.track(blocks, f"pruning ({plan.method})")):
        dtypes = {name: linear.weight.dtype for name, linear in block.linears.items()}
        with weights.held(block):
            record, is_new = pruner.block(block, shares[index], dtypes, finished)
            if index + 1 < len(blocks):
                pruner.advance(block)
        if is_new:
            done(block, record)
        records.append(record)
    return records


class _Pruner:
    """Takes the calibration stream, and the dense one beside it where that is the target, from block to block."""

    def __init__(
        self, plan: PruningPlan, stream: CalibrationStream | None, known: DenseStatistics | None, timed: Timed
    ) -> None:
        self._plan = plan
        self._timed = timed
        self._stream = stream
        self._dense_stream = stream.twin() if stream and plan.target == "dense" else None
        self._known = known
        self._needs = needed_statistics(plan)

    def block(
        self, block: Block, share: BlockShare, dtypes: Mapping[str, torch.dtype], finished: Finished
    ) -> tuple[BlockRecord, bool]:
        """Prune a block whose weights are in fp32, unless that is done; its record, and whether it is new."""
        dense = observe(self._dense_stream, block) if self._dense_stream else None
        of_dense = self._statistics_of_dense(block)
        if (record := finished(block)) is not None:
            return record, False
        linears: dict[str, LinearRecord] = {}
        for stage in self._stages(block):
            statistics, targets = (of_dense, None) if of_dense else self._collect(block, stage, dense)
            for name, linear in stage.items():
                task = Task(
                    name,
                    matrix_of(linear).contiguous(),
                    share.sparsities[name],
                    share.pattern,
                    self._plan,
                    statistics,
                    targets.correlation(name) if targets else None,
                    self._plan.weights_of(block.full_name(name)),
                )
                linears[name] = _prune(block, linear, task, dtypes[name], self._timed)
        return _record(block, share, [linears[name] for name in block.linears]), True

    def advance(self, block: Block) -> None:
        """Move the stream past the pruned block; with dense statistics it has passed the dense one already."""
        if self._stream and self._plan.statistics != "dense":
            self._stream.advance(block)

    def _statistics_of_dense(self, block: Block) -> InputStatistics | None:
        """With dense statistics: those of the block, whose weights are dense still."""
        if self._known is not None:
            return self._known.of(block)
        if self._stream is None or self._plan.statistics != "dense":
            return None
        statistics = InputStatistics(block.linears, self._needs)
        self._stream.advance(block, statistics)
        return statistics

    def _stages(self, block: Block) -> list[dict[str, Linear]]:
        """All linears at once; or, truly sequential, those that share an input, in the order they are called.

        Experts are one stage: those of all first projections, then those of all second ones.
        """
        if self._stream is None or self._plan.statistics != "linear":
            return [block.linears]
        called = self._stream.leaders(block)
        stages: dict[str, dict[str, Linear]] = {}
        for name, leader in called.items():
            stages.setdefault(without_indices(leader), {})[name] = block.linears[name]
        stage_of = {without_indices(name): stage for stage in stages.values() for name in stage}
        last = list(stages.values())[-1]
        for name in block.linears.keys() - called.keys():  # experts that saw no token of the first window
            stage_of.get(without_indices(name), last)[name] = block.linears[name]
        return [{name: stage[name] for name in block.linears if name in stage} for stage in stages.values()]

    def _collect(
        self, block: Block, stage: Mapping[str, Linear], dense: DenseBlock | None
    ) -> tuple[InputStatistics | None, DenseTargets | None]:
        if self._stream is None:
            return None, None
        statistics = InputStatistics(stage, self._needs)
        targets = DenseTargets(block, stage, dense) if dense else None
        self._stream.collect(block, statistics, targets.watch if targets else None)
        return statistics, targets


def _prune(block: Block, linear: Linear, task: Task, dtype: torch.dtype, timed: Timed) -> LinearRecord:
    """Prune one linear whose weight is in fp32, rounding what is kept to the checkpoint's `dtype`."""
    name = block.full_name(task.name)
    if not _is_finite(task.weight):
        raise UserError(f"{name}: holds NaN or infinite weights; fetch the model again")
    with timed():
        result = prune_linear(task)
    weight = result.weight.to(dtype)
    if not _is_finite(weight):
        raise UserError(
            f"{name}: {task.plan.method} makes weights too large for {dtype}; convert the model to bf16 first"
        )
    set_matrix(linear, weight.float())
    return LinearRecord(
        name=task.name,
        shape=(weight.shape[0], weight.shape[1]),
        sparsity_asked=task.sparsity,
        sparsity_achieved=zeros(linear) / weight.numel(),
        dampening=result.dampening,
    )


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; twelve times as fast as asking each, and either shows in the extremes."""
    return bool(torch.stack(torch.aminmax(weight)).isfinite().all())


def _record(block: Block, share: BlockShare, linears: list[LinearRecord]) -> BlockRecord:
    return BlockRecord(
        name=block.name,
        weights=block.weights,
        lod_percent=share.lod_percent,
        sparsity_asked=share.mean(block.sizes),
        sparsity_achieved=block.zeros / block.weights,
        linears=linears,
    )
