"""Every linear of a model pruned to several sparsities, once, and kept: what a search chooses from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
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
from owl_deploy.rounding import GRIDS, ROUNDED, Rounded

_USUAL_COLUMNS = 1024


_SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Of options in bits."""


@dataclass(frozen=True)
class Option:
    """What may become of a linear: how sparse it is, and what it is rounded to."""

    sparsity: float
    weights: Rounded | None = None

    def bits(self, columns: int) -> float:
        """Of a weight, in a matrix with rows of `columns`; masks and scales included."""
        if self.weights is None:
            raise ValueError("only rounded weights have a number of bits")
        return GRIDS[self.weights].bits_per_weight(self.sparsity, columns)

    def __str__(self) -> str:
        return f"{self.sparsity:g} {self.weights or 'unrounded'}"


def sparse_options(sparsity: float, step: float, reach: float, weights: Rounded | None = None) -> tuple[Option, ...]:
    """Levels around a sparsity, rising: by `step`, as far as `reach` to either side, from 0 up to 0.95."""
    count = int(reach / step + 1e-9)
    levels = (sparsity + step * number for number in range(-count, count + 1))
    return tuple(Option(round(level, 6), weights) for level in levels if -1e-9 <= level <= 0.95 + 1e-9)


def bit_options() -> tuple[Option, ...]:
    """Dense in 8, 4 and 3 bits, and sparse in 8 and 4: by falling bits."""
    dense = [Option(0.0, weights) for weights in ROUNDED]
    sparse = [Option(sparsity, weights) for weights in ("int8", "int4") for sparsity in _SPARSITIES]
    return tuple(sorted([*dense, *sparse], key=lambda option: -option.bits(_USUAL_COLUMNS)))


class Levels:
    """The weights of every linear for every option; a model's linears take them without a copy.

    Attributes:
        linears: by full name.
        weights: of each linear, in every option, [out, in].
    """

    def __init__(self, blocks: Sequence[Block], options: Sequence[Option], directory: Path, dtype: torch.dtype) -> None:
        """Open what `make_levels` wrote; the weights are held in `dtype`."""
        self.options = tuple(options)
        self.linears: dict[str, Linear] = {}
        self.weights: list[list[torch.Tensor]] = []
        self._dense: list[torch.Tensor] = []
        for block in blocks:
            with safe_open(directory / f"{block.name}.levels.safetensors", framework="pt") as file:
                for name, linear in block.linears.items():
                    self.linears[block.full_name(name)] = linear
                    self._dense.append(matrix_of(linear).detach())
                    self.weights.append([file.get_tensor(_key(name, option)).to(dtype) for option in options])

    @property
    def kept(self) -> list[list[int]]:
        """How many weights each linear keeps, by option."""
        return [[int(torch.count_nonzero(weight)) for weight in levels] for levels in self.weights]

    @property
    def bits(self) -> list[list[int]]:
        """How many bits each linear takes, by option."""
        shapes = [levels[0].shape for levels in self.weights]
        return [[round(option.bits(columns) * rows * columns) for option in self.options] for rows, columns in shapes]

    def show_dense(self) -> None:
        """Give every linear the weights that it had at first."""
        for linear, weight in zip(self.linears.values(), self._dense, strict=True):
            set_matrix(linear, weight)

    def show(self, choice: Sequence[int]) -> None:
        """Give every linear the weights of its option."""
        for linear, levels, option in zip(self.linears.values(), self.weights, choice, strict=True):
            set_matrix(linear, levels[option])


@torch.no_grad()
def make_levels(
    model: PreTrainedModel,
    blocks: list[Block],
    plan: PruningPlan,
    options: Sequence[Option],
    ids: NDArray[np.int64],
    weights: BlockWeights,
    directory: Path,
    reporter: Reporter = SILENT,
) -> None:
    """Prune and round every linear in all ways by the plan's method, each by what comes to it in the dense model.

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
        bits=None,
    )
    needs = needed_statistics(alone) | needed_statistics(plan)
    stream = weights.stream(model, blocks, ids) if needs else None
    for block in reporter.track(blocks, f"pruning each linear in {len(options)} ways ({plan.method})"):
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
                for option in options:
                    weight = matrix_of(linear).contiguous()
                    task = Task(name, weight, option.sparsity, None, alone, statistics, weights=option.weights)
                    made[_key(name, option)] = prune_linear(task).weight.to(dtypes[name]).contiguous()
            with written_whole(file) as temporary:
                save_file(made, temporary)


def _key(name: str, option: Option) -> str:
    return f"{name} {option}"


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False
