"""The graph of onnxruntime-genai that the `sparse-*` flavors are made from, and where a model's weights lie in it."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.bundle.manifest import GRAPH, MANIFEST, AuditRecord, exporter_versions, read_bundle
from owl_deploy.exporting.checkpoint import OpenCheckpoint
from owl_deploy.exporting.graphs.genai import write_genai
from owl_deploy.exporting.graphs.sparse import HEAD
from owl_deploy.exporting.verify.audit import audit_graph
from owl_deploy.exporting.verify.packed import rows_of_parts
from owl_deploy.models.structure import find_blocks, matrix_of


@dataclass(frozen=True)
class DenseGraph:
    """A graph in `directory`, and where the linears of the model are in it."""

    directory: Path
    audit: AuditRecord


def lent_graph(checkpoint: OpenCheckpoint, bundle: Path) -> DenseGraph | None:
    """The genai flavor of another bundle, if it has one and its model differs in the weights of blocks' linears alone.

    The levels of a sweep do. The graph's own weights of those linears are then not this checkpoint's.
    """
    lender = read_bundle(bundle) if (bundle / MANIFEST).is_file() else None
    if lender is None or lender.versions != exporter_versions() or lender.frame_sha256 != checkpoint.frame_sha256:
        return None
    genai = lender.flavors.get("genai")
    if genai is None or genai.audit is None:
        return None
    blocks = find_blocks(checkpoint.model)
    of_parts = linears_of_parts(checkpoint.model, genai.audit)
    placed = sum(len(linears) for part, linears in of_parts.items() if part != HEAD)
    if placed != sum(len(block.linears) for block in blocks):
        return None
    return DenseGraph(bundle / "genai", genai.audit.model_copy(update={"zeros": sum(block.zeros for block in blocks)}))


@contextlib.contextmanager
def written_graph(checkpoint: OpenCheckpoint, place: Path) -> Iterator[DenseGraph]:
    """A graph that is written for the purpose, into a folder in `place`, and goes again.

    Raises:
        UnsupportedFamily: the builder has no graph for this architecture.
        UserError: the builder failed.
        CheckFailed: a weight is not in the graph.
    """
    with tempfile.TemporaryDirectory(dir=place, prefix=".dense-") as directory:
        write_genai(checkpoint.directory, Path(directory), has_tokenizer=checkpoint.tokenizer is not None)
        yield DenseGraph(Path(directory), audit_of(Path(directory) / GRAPH, checkpoint.model))


def audit_of(graph: Path, model: PreTrainedModel) -> AuditRecord:
    """Find every linear's weight in a dense graph.

    Raises:
        CheckFailed: one is not there as it is in the model.
    """
    linears = {
        block.full_name(name): matrix_of(linear).detach().contiguous().numpy()
        for block in find_blocks(model)
        for name, linear in block.linears.items()
    }
    found = audit_graph(graph, linears)
    return AuditRecord(
        weights=sum(weight.weights for weight in found),
        zeros=sum(weight.zeros for weight in found),
        linears={weight.name: f"{weight.initializer}[{weight.first_column}]" for weight in found},
    )


def linears_of_parts(model: PreTrainedModel, audit: AuditRecord) -> dict[str, dict[str, NDArray[np.float32]]]:
    """For each initializer of a dense graph its linears, by path: weights [out, in] that lie one after the other in it.

    Left out is one that two linears of the same weights were both found in, and so not in their own.
    """
    modules = dict(model.named_modules())
    parts = {HEAD: _head(model)}
    for part, places in rows_of_parts(audit.linears).items():
        weights = {name: matrix_of(modules[name]).detach().numpy() for _, name in sorted(places)}
        ends = itertools.accumulate(len(weight) for weight in weights.values())
        if [first for first, _ in sorted(places)] == [0, *ends][:-1]:
            parts[part] = weights
    return parts


def _head(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """The matrix of the vocabulary, [vocab, hidden], by its module's path."""
    head = model.get_output_embeddings()
    return {name: module.weight.detach().numpy() for name, module in model.named_modules() if module is head}
