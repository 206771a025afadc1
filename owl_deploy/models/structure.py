"""Find a decoder's blocks and their linears by structure, whatever the family calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from owl_deploy.errors import UserError

Linear: TypeAlias = nn.Linear | Conv1D
"""What is pruned. GPT-2's Conv1D is a linear whose weight is stored transposed, [in, out]."""


def zeros(linear: Linear) -> int:
    """How many of its weights are 0; counted by numpy, which takes a fifth of torch's time."""
    return linear.weight.numel() - int(np.count_nonzero(linear.weight.detach().cpu().numpy()))


@dataclass(frozen=True)
class Block:
    """One transformer block and its prunable linears.

    Attributes:
        name: module path, for example `model.layers.3`.
        linears: every linear in it, by path inside the block (`self_attn.q_proj`), in module order.
    """

    name: str
    module: nn.Module
    linears: dict[str, Linear]

    @property
    def weights(self) -> int:
        """Number of weights in the linears (biases not counted: they are never pruned)."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights by linear."""
        return {name: linear.weight.numel() for name, linear in self.linears.items()}

    @property
    def zeros(self) -> int:
        """Number of weights in the linears that are 0."""
        return sum(zeros(linear) for linear in self.linears.values())

    def full_name(self, linear: str) -> str:
        """The module path of one of the linears, from the model."""
        return f"{self.name}.{linear}"


def linears_of(blocks: Iterable[Block]) -> dict[str, Linear]:
    """All linears of some blocks, by full name, in their order."""
    return {block.full_name(name): linear for block in blocks for name, linear in block.linears.items()}


def share_of_zeros(blocks: Sequence[Block]) -> float:
    """The share of the weights of some blocks' linears that is 0."""
    return sum(block.zeros for block in blocks) / sum(block.weights for block in blocks)


def without_indices(name: str) -> str:
    """A linear's path without the numbers in it: the same for like linears of all experts."""
    return re.sub(r"\.\d+\.", ".", name)


def matrix_of(linear: Linear) -> torch.Tensor:
    """The weight of a linear, [out, in]; a view of it, which for a Conv1D is not contiguous."""
    weight: torch.Tensor = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    return weight


def set_matrix(linear: Linear, matrix: torch.Tensor) -> None:
    """Give a linear the weights [out, in]."""
    linear.weight.data = matrix.T.contiguous() if isinstance(linear, Conv1D) else matrix


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The blocks of a decoder: the outermost list of like modules that holds most of its linears.

    Raises:
        UserError: there is no such list, or its blocks keep weights where pruning would not see them
            (fused mixture-of-experts tensors).
    """
    family = type(model).__name__
    candidates = [(name, module) for name, module in model.named_modules() if _is_block_list(module)]
    outermost = [
        (name, module)
        for name, module in candidates
        if not any(name.startswith(f"{other}.") for other, _ in candidates if other != name)
    ]
    if not outermost:
        raise UserError(f"{family}: no list of transformer blocks with linears was found in it")
    prefix, layers = max(outermost, key=lambda item: sum(weight.numel() for weight in item[1].parameters()))
    blocks = []
    for index, layer in enumerate(layers.children()):
        name = f"{prefix}.{index}"
        _refuse_hidden_weights(family, name, layer)
        linears = {path: module for path, module in layer.named_modules() if isinstance(module, Linear)}
        blocks.append(Block(name, layer, linears))
    if not any(block.linears for block in blocks):
        raise UserError(f"{family}: its blocks hold no linears to prune")
    return blocks


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    return all(any(isinstance(part, Linear) for part in layer.modules()) for layer in module)


def _refuse_hidden_weights(family: str, block_name: str, block: nn.Module) -> None:
    largest = max((part.weight.numel() for part in block.modules() if isinstance(part, Linear)), default=0)
    for path, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # DBRX stacks its experts into one matrix. Smaller ones are no experts: Mamba's A_log, for example.
            stacked = parameter.ndim == 2 and parameter.numel() > largest
            if (parameter.ndim == 3 or stacked) and not isinstance(module, nn.Conv1d | nn.Embedding):
                raise UserError(
                    f"{family}: {block_name}.{path}.{name} holds fused experts in one tensor, which is not supported"
                )
