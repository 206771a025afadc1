"""The dense model's input statistics: one pass, and all that allocations ask of it can be computed from the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from owl_deploy.files import written_whole
from owl_deploy.models.structure import Block, matrix_of
from owl_deploy.pruning.calibration.statistics import InputStatistics
from owl_deploy.pruning.methods.wanda import wanda_scores
from owl_deploy.pruning.weights import BlockWeights
from owl_deploy.reporting import SILENT, Reporter

_INPUTS = "inputs_sha256"


class DenseStatistics:
    """The `s_j` of every linear of the dense model, [in], by the linear's full name."""

    def __init__(self, squares: Mapping[str, torch.Tensor]) -> None:
        self.squares = dict(squares)

    def scores(self, block: Block) -> Iterator[torch.Tensor]:
        """The outlier scores A of each of the block's linears, [out, in]; its weights must be there, in fp32."""
        for name, linear in block.linears.items():
            weight = matrix_of(linear)
            yield wanda_scores(weight, self.squares[block.full_name(name)].to(weight.device))

    def of(self, block: Block) -> InputStatistics:
        """The block's part."""
        squares = {name: self.squares[block.full_name(name)] for name in block.linears}
        return InputStatistics.known(block.linears, squares)

    def save(self, path: Path, inputs_sha256: str) -> None:
        """Write a safetensors file that says which model and text it was measured from."""
        apart = {name: square.clone() for name, square in self.squares.items()}  # linears with one input share theirs
        with written_whole(path) as temporary:  # levels of a sweep may write it at once
            save_file(apart, temporary, {_INPUTS: inputs_sha256})

    @classmethod
    def load(cls, path: Path, inputs_sha256: str) -> DenseStatistics | None:
        """What `save` wrote, if it was measured from these inputs."""
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(_INPUTS) != inputs_sha256:
                return None
            return cls({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # not a dict


@torch.no_grad()
def measure_dense(
    model: PreTrainedModel,
    blocks: list[Block],
    ids: NDArray[np.int64],
    weights: BlockWeights,
    reporter: Reporter = SILENT,
) -> DenseStatistics:
    """Run the calibration windows `ids` [n, length] through the dense model once."""
    squares: dict[str, torch.Tensor] = {}
    stream = weights.stream(model, blocks, ids)
    for index, block in enumerate(reporter.track(blocks, "input statistics of the dense model")):
        with weights.held(block):
            statistics = InputStatistics(block.linears, {"squares"})
            if index + 1 < len(blocks):
                stream.advance(block, statistics)
            else:
                stream.collect(block, statistics)
            for name in block.linears:
                squares[block.full_name(name)] = statistics.mean_square(name).cpu()
    return DenseStatistics(squares)
