"""Training the weights that pruning has kept. Weights that are 0 stay 0: their gradients are set to 0.

What a step does depends on its number alone: the order of the text and all that is drawn come from the seed and that
number. So a run that continues from a saved state makes the bytes of one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from owl_deploy.errors import CheckFailed
from owl_deploy.files import written_whole
from owl_deploy.models.shards import write_shard
from owl_deploy.models.structure import set_matrix
from owl_deploy.records import Record
from owl_deploy.recovery.losses import cross_entropy, kl, squarehead
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.recovery.processes import ALONE, Processes
from owl_deploy.recovery.teacher import Teacher, seen
from owl_deploy.recovery.weights import WhatIsTrained
from owl_deploy.rounding import GRIDS

_LOG = "log"
_MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS = (0.9, 0.95)
"""AdamW's."""


class StepRecord(Record):
    """One step of a training."""

    step: int
    """From 1."""
    tokens: int
    """Trained on so far."""
    loss: float
    """The sum of those below, by their weights."""
    kl: float
    hidden: float
    cross_entropy: float
    perplexity: float | None = None
    """On the held-out windows, where it was measured after this step."""


_Log = TypeAdapter(list[StepRecord])


class Diverged(CheckFailed):
    """The loss, or a gradient, is not a number."""

    def __init__(self, number: int, what: str = "step") -> None:
        super().__init__(f"{what} {number}: the loss or its gradient is not a finite number")


@dataclass(frozen=True)
class _Trained:
    """One parameter of the model and what the optimizer moves: itself, or the fp32 weights that it is made from."""

    name: str
    parameter: nn.Parameter
    master: torch.Tensor
    is_pruned: bool

    @property
    def has_master(self) -> bool:
        return self.master is not self.parameter


