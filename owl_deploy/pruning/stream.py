"""Calibration sequences on their way through a decoder, one block at a time.

Only the current hidden states are held, and one block's weights in fp32: memory is bounded by the model, in its
own dtype, plus one block's activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from owl_deploy.checkpoints.structure import Block
from owl_deploy.pruning.statistics import InputStatistics

Watch = Callable[[int, torch.Tensor], AbstractContextManager[None]]
"""What surrounds the block's forward pass of one sequence: its position, and its hidden states before the block."""


class _Captured(Exception):
    """Ends a forward pass once the first block's input is known."""


class CalibrationStream:
    """Hidden states of n sequences, before some block; `collect` and `advance` move them through it.

    Each block is called with its own keyword arguments (masks differ per layer type in sliding-window families).
    All arithmetic is fp32, whatever the checkpoint's dtype.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: list[Block], ids: NDArray[np.int64], device: str = "cpu"
    ) -> None:
        """Embed `ids` [n, length] up to the first block."""
        model.config.use_cache = False
        sequences = [torch.from_numpy(row)[None] for row in ids]
        self._calls = _to(_record_calls(model, blocks, sequences[0]), device)
        self._hidden = [_to(_first_block_input(model, blocks[0], sequence), device) for sequence in sequences]

    def __len__(self) -> int:
        return len(self._hidden)

    def twin(self) -> CalibrationStream:
        """A second stream from the same place."""
        copy = object.__new__(CalibrationStream)
        copy._calls, copy._hidden = self._calls, list(self._hidden)
        return copy

    def collect(self, block: Block, statistics: InputStatistics, watch: Watch | None = None) -> None:
        """Collect statistics of the block's inputs; the stream stays before the block."""
        for index, hidden in enumerate(self._hidden):
            with watch(index, hidden) if watch else contextlib.nullcontext(), statistics.collecting(stop_early=True):
                self._run(block, hidden)

    def advance(self, block: Block, statistics: InputStatistics | None = None) -> None:
        """Move the stream past the block, collecting on the way if asked to."""
        for index, hidden in enumerate(self._hidden):
            with statistics.collecting() if statistics else contextlib.nullcontext():
                self._hidden[index] = self._run(block, hidden)

    def leaders(self, block: Block) -> dict[str, str]:
        """Of each linear that the first sequence reaches, in order: the first one fed by the same tensor."""
        statistics = InputStatistics(block.linears, ())
        with statistics.collecting():
            self._run(block, self._hidden[0])
        return statistics.leaders

    def watched(self, block: Block) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Move the stream past the block; position, hidden states before and after it, of one sequence at a time."""
        for index, hidden in enumerate(self._hidden):
            self._hidden[index] = self._run(block, hidden)
            yield index, hidden, self._hidden[index]

    def _run(self, block: Block, hidden: torch.Tensor) -> torch.Tensor:
        arguments, keywords = self._calls[block.name]
        output = block.module(hidden, *arguments, **keywords)
        moved: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return moved


@contextlib.contextmanager
def in_fp32(module: nn.Module, device: str = "cpu") -> Iterator[None]:
    """Hold a block's parameters and buffers in fp32 on a device; each returns to its own dtype, and to the CPU."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    dtypes = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device, torch.float32)
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to("cpu", dtype)


def _record_calls(
    model: PreTrainedModel, blocks: list[Block], sequence: torch.Tensor
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the model passes to each block beside the hidden states, from one whole forward pass."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def recorder(name: str) -> Any:
        def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            rest = {key: value for key, value in keywords.items() if key != "hidden_states"}
            calls[name] = (arguments[1:], rest)

        return before

    handles = [block.module.register_forward_pre_hook(recorder(block.name), with_kwargs=True) for block in blocks]
    try:
        model(sequence, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first_block_input(model: PreTrainedModel, block: Block, sequence: torch.Tensor) -> torch.Tensor:
    captured: list[torch.Tensor] = []

    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        captured.append(arguments[0] if arguments else keywords["hidden_states"])
        raise _Captured

    handle = block.module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        model(sequence, use_cache=False)
    except _Captured:
        pass
    finally:
        handle.remove()
    return captured[0]


def _to(value: Any, device: str) -> Any:
    """`value` with every tensor in it on the device, and in fp32 where it is floating-point."""
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
