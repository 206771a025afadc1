"""Write a checkpoint of random weights with the shapes of a published model, for measuring speed without its weights.

    python benchmarks/random_checkpoint.py DIRECTORY [--blocks N] [--hidden-size N] [--feed-forward N] [--heads N]
        [--kv-heads N] [--words N]

The geometry is TinyLlama-1.1B's, which the paper's speed-up table uses: 22 blocks of hidden size 2048, 32 query and 4
key-value heads, a feed-forward size of 5632, and 32000 words. It has no tokenizer; prompts are random ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Of each option: LlamaConfig's name for it, and TinyLlama's value.
TINYLLAMA = {
    "blocks": ("num_hidden_layers", 22),
    "hidden_size": ("hidden_size", 2048),
    "feed_forward": ("intermediate_size", 5632),
    "heads": ("num_attention_heads", 32),
    "kv_heads": ("num_key_value_heads", 4),
    "words": ("vocab_size", 32000),
}


def add_geometry(parser: argparse.ArgumentParser) -> None:
    """Options for another geometry than TinyLlama's."""
    for option, (_, value) in TINYLLAMA.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=value, metavar="N")


def geometry(arguments: argparse.Namespace) -> dict[str, int]:
    """What LlamaConfig is told of these options."""
    return {name: getattr(arguments, option) for option, (name, _) in TINYLLAMA.items()}


def write_random(directory: Path, shapes: dict[str, int]) -> None:
    """Save a bf16 LLaMA with these shapes."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=2048, tie_word_embeddings=False, **shapes)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    add_geometry(parser)
    arguments = parser.parse_args()
    write_random(arguments.directory, geometry(arguments))


if __name__ == "__main__":
    main()
