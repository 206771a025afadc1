"""What the dense model makes of the text: computed once for a window, and kept where the text is repeated.

A pass through the dense model costs a quarter of a step. Its last hidden states are small beside its logits, which its
head makes of them again at the positions that are asked for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from transformers import PreTrainedModel

from owl_deploy.models.logits import forward_at
from owl_deploy.recovery.losses import Seen
from owl_deploy.recovery.plan import RecoveryPlan

_SPARE_DISK = 4
"""Of the bytes that states take, how many must be free."""


def seen(model: PreTrainedModel, sequences: torch.Tensor, positions: torch.Tensor, plan: RecoveryPlan) -> Seen:
    """What a pass of `sequences` [n, length] shows of a model to the plan's losses; logits at `positions` [p]."""
    output = forward_at(model, sequences, positions, output_hidden_states=bool(plan.hidden))
    hidden = output.hidden_states or ()
    return Seen(hidden[-1:] if plan.states == "last" else hidden[1:], output.logits)


class Teacher:
    """The dense model, as the losses see it."""

    def __init__(self, model: PreTrainedModel, plan: RecoveryPlan) -> None:
        self.model, self._plan = model, plan

    @torch.no_grad()
    def seen(self, sequences: torch.Tensor, positions: torch.Tensor) -> Seen:
        """Hidden states and logits of `sequences` [n, length], the latter at `positions` [p]."""
        return seen(self.model, sequences, positions, self._plan)


class RememberingTeacher(Teacher):
    """It keeps the last hidden states of every window in a file, from where a later run takes them too.

    A window goes through the model alone, so that its states do not depend on what else is in its batch.
    """

    def __init__(self, model: PreTrainedModel, plan: RecoveryPlan, ids: NDArray[np.int64], directory: Path) -> None:
        """Keep the states of the windows `ids` [n, length] in `directory`, which exists."""
        super().__init__(model, plan)
        self._places = {window.tobytes(): place for place, window in enumerate(ids)}
        self._is_there = _opened(directory / "dense.there.npy", (len(ids),), np.uint8)
        self._states = _opened(directory / "dense.npy", _shape(model, ids), _stored(model))

    @torch.no_grad()
    def seen(self, sequences: torch.Tensor, positions: torch.Tensor) -> Seen:
        hidden = torch.cat([self._remembered(sequence[None], positions) for sequence in sequences])
        return Seen((hidden,), _head(self.model, hidden, positions))

    def _remembered(self, sequence: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The last hidden states of a window [1, length]."""
        place = self._places[sequence.cpu().numpy().tobytes()]
        if not self._is_there[place]:
            output = forward_at(self.model, sequence, positions[:1], output_hidden_states=True)
            self._states[place] = _bits(output.hidden_states[-1][0])
            self._is_there[place] = 1
        states = torch.from_numpy(np.array(self._states[place])).view(self.model.dtype)
        return states[None].to(self.model.device)


def teacher_of(model: PreTrainedModel, plan: RecoveryPlan, ids: NDArray[np.int64], directory: Path) -> Teacher:
    """One that remembers, where the windows `ids` [n, length] are trained on more than once and nothing is against it.

    Against it are losses on all blocks' states, a disk that is too full, and a model that does more to its last hidden
    states than its head does.
    """
    is_repeated = plan.steps * plan.batch > len(ids)
    if not (is_repeated and plan.states == "last" and (plan.kl or plan.hidden)):
        return Teacher(model, plan)
    needed = int(np.prod(_shape(model, ids))) * _stored(model).itemsize
    if shutil.disk_usage(directory).free < _SPARE_DISK * needed or not _is_only_head(model, ids[:1]):
        return Teacher(model, plan)
    return RememberingTeacher(model, plan, ids, directory)


@torch.no_grad()
def _is_only_head(model: PreTrainedModel, ids: NDArray[np.int64]) -> bool:
    """Whether the logits of a window are the head's product with the last hidden states (no cap, no factor)."""
    positions = torch.arange(min(8, ids.shape[1]), device=model.device)
    output = forward_at(model, torch.from_numpy(ids).to(model.device), positions, output_hidden_states=True)
    return torch.allclose(_head(model, output.hidden_states[-1], positions), output.logits, rtol=1e-2, atol=1e-2)


def _head(model: PreTrainedModel, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.get_output_embeddings()(hidden[:, positions])
    return logits


def _shape(model: PreTrainedModel, ids: NDArray[np.int64]) -> tuple[int, ...]:
    return (*ids.shape, model.config.get_text_config().hidden_size)


def _stored(model: PreTrainedModel) -> np.dtype[np.int16] | np.dtype[np.float32]:
    """bf16, which numpy lacks, is stored as integers."""
    return np.dtype(np.int16) if model.dtype.itemsize == 2 else np.dtype(np.float32)


def _bits(states: torch.Tensor) -> NDArray[np.generic]:
    states = states.cpu()
    return (states.view(torch.int16) if states.dtype.itemsize == 2 else states).numpy()


def _opened(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """A file of zeros, or what an earlier run has left in it."""
    if not path.is_file():
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
    return np.lib.format.open_memmap(path, mode="r+")
