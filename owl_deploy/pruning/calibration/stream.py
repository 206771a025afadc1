"""Calibration sequences on their way through a decoder, one block at a time.

Only the current hidden states are held, and one block's weights in fp32: memory is bounded by the model, in its
own dtype, plus one block's activations. Neither the model nor the activations need be in memory (`--offload`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from owl_deploy.errors import UserError
from owl_deploy.models.structure import Block
from owl_deploy.pruning.calibration.spill import Tensors
from owl_deploy.pruning.calibration.statistics import InputStatistics

Held = Callable[[Block], AbstractContextManager[None]]
"""Where a block's weights are there, in fp32."""
Watch = Callable[[int, torch.Tensor], AbstractContextManager[None]]
"""What surrounds the block's forward pass of one sequence: its position, and its hidden states before the block."""


_Calls = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
"""By block: the arguments after the hidden states, and the keyword arguments."""


class _Captured(Exception):
    """Ends a forward pass once all is known that it was made for."""


class CalibrationStream:
    """Hidden states of n sequences, before some block; `collect` and `advance` move them through it.

    Each block is called with its own keyword arguments (masks differ per layer type in sliding-window families), which
    are those of the first sequence for all.
    All arithmetic is fp32, whatever the checkpoint's dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: list[Block],
        ids: NDArray[np.int64],
        device: str = "cpu",
        *,
        held: Held | None = None,
        new_store: Callable[[], Tensors] = list,
    ) -> None:
        """Embed `ids` [n, length] up to the first block.

        The blocks' own weights are not used for it, but for the first one's, while `held`.

        Args:
            new_store: makes what sequences' activations are kept in.

        Raises:
            UserError: the model passes its blocks arguments that depend on the tokens.
        """
        model.config.use_cache = False
        sequences = [torch.from_numpy(row)[None] for row in ids]
        arguments, keywords = _to(_first_call(model, blocks, sequences[0]), device)
        with held(blocks[0]) if held else in_fp32(blocks[0].module, device):
            output = blocks[0].module(*arguments, **keywords)
        self._beside = output[1:] if isinstance(output, tuple) else None
        calls = _record_calls(model, blocks, sequences[0], self._beside)
        other = next((sequence for sequence in sequences[1:] if not torch.equal(sequence, sequences[0])), None)
        if other is not None:
            _refuse_token_dependent(model, blocks, calls, _record_calls(model, blocks, other, self._beside))
        self._calls = _to(calls, device)
        self.new_store = new_store
        self._hidden = new_store()
        for sequence in sequences:
            self._hidden.append(_to(_hidden_of(*_first_call(model, blocks, sequence)), device))

    def __len__(self) -> int:
        return len(self._hidden)

    @property
    def hidden(self) -> Tensors:
        """The hidden states [1, length, hidden] of every sequence, as they are now."""
        return self._hidden

    def run(self, block: Block, index: int) -> torch.Tensor:
        """What the block puts out for one sequence; the stream stays before the block."""
        return self._run(block, self._hidden[index])

    def twin(self) -> CalibrationStream:
        """A second stream from the same place."""
        twin = copy.copy(self)
        twin._hidden = self.new_store()
        for hidden in self._hidden:
            twin._hidden.append(hidden)
        return twin

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
            moved = self._hidden[index] = self._run(block, hidden)
            yield index, hidden, moved

    def logits(self, model: PreTrainedModel, blocks: list[Block], ids: NDArray[np.int64]) -> Iterator[torch.Tensor]:
        """The model's logits [1, length, vocabulary] of each sequence of `ids`, once the stream is past all blocks.

        The blocks are not run again: what is outside them is, on the CPU.
        """
        for row, hidden in zip(ids, self._hidden, strict=True):
            states = hidden.cpu()
            with _standing_in(blocks, lambda *_, states=states, **__: _output(states, self._beside)):
                yield model(torch.from_numpy(row)[None], use_cache=False).logits

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


@contextlib.contextmanager
def _standing_in(blocks: list[Block], forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward(block's position, *arguments, **keywords)` stand for the blocks' own forward passes."""
    for index, block in enumerate(blocks):
        block.module.forward = functools.partial(forward, index)
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward


def _hidden_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = arguments[0] if arguments else keywords["hidden_states"]
    return hidden


def _output(hidden: torch.Tensor, beside: tuple[Any, ...] | None) -> Any:
    """A block's output: hidden states, alone or first of a tuple."""
    return hidden if beside is None else (hidden, *beside)


def _first_call(
    model: PreTrainedModel, blocks: list[Block], sequence: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model calls its first block with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def capture(_: int, *arguments: Any, **keywords: Any) -> None:
        calls.append((arguments, keywords))
        raise _Captured

    with _standing_in(blocks[:1], capture), contextlib.suppress(_Captured):
        model(sequence, use_cache=False)
    return calls[0]


def _record_calls(
    model: PreTrainedModel, blocks: list[Block], sequence: torch.Tensor, beside: tuple[Any, ...] | None
) -> _Calls:
    """What the model passes to each block beside the hidden states.

    It does not depend on the hidden states: these go past all blocks as they came to the first.
    """
    calls: _Calls = {}

    def record(index: int, *arguments: Any, **keywords: Any) -> Any:
        rest = {key: value for key, value in keywords.items() if key != "hidden_states"}
        calls[blocks[index].name] = (arguments[1:], rest)
        if index + 1 == len(blocks):
            raise _Captured
        return _output(_hidden_of(arguments, keywords), beside)

    with _standing_in(blocks, record), contextlib.suppress(_Captured):
        model(sequence, use_cache=False)
    return calls


def _refuse_token_dependent(model: PreTrainedModel, blocks: list[Block], calls: _Calls, others: _Calls) -> None:
    """Refuse a family whose blocks are called with other arguments for other tokens (Gemma 3n's per-layer inputs)."""
    for block in blocks:
        named, other = _by_name(block, *calls[block.name]), _by_name(block, *others[block.name])
        for name in {**named, **other}:
            if not _same(named.get(name), other.get(name)):
                raise UserError(
                    f"{type(model).__name__}: {block.name} is called with a {name} that depends on the tokens, so that "
                    "blocks cannot be run one by one, as calibration and --offload do; --method magnitude "
                    "--allocation uniform needs neither"
                )


def _by_name(block: Block, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments by the names of its parameters; the first one is for the hidden states."""
    parameters = [name for name in inspect.signature(type(block.module).forward).parameters if name != "self"]
    names = itertools.chain(parameters[1:], map("argument {}".format, itertools.count(len(parameters))))
    return {**dict(zip(names, arguments, strict=False)), **keywords}


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal: tensors by shape and value, objects that do not say by what is in them."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    equality: object = type(one).__eq__
    if equality is object.__eq__:  # caches
        return _same(getattr(one, "__dict__", {}), getattr(other, "__dict__", {}))
    return bool(one == other)


def _to(value: Any, device: str) -> Any:
    """`value` with every tensor in it on the device, and in fp32 where it is floating-point."""
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
