"""Logits at some positions of a sequence, without those of all others where the model can leave them out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel


def forward_at(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, **options: Any) -> Any:
    """The model's output for sequences `ids` [n, length], its logits [n, positions, vocabulary].

    Args:
        positions: int64, [positions], on the model's device.
        options: passed on to the model.
    """
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(ids, use_cache=False, logits_to_keep=positions, **options)
    output = model(ids, use_cache=False, **options)
    output.logits = output.logits[:, positions]
    return output
