"""Pruning a model in memory, block by block: first how sparse each block becomes, then which weights go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from owl_deploy.allocation.owl import outlier_percent, owl_sparsities
from owl_deploy.checkpoints.structure import Block
from owl_deploy.errors import UserError
from owl_deploy.pruning.magnitude import magnitude_mask
from owl_deploy.pruning.manifest import BlockRecord, LinearRecord
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.sparsegpt import sparsegpt
from owl_deploy.pruning.statistics import InputStatistics
from owl_deploy.pruning.stream import CalibrationStream, in_fp32
from owl_deploy.pruning.wanda import wanda_mask, wanda_scores
from owl_deploy.reporting import SILENT, Reporter


def needs_calibration(plan: PruningPlan) -> bool:
    """Whether the plan looks at activations at all."""
    return plan.sparsity > 0 and (plan.method != "magnitude" or plan.allocation == "owl")


@torch.no_grad()
def measure_lod(
    model: PreTrainedModel, blocks: list[Block], ids: NDArray[np.int64], m: float, reporter: Reporter = SILENT
) -> list[float]:
    """OWL's D of every block of the dense model, in percent (paper, equation 1).

    Args:
        ids: calibration windows [n, length].
        m: the paper's M.
    """
    stream = CalibrationStream(model, blocks, ids)
    lod = []
    for block in reporter.track(blocks, f"outliers (M = {m:g})"):
        with in_fp32(block.module):
            statistics = InputStatistics(block.linears, gram=False)
            stream.advance(block, statistics)
            scores = (
                wanda_scores(linear.weight, statistics.mean_square(name)) for name, linear in block.linears.items()
            )
            lod.append(outlier_percent(scores, m))
    return lod


def allocate(plan: PruningPlan, blocks: list[Block], lod: Sequence[float] | None) -> list[float]:
    """The sparsity of each block; `lod` is needed for OWL.

    Raises:
        UserError: an explicit list does not have one value per block.
    """
    if plan.pattern is not None:
        return [plan.pattern.prune / plan.pattern.of] * len(blocks)
    if plan.block_sparsities is not None:
        if len(plan.block_sparsities) != len(blocks):
            raise UserError(
                f"{len(plan.block_sparsities)} block sparsities were given; this model has {len(blocks)} blocks"
            )
        return list(plan.block_sparsities)
    if plan.allocation == "owl" and plan.sparsity > 0:
        if lod is None:
            raise ValueError("OWL allocates by LOD")
        return owl_sparsities(lod, plan.sparsity, plan.owl_lambda, [block.weights for block in blocks])
    return [plan.sparsity] * len(blocks)


@torch.no_grad()
def prune_blocks(
    model: PreTrainedModel,
    blocks: list[Block],
    plan: PruningPlan,
    sparsities: Sequence[float],
    *,
    ids: NDArray[np.int64] | None,
    lod: Sequence[float] | None = None,
    reporter: Reporter = SILENT,
) -> list[BlockRecord]:
    """Prune every block of `model` in place, each seeing what the pruned blocks before it put out.

    Args:
        sparsities: one per block, from `allocate`.
        ids: calibration windows [n, length]; None where the method looks at weights only.
        lod: recorded beside the sparsities.
    """
    calibrated = plan.method != "magnitude" and any(sparsities)
    stream = CalibrationStream(model, blocks, ids) if calibrated and ids is not None else None
    if calibrated and stream is None:
        raise ValueError(f"{plan.method} needs calibration windows")
    records = []
    for index, block in enumerate(reporter.track(blocks, f"pruning ({plan.method})")):
        dtypes = {name: linear.weight.dtype for name, linear in block.linears.items()}
        with in_fp32(block.module):
            statistics = stream.collect(block, gram=plan.method == "sparsegpt") if stream else None
            linears = [
                _prune_linear(name, linear, plan, sparsities[index], statistics, dtypes[name])
                for name, linear in block.linears.items()
            ]
            if stream and index + 1 < len(blocks):
                stream.advance(block)
        records.append(_record(block, linears, sparsities[index], lod[index] if lod else None))
    return records


def _prune_linear(
    name: str,
    linear: nn.Linear,
    plan: PruningPlan,
    sparsity: float,
    statistics: InputStatistics | None,
    dtype: torch.dtype,
) -> LinearRecord:
    """Prune one linear whose weight is in fp32, rounding what is kept to the checkpoint's `dtype`."""
    weight, dampening = linear.weight, None
    if not weight.isfinite().all():
        raise UserError(f"{name}: holds NaN or infinite weights; fetch the model again")
    if statistics is None:
        weight = weight.masked_fill(magnitude_mask(weight, sparsity, plan.pattern), 0)
    elif plan.method == "wanda":
        weight = weight.masked_fill(wanda_mask(weight, statistics.mean_square(name), sparsity, plan.pattern), 0)
    else:
        result = sparsegpt(
            weight,
            statistics.hessian(name),
            sparsity,
            pattern=plan.pattern,
            block_size=plan.block_size,
            dampening=plan.dampening,
        )
        weight, dampening = result.weight, result.dampening
    linear.weight.data = weight.to(dtype).float()
    return LinearRecord(
        name=name,
        shape=(linear.out_features, linear.in_features),
        sparsity_asked=sparsity,
        sparsity_achieved=_zeros(linear) / linear.weight.numel(),
        dampening=dampening,
    )


def _zeros(linear: nn.Linear) -> int:
    return int((linear.weight == 0).sum())


def _record(block: Block, linears: list[LinearRecord], asked: float, lod: float | None) -> BlockRecord:
    zeros = sum(_zeros(linear) for linear in block.linears.values())
    return BlockRecord(
        name=block.name,
        weights=block.weights,
        lod_percent=lod,
        sparsity_asked=asked,
        sparsity_achieved=zeros / block.weights,
        linears=linears,
    )
