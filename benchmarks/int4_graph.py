"""Write onnxruntime-genai's int4 graph of a checkpoint, the dense alternative that sparse weights have to beat.

    python benchmarks/int4_graph.py CHECKPOINT DIRECTORY

Weights in blocks of 32, inputs of products in 8 bits (`int4_accuracy_level=4`), the head in the builder's 8 bits.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from onnxruntime_genai.models.builder import create_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        try:
            create_model(
                "",
                str(arguments.checkpoint),
                str(arguments.directory),
                "int4",
                "cpu",
                cache,
                int4_accuracy_level=4,
                hf_token="false",
                hf_remote=False,
            )
        except Exception:  # it saves the tokenizer last, and fails in many ways if there is none
            if not (arguments.directory / "genai_config.json").is_file():
                raise


if __name__ == "__main__":
    main()
