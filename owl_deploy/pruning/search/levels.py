"""Every linear of a model pruned to several sparsities, once, and kept: what a search chooses from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from owl_deploy.files import written_whole
from owl_deploy.models.structure import Block, Linear, matrix_of, set_matrix
from owl_deploy.pruning.calibration.statistics import InputStatistics
from owl_deploy.pruning.methods.registry import Task, needed_statistics, prune_linear
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.weights import BlockWeights
from owl_deploy.reporting import SILENT, Reporter


def level_sparsities(sparsity: float, step: float, reach: float) -> tuple[float, ...]:
    """The levels around a sparsity, rising: by `step`, as far as `reach` to either side, from 0 up to 0.95."""
    count = int(reach / step + 1e-9)
    levels = (sparsity + step * number for number in range(-count, count + 1))
    return tuple(round(level, 6) for level in levels if -1e-9 <= level <= 0.95 + 1e-9)


class Levels:
    """The weights of every linear at every level; a model's linears take them without a copy."""

    def __init__(self, blocks: Sequence[Block], sparsities: tuple[float, ...], directory: Path) -> None:
        """Open what `make_levels` wrote."""
        self.sparsities = sparsities
        self.linears: dict[str, Linear] = {}
        self._weights: list[list[torch.Tensor]] = []
        for block in blocks:
            with safe_open(directory / f"{block.name}.levels.safetensors", framework="pt") as file:
                for name, linear in block.linears.items():
                    self.linears[block.full_name(name)] = linear
                    self._weights.append([file.get_tensor(_key(name, level)) for level in sparsities])

    @property
    def costs(self) -> list[list[int]]:
        """The weights that each linear keeps at each level."""
        return [[int(torch.count_nonzero(weight)) for weight in levels] for levels in self._weights]

    def show(self, choice: Sequence[int]) -> None:
        """Give every linear the weights of its level."""
        for linear, levels, option in zip(self.linears.values(), self._weights, choice, strict=True):
            set_matrix(linear, levels[option])


@torch.no_grad()
def make_levels(
    model: PreTrainedModel,
    blocks: list[Block],
    plan: PruningPlan,
    sparsities: tuple[float, ...],
    ids: NDArray[np.int64],
    weights: BlockWeights,
    directory: Path,
    reporter: Reporter = SILENT,
) -> None:
    """Prune every linear to every level by the plan's method, each by what comes to it in the dense model.

    A block is a file; blocks that an earlier run has finished are passed over.

    Args:
        ids: calibration windows [n, length].
        directory: of the files; it exists.
    """
    alone = dataclasses.replace(
        plan,
        allocation="uniform",
        generations=None,
        statistics=None if plan.method == "magnitude" else "dense",
        target=None,
        weights=None,
    )
    needs = needed_statistics(alone)
    stream = weights.stream(model, blocks, ids) if needs else None
    for block in reporter.track(blocks, f"pruning each linear to {len(sparsities)} levels ({plan.method})"):
        file = directory / f"{block.name}.levels.safetensors"
        dtypes = {name: linear.weight.dtype for name, linear in block.linears.items()}
        with weights.held(block):
            statistics = None
            if stream is not None:
                statistics = InputStatistics(block.linears, needs)
                stream.advance(block, statistics)
            if _is_whole(file):
                continue
            made = {}
            for name, linear in block.linears.items():
                for level in sparsities:
                    task = Task(name, matrix_of(linear).contiguous(), level, None, alone, statistics)
                    made[_key(name, level)] = prune_linear(task).weight.to(dtypes[name]).contiguous()
            with written_whole(file) as temporary:
                save_file(made, temporary)


def _key(name: str, level: float) -> str:
    return f"{name}@{level:g}"


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False
