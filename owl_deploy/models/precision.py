"""In which precision a model computes where a result need not be exact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from owl_deploy.machine.cpu import cpu_flags


def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bf16 where the device multiplies it, else fp32."""
    if device != "cpu" or {"amx_bf16", "avx512_bf16"} & cpu_flags():
        return torch.bfloat16
    return torch.float32


@contextlib.contextmanager
def computing_in(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Give the model's parameters another dtype for a while; at the end, the tensors that they had before.

    Buffers, such as rotary frequencies, keep theirs.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in before:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
