"""How far a sparse model is from its dense one, in the three ways that `recover` can train by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Seen:
    """What a forward pass shows of a model.

    Attributes:
        hidden: hidden states [sequences, length, width], of one or several places of the model.
        logits: [sequences, positions, vocabulary], at some positions.
    """

    hidden: Sequence[torch.Tensor]
    logits: torch.Tensor


def kl(sparse: Seen, dense: Seen) -> torch.Tensor:
    """KL(dense || sparse) of the next token's distribution: nats, mean over positions."""
    ours = functional.log_softmax(sparse.logits.float().flatten(0, 1), dim=-1)
    theirs = functional.log_softmax(dense.logits.float().flatten(0, 1), dim=-1)
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def squarehead(sparse: Seen, dense: Seen) -> torch.Tensor:
    """SquareHead (Kurtic et al. 2023, equation 2): `mse(h, h') / mse(h', 0)`, mean over the places compared."""
    pairs = zip(sparse.hidden, dense.hidden, strict=True)
    return torch.stack([relative_error(*pair) for pair in pairs]).mean()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The squared error of hidden states over their mean square."""
    return functional.mse_loss(ours.float(), theirs.float()) / theirs.float().square().mean()


def cross_entropy(sparse: Seen, following: torch.Tensor) -> torch.Tensor:
    """Of the text's own next tokens [sequences, positions]: nats, mean over positions."""
    return functional.cross_entropy(sparse.logits.float().flatten(0, 1), following.flatten())
