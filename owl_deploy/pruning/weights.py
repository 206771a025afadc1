"""Where a model's blocks are while they are pruned: all in memory, or (`offload`) one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.models.structure import Block
from owl_deploy.pruning.calibration.stream import CalibrationStream, in_fp32


class BlockWeights(Protocol):
    """Gives a block its weights for a while."""

    def held(self, block: Block) -> contextlib.AbstractContextManager[None]:
        """The block's weights in fp32, where it computes; what is changed in them stays changed."""
        ...

    def stream(self, model: PreTrainedModel, blocks: list[Block], ids: NDArray[np.int64]) -> CalibrationStream:
        """The calibration windows `ids` [n, length], embedded up to the first block."""
        ...


class InMemory:
    """The whole model in memory in its own dtype; one block at a time is in fp32 on the device."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def held(self, block: Block) -> contextlib.AbstractContextManager[None]:
        return in_fp32(block.module, self._device)

    def stream(self, model: PreTrainedModel, blocks: list[Block], ids: NDArray[np.int64]) -> CalibrationStream:
        return CalibrationStream(model, blocks, ids, self._device)


@contextlib.contextmanager
def restored(blocks: Sequence[Block]) -> Iterator[None]:
    """Give the blocks' linears, at the end, the weights they have now. It holds a copy of them all."""
    before = [(linear, linear.weight.data.clone()) for block in blocks for linear in block.linears.values()]
    try:
        yield
    finally:
        for linear, weight in before:
            linear.weight.data = weight
