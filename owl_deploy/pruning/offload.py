"""Pruning a checkpoint that is larger than memory (`--offload`): one block at a time from its files to new ones.

The model is a skeleton on the meta device. A block's weights are read when it is held and let go when the next one is;
what is outside the blocks is there while text is embedded, and activations lie on disk. Every finished block is a
shard of the checkpoint to be.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from owl_deploy.errors import UserError
from owl_deploy.evaluation.perplexity import perplexity_of, window_loss
from owl_deploy.files import disk_errors
from owl_deploy.models.load import load_skeleton
from owl_deploy.models.shards import Shards, write_index, write_shard
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import Block, find_blocks
from owl_deploy.pruning.calibration.spill import SpilledTensors
from owl_deploy.pruning.calibration.stream import CalibrationStream, in_fp32
from owl_deploy.pruning.progress import FinishedBlocks
from owl_deploy.pruning.weights import BlockWeights
from owl_deploy.reporting import SILENT, Reporter


class OffloadedModel:
    """A model on disk, which becomes a checkpoint in `out`; finished blocks are kept in `unfinished`."""

    def __init__(
        self, source: ModelSource, out: Path, unfinished: Path, device: str, dtype: torch.dtype | None = None
    ) -> None:
        """Read the files' headers; for what can be wrong with them, see `_Parts`."""
        self._parts = _Parts(source, dtype)
        self._offloaded = _Offloaded(self._parts, unfinished, device)
        self._out = out
        self.model: PreTrainedModel = self._parts.model
        self.blocks: list[Block] = self._parts.blocks
        self.weights: BlockWeights = self._offloaded
        self.finished = FinishedBlocks(unfinished)

    def save(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write the checkpoint, once every block is pruned: each is a shard, and all that is outside them one more."""
        self._offloaded.release()
        total = len(self.blocks) + 1
        shards = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
        file_of: dict[str, str] = {}
        for block, shard in zip(self.blocks, shards, strict=False):
            _take(self.finished.path(block), self._out / shard)
            file_of |= dict.fromkeys(self._parts.inside(block), shard)
        file_of |= dict.fromkeys(self._parts.write_outside(self._out / shards[-1]), shards[-1])
        write_index(self._out, file_of, sum(self._parts.size_bytes(name) for name in file_of))
        self._save_config()
        if tokenizer is not None:
            tokenizer.save_pretrained(self._out)

    def _save_config(self) -> None:
        """As transformers does when it saves a whole model."""
        config = self.model.config
        config.use_cache = True  # calibration switched it off
        config.architectures = [type(self.model).__name__]
        config.dtype = str(self.model.dtype).removeprefix("torch.")
        config.save_pretrained(self._out)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(self._out)


def offloaded_perplexity(
    source: ModelSource, ids: NDArray[np.int64], scratch: Path, device: str, reporter: Reporter = SILENT
) -> float:
    """`perplexity` of a checkpoint in fp32 over windows `ids` [n, length], which go through its blocks one by one.

    Args:
        scratch: an existing directory for the activations.
    """
    parts = _Parts(source, torch.float32)
    weights = _Offloaded(parts, scratch, device)
    with torch.no_grad():
        stream = weights.stream(parts.model, parts.blocks, ids)
        for block in reporter.track(parts.blocks, "perplexity"):
            with weights.held(block):
                stream.advance(block)
        weights.release()
        with parts.outside(head=True):
            logits = stream.logits(parts.model, parts.blocks, ids)
            return perplexity_of([window_loss(*pair) for pair in zip(logits, torch.from_numpy(ids), strict=True)])


class _Offloaded:
    """The blocks' weights in the checkpoint's files; one block at a time is in memory.

    A block that was held stays, in its own dtype, until the next one is, so that it can be saved.
    """

    def __init__(self, parts: _Parts, scratch: Path, device: str) -> None:
        self._parts = parts
        self._scratch = scratch
        self._device = device
        self._held: Block | None = None

    @contextlib.contextmanager
    def held(self, block: Block) -> Iterator[None]:
        """The block's weights as they are in the checkpoint, in fp32 on the device."""
        self.release()
        self._held = block
        self._parts.load(self._parts.inside(block))
        with in_fp32(block.module, self._device):
            yield

    def release(self) -> None:
        """Let go of the block that was held last."""
        if self._held is not None:
            self._parts.drop(self._parts.inside(self._held))
            self._held = None

    def stream(self, model: PreTrainedModel, blocks: list[Block], ids: NDArray[np.int64]) -> CalibrationStream:
        """The calibration windows `ids` [n, length], embedded up to the first block; activations lie on disk."""
        with self._parts.outside(head=False):
            return CalibrationStream(
                model, blocks, ids, self._device, held=self.held, new_store=lambda: SpilledTensors(self._scratch)
            )


class _Parts:
    """A model's skeleton, and the files its tensors come from."""

    def __init__(self, source: ModelSource, dtype: torch.dtype | None = None) -> None:
        """In the checkpoint's own dtype, or in another.

        Raises:
            UserError: the model is not in safetensors files, or these do not hold all its weights.
        """
        self._shards = Shards(source)
        self.model = load_skeleton(source, dtype, stored=self._shards.dtype)
        self.blocks = find_blocks(self.model)
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._tensors = {name: tensor.to("meta") for name, tensor in self.model.state_dict().items()}
        self._own = self._own_names()
        self._stored = self._own | self._names_of_tied(source)
        for name, stored in self._stored.items():
            expected, found = tuple(self._tensors[name].shape), self._shards.shape(stored)
            if found != expected:
                raise UserError(f"{source.name}: {stored} is {found} in its files, {expected} by config.json")

    def inside(self, block: Block) -> list[str]:
        """The names of a block's tensors."""
        return [name for name in self._stored if name.startswith(f"{block.name}.")]

    def size_bytes(self, name: str) -> int:
        return int(self._tensors[name].nbytes)

    @contextlib.contextmanager
    def outside(self, *, head: bool) -> Iterator[None]:
        """All that is outside the blocks in memory; without the `head`, it stays on the meta device."""
        output = None if head else self.model.get_output_embeddings()
        of_head = [f"{path}." for path, module in self.model.named_modules() if module is output]
        names = [name for name in self._outside() if not name.startswith(tuple(of_head))]
        self.load(names)
        try:
            yield
        finally:
            self.drop(names)

    def load(self, names: Iterable[str]) -> None:
        """Read tensors into the model; tied ones are one tensor in it."""
        wanted: dict[str, list[str]] = defaultdict(list)
        for name in names:
            wanted[self._stored[name]].append(name)
        for stored, tensor in self._shards.read(wanted):
            kept = tensor.to(self._tensors[wanted[stored][0]].dtype, copy=True)
            for name in wanted[stored]:
                self._put(name, kept)

    def drop(self, names: Iterable[str]) -> None:
        """Put tensors back on the meta device."""
        for name in names:
            self._put(name, self._tensors[name])

    def write_outside(self, path: Path) -> list[str]:
        """Copy what is outside the blocks into one shard, tensor by tensor; the names of what is in it.

        A tied tensor is in it as often as it was in the checkpoint.
        """
        names = {self._own[name]: name for name in self._outside() if name in self._own}
        layout = {name: self._tensors[name] for name in names.values()}
        tensors = ((names[stored], tensor) for stored, tensor in self._shards.read(names))
        with disk_errors(path):
            write_shard(path, layout, tensors, {"format": "pt"})
        return list(layout)

    def _outside(self) -> list[str]:
        inside = tuple(f"{block.name}." for block in self.blocks)
        return [name for name in self._stored if not name.startswith(inside)]

    def _own_names(self) -> dict[str, str]:
        """What the files call each tensor: as the model does, or without the base model's prefix, or with one more."""
        prefix = f"{self.model.base_model_prefix}."
        found = {}
        for name in self._tensors:
            known_as = (name, name.removeprefix(prefix), prefix + name)
            if (stored := next((known for known in known_as if known in self._shards), None)) is not None:
                found[name] = stored
        return found

    def _names_of_tied(self, source: ModelSource) -> dict[str, str]:
        """The names of tensors that the files hold only under the name of one they are tied to."""
        others: dict[int, str] = {
            id(self._parameters[name]): stored for name, stored in self._own.items() if name in self._parameters
        }
        tied, missing = {}, []
        for name in self._tensors.keys() - self._own.keys():
            if (stored := others.get(id(self._parameters.get(name)))) is not None:
                tied[name] = stored
            else:
                missing.append(name)
        if missing:
            raise UserError(
                f"{source.name}: lacks {len(missing)} of the model's weights, {min(missing)} among them; fetch it again"
            )
        return tied

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._parameters:  # a parameter on the meta device cannot be given other data
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        elif tensor.device.type != "meta":  # buffers are small, and stay
            module._buffers[leaf] = tensor


def _take(path: Path, to: Path) -> None:
    """Let a finished block be part of the output, and stay where it is: the next run needs it if this one fails."""
    with disk_errors(to):
        try:
            os.link(path, to)
        except OSError:  # a file system without links
            shutil.copyfile(path, to)
