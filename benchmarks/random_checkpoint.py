"""Write a checkpoint of random weights with the shapes of a published model, for measuring speed without its weights.

    python benchmarks/random_checkpoint.py DIRECTORY [--blocks N]

The geometry is TinyLlama-1.1B's, which the paper's speed-up table uses: 22 blocks of hidden size 2048, 32 query and 4
key-value heads, a feed-forward size of 5632, and 32000 words. It has no tokenizer; prompts are random ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TINYLLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, default=22, help="fewer make a smaller model of the same matrices")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=arguments.blocks, **TINYLLAMA)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(arguments.directory)


if __name__ == "__main__":
    main()
