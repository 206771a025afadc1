"""The flavors of a bundle: how each is written and checked. To add one: a module, its name, and a line here.

Its name goes into `bundle/names.py`, where the engines that run it find it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.bundle.manifest import GRAPH, FlavorRecord
from owl_deploy.bundle.names import Flavor, sparse_flavor
from owl_deploy.engines.onnxruntime_engine import OnnxRuntimeEngine, RoundedOnnxRuntimeEngine
from owl_deploy.engines.sparse_engine import SparseEngine
from owl_deploy.exporting.apart import apart
from owl_deploy.exporting.cache import with_rounded_cache
from owl_deploy.exporting.checkpoint import OpenCheckpoint
from owl_deploy.exporting.graphs.dense import DenseGraph, audit_of
from owl_deploy.exporting.graphs.genai import write_genai_fp32
from owl_deploy.exporting.graphs.packed import write_packed
from owl_deploy.exporting.graphs.standard import write_standard_flavor
from owl_deploy.exporting.peers.genai import write_genai_int4, write_genai_int8
from owl_deploy.exporting.peers.gguf import write_gguf
from owl_deploy.exporting.peers.gguf_original import write_gguf_original
from owl_deploy.exporting.peers.gguf_quantised import write_gguf_quantised
from owl_deploy.exporting.peers.openvino import write_openvino, write_openvino_static
from owl_deploy.exporting.peers.torch import write_torch
from owl_deploy.exporting.verify.parity import check_parity, tolerance_of
from owl_deploy.sparse.formats import Head, Weights

Write = Callable[[Path, Path, bool], tuple[str, str]]
"""(checkpoint, out, has_tokenizer) -> what it was made by, and a note; `out` is there and empty.

Raises `UnsupportedFamily` where its tool does not know the architecture, `UserError` where that is missing or fails.
"""


@dataclass(frozen=True)
class Dense:
    """A graph of the checkpoint's weights as they are: each looked up in it, its logits compared with torch's."""

    write: Write
    engine: type[OnnxRuntimeEngine] | None = None
    """Whose cache may be rounded; None where the graph has none of its own."""

    def make(self, checkpoint: OpenCheckpoint, out: Path, *, rounds_cache: bool = False) -> FlavorRecord:
        """Write and check the flavor in `out`; its record, but for the files.

        Args:
            rounds_cache: keep keys and values in 8 bits, if the flavor can; see `with_rounded_cache`.

        Raises:
            UnsupportedFamily: there is no such graph of this model.
            CheckFailed: the graph is not the checkpoint.
        """
        source, note = self.write(checkpoint.directory, out, checkpoint.tokenizer is not None)
        audit = audit_of(out / GRAPH, checkpoint.model)
        parity = check_parity(out / GRAPH, checkpoint.model, checkpoint.ids)
        record = FlavorRecord(source=source, note=note, parity=parity, audit=audit, files=[])
        if not rounds_cache or self.engine is None:
            return record
        return with_rounded_cache(record, out, checkpoint, self.engine)


@dataclass(frozen=True)
class Packed:
    """A dense graph with its weights packed: all read back, its logits compared with torch's on what is stored."""

    weights: Weights

    def make(
        self,
        checkpoint: OpenCheckpoint,
        dense: DenseGraph,
        head: Head | None,
        out: Path,
        *,
        rounds_cache: bool = False,
    ) -> FlavorRecord:
        """See `Dense.make`."""
        packed, stored = write_packed(checkpoint.model, dense, out, self.weights, head)
        tolerance = tolerance_of(sparse_flavor(self.weights))
        with _weights_in(checkpoint.model, stored):
            parity = check_parity(out / GRAPH, checkpoint.model, checkpoint.ids, SparseEngine, tolerance=tolerance)
            record = FlavorRecord(
                source="onnxruntime-genai, packed",
                note=f"owl::SparseMatMul on {self.weights} weights",
                parity=parity,
                audit=dense.audit,
                files=[],
                packed=packed,
            )
            if not rounds_cache:
                return record
            return with_rounded_cache(record, out, checkpoint, SparseEngine)


