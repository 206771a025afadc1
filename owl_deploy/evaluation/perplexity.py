"""Perplexity, as the published pruning tables compute it."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedModel

from owl_deploy.reporting import SILENT, Reporter


def perplexity_of(window_losses: NDArray[np.float64] | list[float]) -> float:
    """exp of the mean over windows of each window's mean cross-entropy (nats); inf when it overflows."""
    try:
        return math.exp(float(np.mean(window_losses)))
    except OverflowError:
        return math.inf


def window_loss(logits: torch.Tensor, window: torch.Tensor) -> float:
    """Mean cross-entropy (nats) of a window [length], but for its first token; `logits` [1, length, vocabulary]."""
    return functional.cross_entropy(logits[0, :-1].float(), window[1:]).item()


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: NDArray[np.int64], reporter: Reporter = SILENT) -> float:
    """Perplexity of `model` over windows `ids` [n, length]: each window predicts its last `length - 1` tokens.

    The windows do not overlap and share no context (SparseGPT's and Wanda's `eval_ppl`).
    """
    losses = []
    for window in reporter.track(torch.from_numpy(ids), "perplexity"):
        losses.append(window_loss(model(window[None], use_cache=False).logits, window))
    return perplexity_of(losses)
