"""A model that is being pruned: where its blocks are, which are finished, and how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import Block, find_blocks
from owl_deploy.pruning.progress import FinishedBlocks
from owl_deploy.pruning.weights import BlockWeights, InMemory


class Opened(Protocol):
    """What is pruned, wherever its weights are."""

    model: PreTrainedModel
    blocks: list[Block]
    weights: BlockWeights
    finished: FinishedBlocks

    def save(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write the checkpoint, once every block is pruned."""
        ...


class OpenedModel:
    """A model whole in memory, which becomes a checkpoint in `out`; finished blocks are kept in `unfinished`.

    Args:
        dtype: of the checkpoint; None for that of `source`.
    """

    def __init__(
        self, source: ModelSource, out: Path, unfinished: Path, device: str, dtype: torch.dtype | None = None
    ) -> None:
        self.model: PreTrainedModel = load_model(source, dtype)
        self.blocks: list[Block] = find_blocks(self.model)
        self.weights: BlockWeights = InMemory(device)
        self.finished = FinishedBlocks(unfinished)
        self._out = out

    def save(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write the checkpoint, once every block is pruned."""
        self.model.config.use_cache = True  # calibration switched it off
        self.model.save_pretrained(self._out, safe_serialization=True, max_shard_size="5GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(self._out)