@dataclass(frozen=True)
class Peer:
    """What another engine runs, of weights as it stores them: `bench` compares its logits, with ONNX Runtime's.

    Attributes:
        engine: see `Dense`.
        calibrated: whether `write` takes windows of token ids too, [n, length].
    """

    write: Callable[..., tuple[str, str]]
    engine: type[OnnxRuntimeEngine] | None = None
    calibrated: bool = False

    def make(self, checkpoint: OpenCheckpoint, out: Path, *, rounds_cache: bool = False) -> FlavorRecord:
        """See `Dense.make`; nothing is checked here. A large model is written by a process of its own."""
        text = (checkpoint.windows.ids,) if self.calibrated else ()
        inputs = (checkpoint.directory, out, checkpoint.tokenizer is not None, *text)
        write = partial(apart, f"exporting {out.name}", self.write) if checkpoint.is_large else self.write
        source, note = write(*inputs)
        record = FlavorRecord(source=source, note=note, parity=None, audit=None, files=[])
        if not rounds_cache or self.engine is None:
            return record
        return with_rounded_cache(record, out, checkpoint, self.engine)


EXPORTERS: dict[Flavor, Dense | Packed | Peer] = {
    "standard": Dense(write_standard_flavor),
    "genai": Dense(write_genai_fp32, OnnxRuntimeEngine),
    "sparse-packed32": Packed("packed32"),
    "sparse-packed16": Packed("packed16"),
    "sparse-int8": Packed("int8"),
    "sparse-int4": Packed("int4"),
    "genai-int8": Peer(write_genai_int8, RoundedOnnxRuntimeEngine),
    "genai-int4": Peer(write_genai_int4, RoundedOnnxRuntimeEngine),
    "openvino": Peer(partial(write_openvino, "fp32")),
    "openvino-int8": Peer(partial(write_openvino, "int8")),
    "openvino-int4": Peer(partial(write_openvino, "int4")),
    "openvino-int8-static": Peer(write_openvino_static, calibrated=True),
    "gguf-f16": Peer(partial(write_gguf, weights="f16")),
    "gguf-q8_0": Peer(partial(write_gguf, weights="q8_0")),
    "gguf-q4_0": Peer(partial(write_gguf, weights="q4_0")),
    "gguf-q4_k_m": Peer(partial(write_gguf_quantised, weights="q4_k_m"), calibrated=True),
    "gguf-q3_k_m": Peer(partial(write_gguf_quantised, weights="q3_k_m"), calibrated=True),
    "gguf-q2_k": Peer(partial(write_gguf_quantised, weights="q2_k"), calibrated=True),
    "gguf-iq4_xs": Peer(partial(write_gguf_quantised, weights="iq4_xs"), calibrated=True),
    "gguf-original": Peer(write_gguf_original),
    "torch": Peer(write_torch),
}


def can_round_cache(flavor: Flavor) -> bool:
    """Whether its keys and values can be kept in 8 bits."""
    exporter = EXPORTERS[flavor]
    return isinstance(exporter, Packed) or exporter.engine is not None


def is_calibrated(flavor: Flavor) -> bool:
    """Whether it is written by a text."""
    exporter = EXPORTERS[flavor]
    return isinstance(exporter, Peer) and exporter.calibrated


@contextlib.contextmanager
def _weights_in(model: PreTrainedModel, weights: dict[str, NDArray[np.float32]]) -> Iterator[None]:
    """The model with these weights in its linears, for a while; what they were tied to keeps its own."""
    modules = dict(model.named_modules())
    before = {name: modules[name].weight for name in weights}
    try:
        for name, values in weights.items():
            modules[name].weight = torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)
        yield
    finally:
        for name, weight in before.items():
            modules[name].weight = weight
