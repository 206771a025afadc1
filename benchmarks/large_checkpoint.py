"""Write a checkpoint of random weights that is larger than memory, shard by shard, and text to calibrate it on.

    python benchmarks/large_checkpoint.py DIRECTORY [--blocks N]

The geometry is LLaMA-7B's: 32 blocks of hidden size 4096, 32 heads, a feed-forward size of 11008, and 32000 words, 12.6
GiB in bf16. `DIRECTORY/calibration.npy` holds 4 windows of 32 random ids. It has no tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from owl_deploy.models.shards import write_index, write_shard

LLAMA_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
_CALIBRATION = (4, 32)
_SHARD_BLOCKS = 4
_DEVIATION = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, default=32, help="fewer make a smaller model of the same matrices")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True)
    write_weights(arguments.directory, arguments.blocks)
    ids = np.random.default_rng(0).integers(3, LLAMA_7B["vocab_size"], _CALIBRATION)
    np.save(arguments.directory / "calibration.npy", ids)


def write_weights(directory: Path, blocks: int) -> None:
    """Some blocks a shard, and what is outside the blocks in the last one."""
    config = LlamaConfig(num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"], **LLAMA_7B)
    with torch.device("meta"):
        layout = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).state_dict()
    of_shards: dict[int, list[str]] = {}
    for name in layout:
        is_block = name.startswith("model.layers.")
        of_shards.setdefault(int(name.split(".")[2]) // _SHARD_BLOCKS if is_block else blocks, []).append(name)
    file_of = {}
    for number, shard in enumerate(sorted(of_shards), start=1):
        file = f"model-{number:05}-of-{len(of_shards):05}.safetensors"
        inside = {name: layout[name] for name in of_shards[shard]}
        write_shard(directory / file, inside, random_tensors(inside, seed=shard), {"format": "pt"})
        file_of |= dict.fromkeys(inside, file)
    write_index(directory, file_of, sum(tensor.nbytes for tensor in layout.values()))
    config.save_pretrained(directory)


def random_tensors(layout: dict[str, torch.Tensor], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """One at a time: norms are ones, and matrices have some columns that are larger, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in layout.items():
        if tensor.ndim == 1:
            yield name, torch.ones(tensor.shape, dtype=tensor.dtype)
            continue
        values = torch.empty(tensor.shape, dtype=tensor.dtype).normal_(0, _DEVIATION, generator=generator)
        values[:, :: 61 + seed] *= 4
        yield name, values


if __name__ == "__main__":
    main()
