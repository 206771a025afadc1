"""How much each input of a linear matters to its outputs: the importance matrix that llama.cpp's quantiser takes.

That is the mean square of each input over all tokens of a text, as its own `llama-imatrix` computes it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from owl_deploy.models.structure import find_blocks, linears_of


@torch.inference_mode()
def mean_squares(model: PreTrainedModel, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Of each linear of the blocks, by its path: the mean of its squared inputs, [in], over windows [n, length]."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        squares = inputs[0].double().square().flatten(0, -2).sum(dim=0)
        sums[name] = sums[name] + squares if name in sums else squares

    linears = linears_of(find_blocks(model))
    hooks = [linear.register_forward_pre_hook(partial(add, name)) for name, linear in linears.items()]
    try:
        for window in torch.from_numpy(ids):
            model.get_decoder()(window[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / ids.size).float().numpy() for name, total in sums.items()}
