"""The `sparse-*` flavors: onnxruntime-genai's graph with its matrices packed, and read back again from the file."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.bundle.manifest import GRAPH, MANIFEST, AuditRecord, PackedRecord, exporter_versions, read_bundle
from owl_deploy.errors import UnsupportedFamily, UserError
from owl_deploy.export.graphs.genai import write_genai
from owl_deploy.export.graphs.sparse import HEAD, write_sparse
from owl_deploy.export.verify.audit import audit_graph
from owl_deploy.export.verify.packed import check_stored, rows_of_parts, stored_parts
from owl_deploy.models.shards import as_bytes
from owl_deploy.models.structure import find_blocks, matrix_of
from owl_deploy.sparse.formats import Head, Weights
from owl_deploy.sparse.library import library_path

_OF_THE_FILE = {"_name_or_path", "transformers_version"}  # what a config says of where it came from


class DenseGraph:
    """The graph of onnxruntime-genai that sparse flavors are made from, wherever there is one.

    It is the bundle's own; or that of a model which differs in the weights of its blocks' linears alone, as the levels
    of a sweep do; or it is made when asked for, in `directory`.
    """

    def __init__(self, checkpoint: Path, directory: Path, model: PreTrainedModel, has_tokenizer: bool) -> None:
        self.directory = self._made_in = directory
        self.model = model
        self._checkpoint = checkpoint
        self._has_tokenizer = has_tokenizer

    def use(self, directory: Path, audit: AuditRecord | None) -> None:
        """Take the genai flavor of the bundle: the same graph, of the same weights."""
        if audit is not None:
            self.directory, self.audit = directory, audit

    def borrow(self, bundle: Path) -> None:
        """Take the genai flavor of another bundle, if it has one and its model differs in blocks' linears alone."""
        lender = read_bundle(bundle) if (bundle / MANIFEST).is_file() else None
        if lender is None or lender.versions != exporter_versions() or lender.frame_sha256 != self.frame_sha256:
            return
        genai = lender.flavors.get("genai")
        if genai is None or genai.audit is None:
            return
        blocks = find_blocks(self.model)
        of_parts = _linears_of_parts(self.model, genai.audit)
        placed = sum(len(linears) for part, linears in of_parts.items() if part != HEAD)
        if placed == sum(len(block.linears) for block in blocks):
            audit = genai.audit.model_copy(update={"zeros": sum(block.zeros for block in blocks)})
            self.directory, self.audit = bundle / "genai", audit

    @cached_property
    def audit(self) -> AuditRecord:
        """Where its weights are."""
        self.remove()  # what an attempt that failed left
        self.directory.mkdir()
        write_genai(self._checkpoint, self.directory, has_tokenizer=self._has_tokenizer)
        return audit_of(self.directory / GRAPH, self.model)

    @cached_property
    def frame_sha256(self) -> str:
        """See `BundleManifest`."""
        weights = {f"{block.full_name(name)}.weight" for block in find_blocks(self.model) for name in block.linears}
        digest = hashlib.sha256()
        for config in (self.model.config, self.model.generation_config):
            told = config.to_dict() if config is not None else {}
            known = {name: told[name] for name in sorted(told.keys() - _OF_THE_FILE)}
            digest.update(json.dumps(known, default=str).encode())
        for name, tensor in self.model.state_dict().items():
            if name not in weights:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(as_bytes(tensor))
        return digest.hexdigest()

    def remove(self) -> None:
        shutil.rmtree(self._made_in, ignore_errors=True)


def pack_flavor(
    dense: DenseGraph, out: Path, weights: Weights, head: Head | None
) -> tuple[AuditRecord, PackedRecord, dict[str, NDArray[np.float32]]]:
    """Make a sparse flavor in `out` from a dense graph.

    Returns what was found in it, and the weights as they are stored there: [out, in] by the linear's module path.

    Raises:
        UnsupportedFamily: the library of the kernels is missing.
        CheckFailed: a weight in the file is not the model's.
    """
    try:
        library_path()
    except UserError as error:
        raise UnsupportedFamily(str(error)) from error
    audit, linears = dense.audit, _linears_of_parts(dense.model, dense.audit)
    head = head or ("int8" if weights == "int8" else "fp32")
    matrices = write_sparse(dense.directory / GRAPH, out / GRAPH, weights=weights, head=head, linears=linears)
    for file in dense.directory.iterdir():
        if file.is_file() and not file.name.startswith(GRAPH):
            shutil.copy(file, out / file.name)
    stored: dict[str, NDArray[np.float32]] = {}
    squares = np.zeros(2)  # of what storing changed, and of the weights
    for part, stored_as, values in stored_parts(out / GRAPH, matrices):
        first = 0
        for name, weight in linears[part].items():
            found = values[first : first + len(weight)]
            changed = check_stored(name, stored_as, found, weight)
            first += len(weight)
            if stored_as != "fp32":
                stored[name] = found
                squares += changed
    relative_error = float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
    return audit, PackedRecord(head=head, error=relative_error, matrices=matrices), stored


def _linears_of_parts(model: PreTrainedModel, audit: AuditRecord) -> dict[str, dict[str, NDArray[np.float32]]]:
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


def audit_of(graph: Path, model: PreTrainedModel) -> AuditRecord:
    """Find every linear's weight in a dense graph."""
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
