"""The `standard` flavor of an export: an ONNX graph of standard operators only, for DeepSparse and any ONNX user."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoConfig

from owl_deploy.bundle.tensors import CheckpointTensors
from owl_deploy.exporting.graphs.decoder import unsupported, write_decoder_graph
from owl_deploy.exporting.graphs.optimum import write_optimum_graph
from owl_deploy.files import disk_errors


@dataclass(frozen=True)
class StandardGraph:
    """How a standard graph was made."""

    source: Literal["built", "optimum"]
    note: str
    """Why it was made that way."""


def write_standard_flavor(checkpoint: Path, out: Path, _has_tokenizer: bool) -> tuple[str, str]:
    """See `flavors.Write`: the graph, and the model's configs."""
    graph = write_standard(checkpoint, out)
    for name in ("config.json", "generation_config.json"):
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, out / name)
    return graph.source, graph.note


def write_standard(checkpoint: Path, out: Path) -> StandardGraph:
    """Write `out/model.onnx` and `out/model.onnx.data`: opset 14, IR version 8, fp32, dynamic shapes.

    Inputs are `input_ids` [B, L], `attention_mask` [B, S], `position_ids` [B, L] (where the architecture has them)
    and `past_key_values.{i}.key` and `.value` [B, heads, P, head dimension]; outputs are `logits` [B, L, vocab] and
    `present.{i}.key` and `.value`: the interface of optimum's text-generation-with-past graphs.

    Args:
        checkpoint: a Hugging Face directory with a config and safetensors of any dtype.
        out: an existing directory.

    Raises:
        UserError: a tensor is missing, optimum does not know the architecture, or the disk is full.
    """
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    path = out / "model.onnx"
    reason = unsupported(config)
    with disk_errors(path):
        if reason is None:
            write_decoder_graph(config, CheckpointTensors(checkpoint), path)
            return StandardGraph("built", f"written from the checkpoint's tensors for model type {config.model_type}")
        write_optimum_graph(checkpoint, config, path)
        return StandardGraph("optimum", reason)
