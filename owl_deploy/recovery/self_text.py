"""Text that the dense model writes itself, so that a recovery needs no other.

Calibration and recovery on it are about as good as on real text (Williams et al. 2024, arXiv 2410.17170).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from owl_deploy.files import written_whole
from owl_deploy.reporting import SILENT, Reporter

_BATCH = 64


def write_text(
    model: PreTrainedModel, windows: int, seqlen: int, *, seed: int, kept: Path, reporter: Reporter = SILENT
) -> NDArray[np.int64]:
    """Sample `windows` sequences from `model`, [windows, seqlen].

    Each begins with a random token and goes on by the model's own distribution (temperature 1). A sequence goes on
    after an end-of-text token: what follows is another text.

    Args:
        kept: a directory for batches that are finished, which a later run of the same inputs takes from there.
    """
    batches = []
    for number in reporter.track(range(math.ceil(windows / _BATCH)), "writing text"):
        file = kept / f"text.{number}.npy"
        if not file.is_file():
            sampled = _sample(model, min(_BATCH, windows - number * _BATCH), seqlen, seed, number)
            with written_whole(file) as temporary, temporary.open("wb") as opened:
                np.save(opened, sampled)
        batches.append(np.load(file))
    return np.concatenate(batches)


@torch.inference_mode()
def _sample(model: PreTrainedModel, count: int, seqlen: int, seed: int, number: int) -> NDArray[np.int64]:
    """A batch of sequences [count, seqlen], the same for the same seed and number."""
    rng = torch.Generator().manual_seed(int(np.random.default_rng([seed, number]).integers(2**62)))
    vocabulary = model.config.get_text_config().vocab_size
    tokens = [torch.randint(vocabulary, (count, 1), generator=rng)]
    cache = DynamicCache()
    while len(tokens) < seqlen:
        logits = model(tokens[-1].to(model.device), past_key_values=cache, use_cache=True).logits[:, -1]
        chances = torch.softmax(logits.float(), dim=-1).cpu()
        tokens.append(torch.multinomial(chances, 1, generator=rng))
    return torch.cat(tokens, dim=1).numpy()
