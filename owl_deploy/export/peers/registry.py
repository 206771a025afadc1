"""What other engines run, made from a checkpoint by their own tools: quantised graphs, OpenVINO's IR, GGUF."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from owl_deploy.bundle.names import Flavor
from owl_deploy.export.peers.genai import write_genai_int4, write_genai_int8
from owl_deploy.export.peers.gguf import write_gguf
from owl_deploy.export.peers.openvino import write_openvino
from owl_deploy.export.peers.torch import write_torch

Exporter = Callable[[Path, Path, bool], tuple[str, str]]
"""(checkpoint, out, has_tokenizer) -> what it was made by, and a note; `out` is there and empty.

Raises `UnsupportedFamily` where its tool does not know the architecture, `UserError` where that is missing or fails.
"""

_EXPORTERS: dict[Flavor, Exporter] = {
    "torch": write_torch,
    "genai-int8": write_genai_int8,
    "genai-int4": write_genai_int4,
    "openvino": partial(write_openvino, "fp32"),
    "openvino-int8": partial(write_openvino, "int8"),
    "openvino-int4": partial(write_openvino, "int4"),
    "gguf-f16": partial(write_gguf, weights="f16"),
    "gguf-q8_0": partial(write_gguf, weights="q8_0"),
    "gguf-q4_0": partial(write_gguf, weights="q4_0"),
}


def write_peer(flavor: Flavor, checkpoint: Path, out: Path, *, has_tokenizer: bool) -> tuple[str, str]:
    """Write what an engine needs to run `checkpoint` as `flavor` into the empty directory `out`; source, and a note.

    Raises:
        UnsupportedFamily: the tool that makes it does not know this architecture.
        UserError: the tool is not installed, or fails.
    """
    return _EXPORTERS[flavor](checkpoint, out, has_tokenizer)
