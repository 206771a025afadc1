"""What ADMM lets a linear reproduce: the dense model's own stream, the residual error so far included.

The dense model's activations travel beside the pruned model's. A linear is fitted to `T = X_dense W0^T`, what it puts
out in the dense model; one that writes into the residual stream also takes over the error that the stream has
gathered: `T + R_dense - R_pruned`, where R is the stream as that linear finds it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from owl_deploy.models.structure import Block, Linear, matrix_of, without_indices
from owl_deploy.pruning.calibration.spill import Tensors
from owl_deploy.pruning.calibration.stream import CalibrationStream

_MOST_CANDIDATES = 6
_SAME_STREAM = 1e-3


@dataclass
class DenseBlock:
    """What one block of the dense model did, per sequence.

    Attributes:
        writers: the linears whose outputs add up with the block's input to its output, in the order they are called.
            Empty where no such sum gives the output (a norm after the projection, a scaled residual).
        written: by writer, the stream once it has written, but for its bias: [1, tokens, hidden].
        leaders: of each other linear, the first one that is fed by the same tensor. Experts, which do not see every
            token, are left out.
        inputs: by leader, its inputs [..., in].
    """

    writers: tuple[str, ...] = ()
    written: dict[str, Tensors] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Tensors] = field(default_factory=dict)


def observe(stream: CalibrationStream, block: Block) -> DenseBlock:
    """Move the dense stream past a block that is not pruned yet, and keep what later targets need."""
    seen = DenseBlock()
    with _recording(block.linears) as (inputs, outputs):
        for index, before, after in stream.watched(block):
            if index == 0:
                seen.writers = _writers(before, after, outputs)
                seen.written = {name: stream.new_store() for name in seen.writers}
                others = [name for name in inputs if name not in seen.writers and name == without_indices(name)]
                seen.leaders = _leaders({name: inputs[name] for name in others})
                seen.inputs = {leader: stream.new_store() for leader in seen.leaders.values()}
            found = before
            for name in seen.writers:
                found = found + outputs[name].view_as(found)
                seen.written[name].append(found - _bias(block.linears[name]))
            for leader, kept in seen.inputs.items():
                kept.append(inputs[leader])
            inputs.clear()
            outputs.clear()
    return seen


def _leaders(inputs: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Of each linear, the first one whose input is the very same tensor."""
    return {name: next(first for first in inputs if inputs[first] is inputs[name]) for name in inputs}


def _bias(linear: Linear) -> torch.Tensor | float:
    return 0.0 if linear.bias is None else linear.bias


def _writers(before: torch.Tensor, after: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The linears whose outputs make up the difference between a block's input and output, if some do."""
    shapes = {name: (output.shape[-1], output.numel()) for name, output in outputs.items()}
    candidates = [name for name in outputs if shapes[name] == (after.shape[-1], after.numel())][-_MOST_CANDIDATES:]
    for count in range(1, len(candidates) + 1):
        for names in itertools.combinations(candidates, count):
            sum_of = before + sum(outputs[name].view_as(after) for name in names)
            if (sum_of - after).norm() <= _SAME_STREAM * (after - before).norm():
                return names
    return ()


@contextlib.contextmanager
def _recording(linears: Mapping[str, Linear]) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Inputs and outputs of every linear in the latest forward pass, by name, in the order of the calls."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def recorder(name: str) -> Any:
        def after(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs[name], outputs[name] = arguments[0], output

        return after

    handles = [linear.register_forward_hook(recorder(name)) for name, linear in linears.items()]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


class DenseTargets:
    """`T^T X` of some linears of a block, as a running mean in the unit of `InputStatistics.hessian`."""

    def __init__(self, block: Block, linears: Mapping[str, Linear], dense: DenseBlock) -> None:
        self._block = block
        self._linears = linears
        self._dense = dense
        self._of_writers: dict[str, torch.Tensor] = {}
        self._of_leaders: dict[str, torch.Tensor] = {}
        self._sequences = 0

    @contextlib.contextmanager
    def watch(self, index: int, hidden: torch.Tensor) -> Iterator[None]:
        """Collect from the pruned block's forward pass of sequence `index`; `hidden` is its stream before the block."""
        self._sequences = index + 1
        self._stream = hidden
        self._added: set[str] = set()
        handles = [
            linear.register_forward_pre_hook(self._reader(name, index))
            for name, linear in self._linears.items()
            if name in self._dense.writers or name in self._dense.leaders
        ]
        handles += [self._block.linears[name].register_forward_hook(self._writer) for name in self._dense.writers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def correlation(self, name: str) -> torch.Tensor | None:
        """`T^T X` [out, in]; None for a linear that did not see every token, which keeps its own output as target."""
        if name in self._of_writers:
            return self._of_writers[name]
        if name not in self._dense.leaders:
            return None
        return matrix_of(self._linears[name]) @ self._of_leaders[self._dense.leaders[name]]

    def _reader(self, name: str, index: int) -> Any:
        def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs = arguments[0]
            if name in self._dense.writers:
                wanted = self._dense.written[name][index] - self._stream
                self._of_writers[name] = self._mean(self._of_writers.get(name), wanted, inputs)
                return
            leader = self._dense.leaders[name]
            if leader not in self._added:  # linears fed by the same tensor share it
                self._added.add(leader)
                dense = self._dense.inputs[leader][index]
                self._of_leaders[leader] = self._mean(self._of_leaders.get(leader), dense, inputs)

        return before

    def _writer(self, _: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._stream = self._stream + output.view_as(self._stream)

    def _mean(self, mean: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Take `2 left^T right` of one sequence into a running mean over sequences."""
        scale = math.sqrt(2 / self._sequences)
        product = (scale * _rows(left)).T @ (scale * _rows(right))
        return product if mean is None else mean * ((self._sequences - 1) / self._sequences) + product


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