class Trainer:
    """A sparse model that is trained towards its dense one.

    Attributes:
        log: what every step so far came to.
        processes: those that train together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        what: WhatIsTrained,
        teacher: Teacher,
        plan: RecoveryPlan,
        processes: Processes = ALONE,
    ) -> None:
        """Train `what` there is in `model`, which is in fp32, towards the teacher's and in its dtype.

        Args:
            processes: that make the same steps with a trainer of their own.
        """
        dtype = teacher.model.dtype
        self.log: list[StepRecord] = []
        self._model, self._what, self._teacher, self._plan = model, what, teacher, plan
        self.processes = processes
        self._grid = GRIDS[plan.weights] if plan.weights else None
        self._trained = list(self._with_masters(dtype))
        self._frozen = [(one, one.data) for one in model.parameters() if not one.requires_grad]
        for parameter in (*model.parameters(), *what.parameters.values()):  # not buffers, such as rotary frequencies
            parameter.data = parameter.data.to(dtype)
        self._show()
        self._optimizer = torch.optim.AdamW(
            [one.master for one in self._trained], plan.peak, BETAS, weight_decay=plan.decay, fused=True
        )

    @property
    def parameters(self) -> int:
        """How many weights are trained: those that are not pruned."""
        return sum(int(torch.count_nonzero(one.master)) for one in self._trained)

    def step(self, ids: NDArray[np.int64]) -> StepRecord:
        """Train on the sequences `ids` [batch, seqlen] of the next step; the record is added to the log.

        Of several processes each takes its share of the micro-batches, and all come to the same weights.

        Raises:
            Diverged: the loss or its gradient is not finite; no weight has changed.
        """
        number, plan = len(self.log), self._plan
        self._optimizer.param_groups[0]["lr"] = plan.learning_rate_at(number)
        parts = np.zeros(3)
        micro_batches = torch.from_numpy(ids).to(self._model.device).split(plan.micro_batch)  # type: ignore[no-untyped-call]
        for index, sequences in enumerate(micro_batches):
            if not self.processes.has(index):
                continue
            rng = np.random.default_rng([plan.seed, number, index])
            losses = self._losses(sequences, rng)
            weighted = plan.kl * losses[0] + plan.hidden * losses[1] + plan.cross_entropy * losses[2]
            (weighted / len(micro_batches)).backward()  # type: ignore[no-untyped-call]
            parts += [float(loss.detach()) / len(micro_batches) for loss in losses]
        summed = torch.from_numpy(parts).to(self._model.device)
        self.processes.add_up(summed)
        parts = summed.cpu().numpy()
        self._move(number + 1, is_finite=bool(np.isfinite(parts).all()))
        record = StepRecord(
            step=number + 1,
            tokens=(number + 1) * plan.tokens_per_step,
            loss=float(parts @ [plan.kl, plan.hidden, plan.cross_entropy]),
            kl=parts[0],
            hidden=parts[1],
            cross_entropy=parts[2],
        )
        self.log.append(record)
        return record

    def finish(self, *, merge: bool) -> PreTrainedModel:
        """The trained model, in fp32 and on its grid; with `merge`, all that was trained is in its weights."""
        for frozen, data in self._frozen:
            frozen.data = data
        for one in self._trained:
            one.parameter.data = one.parameter.data.float()
        self._show()
        self._model.requires_grad_(False)
        if merge:
            self._what.merge()
        return self._model

    def save(self, path: Path) -> None:
        """Keep all that the next step depends on; whole, or not at all."""
        with written_whole(path) as temporary:
            tensors = dict(self._state())
            write_shard(temporary, tensors, tensors.items(), {_LOG: _Log.dump_json(self.log).decode()})

    def restore(self, path: Path) -> bool:
        """Continue from what was saved; false if nothing was."""
        try:
            with safe_open(path, framework="pt") as file:
                self.log = _Log.validate_json(file.metadata()[_LOG])
                for one in self._trained:
                    moments = {name: file.get_tensor(f"{one.name}.{name}") for name in _MOMENTS}
                    step = torch.tensor(float(len(self.log)))
                    self._optimizer.state[one.master] = {"step": step, **moments}
                    one.master.data.copy_(file.get_tensor(one.name))
        except (FileNotFoundError, SafetensorError):
            return False
        self._show()
        return True

    def share(self) -> bool:
        """Let every process go on from the main one's state; false if that one has nothing to train."""
        log = self.processes.from_main(self.log)
        if log is None:
            return False
        if self.processes.count == 1 or not log:
            return True
        self.log = log
        for one in self._trained:
            state = self._optimizer.state[one.master]
            moments = {name: state[name] if name in state else torch.zeros_like(one.master) for name in _MOMENTS}
            for tensor in (one.master.data, *moments.values()):
                self.processes.take(tensor)
            self._optimizer.state[one.master] = {"step": torch.tensor(float(len(log))), **moments}
        self._show()
        return True

    def restore_weights(self, path: Path) -> None:
        """Take the weights, and nothing else, of what was saved."""
        with safe_open(path, framework="pt") as file:
            for one in self._trained:
                one.master.data.copy_(file.get_tensor(one.name))
        self._show()

    def _with_masters(self, dtype: torch.dtype) -> Iterator[_Trained]:
        """What is trained, with fp32 weights of its own where the model's are rounded or of another dtype."""
        for name, parameter in self._what.parameters.items():
            parameter.requires_grad_(True)
            is_pruned = name.removesuffix(".weight") in self._what.linears
            apart = dtype != torch.float32 or (is_pruned and self._grid is not None)
            yield _Trained(name, parameter, parameter.detach().clone() if apart else parameter, is_pruned)

    def _losses(self, sequences: torch.Tensor, rng: np.random.Generator) -> list[torch.Tensor]:
        """`kl`, `hidden` and `cross_entropy` of sequences [n, seqlen]; those of no weight are not computed."""
        plan, length = self._plan, sequences.shape[1]
        count = max(1, round(plan.positions * (length - 1)))
        drawn = np.sort(rng.choice(length - 1, count, replace=False))
        positions = torch.from_numpy(drawn).to(sequences.device)
        self._what.draw(int(rng.integers(2**31)))
        ours = seen(self._model, sequences, positions, plan)
        self._what.draw(None)
        theirs = self._teacher.seen(sequences, positions) if plan.kl or plan.hidden else ours
        none = torch.zeros((), device=sequences.device)
        return [
            kl(ours, theirs) if plan.kl else none,
            squarehead(ours, theirs) if plan.hidden else none,
            cross_entropy(ours, sequences[:, positions + 1]) if plan.cross_entropy else none,
        ]

    def _move(self, number: int, *, is_finite: bool) -> None:
        """One step of the optimizer, by the gradients of the model's parameters."""
        for one in self._trained:
            gradient = one.parameter.grad
            if gradient is None:  # an expert that no token reached
                gradient = torch.zeros_like(one.parameter)
            if one.has_master:
                gradient, one.parameter.grad = gradient.float(), None
            self.processes.add_up(gradient)
            if one.is_pruned:
                gradient.masked_fill_(one.master.detach() == 0, 0)
            one.master.grad = gradient
        norm = nn.utils.clip_grad_norm_([one.master for one in self._trained], self._plan.clip)
        if not (is_finite and math.isfinite(norm)):
            self._optimizer.zero_grad()
            raise Diverged(number)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        """Let the model compute with the weights as they are now: rounded, in its own dtype."""
        for one in self._trained:
            if not one.has_master:
                continue
            if one.is_pruned and self._grid is not None:
                linear = self._what.linears[one.name.removesuffix(".weight")]
                matrix = one.master.T if isinstance(linear, Conv1D) else one.master
                set_matrix(linear, self._grid.rounded(matrix).to(one.parameter.dtype))
            else:
                one.parameter.data.copy_(one.master)

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for one in self._trained:
            yield one.name, one.master.detach()
            state = self._optimizer.state[one.master]
            for name in _MOMENTS:
                yield f"{one.name}.{name}", state[name].detach() if name in state else torch.zeros_like(one.master)
