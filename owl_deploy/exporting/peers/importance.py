"""How much each input of a linear matters to its outputs: the importance matrix that llama.cpp's quantiser takes.

That is the mean square of each input over all tokens of a text, as its own `llama-imatrix` computes it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.models.structure import find_blocks, linears_of
from owl_deploy.pruning.calibration.statistics import InputStatistics


@torch.inference_mode()
def mean_squares(model: PreTrainedModel, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Of each linear of the blocks, by its path: the mean of its squared inputs, [in], over windows [n, length].

    Raises:
        UserError: the text makes inputs NaN or infinite.
    """
    linears = linears_of(find_blocks(model))
    statistics = InputStatistics(linears, {"squares"})
    for window in torch.from_numpy(ids):
        with statistics.collecting():
            model.get_decoder()(window[None], use_cache=False)
    return {name: (statistics.mean_square(name) / ids.shape[1]).numpy() for name in linears}
