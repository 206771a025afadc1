"""How much every option of every linear would hurt alone, to second order: what a search begins with.

For a small change d of the weights, KL(dense || changed) is d^T F d / 2 at each position, where F is the Fisher
information of the dense model. The gradient g of the likelihood of next tokens that are drawn from its own predictions
has E[(g^T d)^2] = d^T F d, summed over positions; so a backward pass for each window is enough for all options at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from owl_deploy.models.structure import Linear, matrix_of
from owl_deploy.pruning.search.levels import Levels
from owl_deploy.reporting import SILENT, Reporter


def harms(
    model: PreTrainedModel, levels: Levels, ids: NDArray[np.int64], *, seed: int, reporter: Reporter = SILENT
) -> NDArray[np.float64]:
    """KL(dense || model), nats a position, if one linear alone took an option: [linears, options], expected.

    Args:
        model: dense; its gradients are gone at the end.
        ids: windows [n, length]. The estimate's relative error is about `sqrt(2 / n)`.
    """
    rng = torch.Generator().manual_seed(seed)
    linears = list(levels.linears.values())
    total = np.zeros((len(linears), len(levels.options)))
    with torch.enable_grad():
        for linear in linears:
            linear.weight.requires_grad_(True)
        for window in reporter.track(torch.from_numpy(ids), "measuring how much each option hurts"):
            logits = model(window[None], use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=rng)[:, 0]
            functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
            for index, linear in enumerate(linears):
                total[index] += _moved(linear, levels.weights[index]) ** 2
                linear.weight.grad = None
        for linear in linears:
            linear.weight.requires_grad_(False)
    return total / (2 * ids.size)


@torch.no_grad()
def _moved(linear: Linear, options: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """By how much each option changes the loss, to first order."""
    gradient = linear.weight.grad
    if gradient is None:  # an expert that no token reached
        return np.zeros(len(options))
    slope = (gradient.T if isinstance(linear, Conv1D) else gradient).float().flatten()
    dense = matrix_of(linear).float().flatten()
    return np.array([float(slope @ (option.float().flatten() - dense)) for option in options])
