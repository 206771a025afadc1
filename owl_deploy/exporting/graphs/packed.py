"""The `sparse-*` flavors: onnxruntime-genai's graph with its matrices packed, and read back again from the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.bundle.manifest import GRAPH, PackedRecord
from owl_deploy.exporting.graphs.dense import DenseGraph, linears_of_parts
from owl_deploy.exporting.graphs.sparse import write_sparse
from owl_deploy.exporting.verify.packed import check_stored, stored_parts
from owl_deploy.sparse.formats import Head, Weights


def write_packed(
    model: PreTrainedModel, dense: DenseGraph, out: Path, weights: Weights, head: Head | None
) -> tuple[PackedRecord, dict[str, NDArray[np.float32]]]:
    """Write a sparse flavor of `model` into `out`, from a dense graph.

    Args:
        head: how the matrix of the vocabulary is stored; None for what goes with the weights.

    Returns how each matrix is stored, and the weights as they are stored: [out, in] by the linear's module path.

    Raises:
        CheckFailed: a weight in the file is not the model's.
    """
    linears = linears_of_parts(model, dense.audit)
    head = head or ("int8" if weights in ("int8", "int4") else "fp32")
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
    return PackedRecord(head=head, error=relative_error, matrices=matrices), stored
