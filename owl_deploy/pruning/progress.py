"""Blocks that an unfinished run has pruned, kept on disk: after it was killed, the next run continues after them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from owl_deploy.files import written_whole
from owl_deploy.models.shards import write_shard
from owl_deploy.models.structure import Block
from owl_deploy.pruning.manifest import BlockRecord

_RECORD = "record"


class FinishedBlocks:
    """One safetensors file for each block, which holds all its tensors by full name, and the block's record."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, block: Block) -> Path:
        return self._directory / f"{block.name}.safetensors"

    def restore(self, block: Block) -> BlockRecord | None:
        """Give a block, whose weights are in fp32, what it was pruned to; None if no run finished it."""
        try:
            with safe_open(self.path(block), framework="pt") as file:
                record = BlockRecord.model_validate_json(file.metadata()[_RECORD])
                for name, linear in block.linears.items():
                    stored = file.get_tensor(f"{block.full_name(name)}.weight")
                    linear.weight.data = stored.to(linear.weight.device, linear.weight.dtype)
        except (FileNotFoundError, SafetensorError):  # not there, or cut short
            return None
        return record

    def add(self, block: Block, record: BlockRecord) -> None:
        """Keep a block whose weights are in their own dtype; whole, or not at all."""
        tensors = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
        with written_whole(self.path(block)) as path:
            write_shard(path, tensors, tensors.items(), {"format": "pt", _RECORD: record.model_dump_json()})
