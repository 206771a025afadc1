"""A recovered model as a checkpoint, with the promise that it has the zeros of the sparse one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.errors import CheckFailed
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import Block
from owl_deploy.pruning.manifest import MANIFEST as PRUNING
from owl_deploy.recovery.recipe import write_recipe


class Zeros:
    """Where the linears of blocks are 0, a bit for each weight."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._of = {block.full_name(name): _bits(block, name) for block in blocks for name in block.linears}

    def lost(self, blocks: Sequence[Block]) -> list[str]:
        """The names of linears in which a weight that was 0 is no longer."""
        return [
            block.full_name(name)
            for block in blocks
            for name in block.linears
            if (self._of[block.full_name(name)] & ~_bits(block, name)).any()
        ]


def _bits(block: Block, name: str) -> NDArray[np.uint8]:
    return np.packbits((block.linears[name].weight.detach() == 0).cpu().numpy())


def save_model(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    zeros: Zeros,
    stored: Mapping[str, torch.dtype] | None,
    directory: Path,
) -> None:
    """Write weights and config, parameters in the dtypes that they were `stored` in; None: in fp32.

    Raises:
        CheckFailed: a zero is lost.
    """
    for name, parameter in model.named_parameters():
        if stored is not None:
            parameter.data = parameter.data.to(stored[name])
    if lost := zeros.lost(blocks):
        raise CheckFailed(f"{lost[0]} and {len(lost) - 1} more linears have lost zeros; nothing was written")
    model.save_pretrained(directory, safe_serialization=True, max_shard_size="5GB")


def save_beside_model(sparse: ModelSource, blocks: Sequence[Block], directory: Path) -> None:
    """Carry over how the checkpoint was pruned, and add this stage to its recipe."""
    if (sparse.path / PRUNING).is_file():
        shutil.copyfile(sparse.path / PRUNING, directory / PRUNING)
    write_recipe(directory, sparse.path, blocks)
