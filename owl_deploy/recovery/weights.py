"""What a recovery trains: every weight that was kept, or low-rank changes of some linears (LoRA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from owl_deploy.errors import UserError
from owl_deploy.models.structure import Block, Linear, linears_of, matrix_of, set_matrix
from owl_deploy.recovery.plan import RecoveryPlan


class WhatIsTrained(Protocol):
    """What the optimizer moves, and how it becomes weights of the model.

    Attributes:
        parameters: by name; those that are a linear's weight have its path and `.weight` for a name.
        linears: whose weights these are: what is 0 in them is not moved, and the others may be rounded. By path.
    """

    parameters: dict[str, nn.Parameter]
    linears: dict[str, Linear]

    def draw(self, seed: int | None) -> None:
        """Draw what is random about the next forward pass by this seed; None: nothing is."""
        ...

    def merge(self) -> None:
        """Let the model's own weights be the trained ones."""
        ...


class KeptWeights:
    """All parameters but embeddings and the head: the blocks' linears, their biases, and the norms."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block]) -> None:
        self.linears = linears_of(blocks)
        head = model.get_output_embeddings()
        frozen = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, nn.Embedding) or module is head
            for parameter in module.parameters()
        }
        self.parameters = {name: one for name, one in model.named_parameters() if id(one) not in frozen}

    def draw(self, seed: int | None) -> None:
        """Nothing is random."""

    def merge(self) -> None:
        """They are the model's own."""


class LowRank:
    """LoRA (Hu et al. 2021), masked: `W + mask * (alpha / r) B A`, so that merging keeps every zero.

    The inputs of the change, not those of `W`, go through dropout. At first `B` is 0, and the model what it was.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        targets: Sequence[str],
        *,
        rank: int,
        alpha: float,
        dropout: float,
        masked: bool,
        seed: int,
    ) -> None:
        """Change the linears whose path in their block ends with one of `targets`.

        Args:
            masked: without it the change is plain LoRA's, for an adapter beside the sparse weights.

        Raises:
            UserError: a target names no linear.
        """
        self.linears: dict[str, Linear] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._scale, self._dropout, self._masked = alpha / rank, dropout, masked
        self._generator: torch.Generator | None = None
        self._targets = _named(blocks, targets)
        rng = torch.Generator().manual_seed(seed)
        self._hooks = []
        for path, linear in self._targets.items():
            rows, columns = matrix_of(linear).shape
            bound = 1 / math.sqrt(columns)  # as PEFT initialises A
            down = (torch.rand(rank, columns, generator=rng) * 2 - 1) * bound
            self.parameters[f"{path}.lora_A.weight"] = nn.Parameter(down.to(linear.weight.device))
            self.parameters[f"{path}.lora_B.weight"] = nn.Parameter(
                torch.zeros(rows, rank, device=linear.weight.device)
            )
            self._hooks.append(linear.register_forward_hook(self._hook(path)))

    def draw(self, seed: int | None) -> None:
        """Which inputs are dropped."""
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the changes to the weights, and stop computing them."""
        for hook in self._hooks:
            hook.remove()
        for path, linear in self._targets.items():
            weight = matrix_of(linear)
            set_matrix(linear, torch.where(weight != 0, weight + self._change(path, linear).to(weight.dtype), weight))

    def _change(self, path: str, linear: Linear) -> torch.Tensor:
        """[out, in]"""
        change = self._scale * (self.parameters[f"{path}.lora_B.weight"] @ self.parameters[f"{path}.lora_A.weight"])
        return change.masked_fill(matrix_of(linear) == 0, 0) if self._masked else change

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], torch.Tensor]:
        def add(linear: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            assert isinstance(linear, nn.Linear | Conv1D)
            x = inputs[0]
            if self._generator is not None and self._dropout:
                kept = torch.rand(x.shape, generator=self._generator) >= self._dropout
                x = x * kept.to(x.device, x.dtype) / (1 - self._dropout)
            return output + functional.linear(x, self._change(path, linear).to(x.dtype))

        return add


def what_is_trained(model: PreTrainedModel, blocks: Sequence[Block], plan: RecoveryPlan) -> WhatIsTrained:
    """By the plan's method.

    Raises:
        UserError: the plan names linears that the model does not have.
    """
    if plan.method == "full":
        return KeptWeights(model, blocks)
    return LowRank(
        blocks,
        plan.lora_targets,
        rank=plan.lora_rank,
        alpha=plan.lora_alpha,
        dropout=plan.lora_dropout,
        masked=plan.merge,
        seed=plan.seed,
    )


def _named(blocks: Sequence[Block], targets: Sequence[str]) -> dict[str, Linear]:
    linears = linears_of(blocks)
    chosen = {path: linear for path, linear in linears.items() if path.endswith(tuple(f".{name}" for name in targets))}
    for target in targets:
        if not any(path.endswith(f".{target}") for path in chosen):
            last = sorted({path.rpartition(".")[2] for path in linears})
            raise UserError(f"--lora-targets {target}: no linear has this name; there are {', '.join(last)}")
    return chosen
