"""What a sparse graph really holds: every packed matrix read back from the file and held against the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from owl_deploy.bundle.records import MatrixRecord
from owl_deploy.bundle.tensors import external_array
from owl_deploy.errors import CheckFailed
from owl_deploy.exporting.graphs.sparse import HEAD
from owl_deploy.machine.threads import in_order
from owl_deploy.sparse.formats import Stored
from owl_deploy.sparse.library import unpack

# The largest error of a stored weight, as a part of the largest of its row; packed32's is a part of the weight itself.
_ROW_ERROR: dict[Stored, float] = {"packed16": 1.001 / 1023, "int8": 0.501 / 127, "dense8": 0.501 / 127}
# … and of a stored 4-bit weight, as a part of the largest of its group: that may be cut to 0.7, and has 7 steps of an
# eighth on one side. Scales are fp16, which has no finer steps than 2^-24.
_GROUP_ERROR, _GROUP, _HALF_STEPS = 0.4, 64, 2.0**-21
_OWN_ERROR = 2.0**-18
_ROWS = 64  # looked at together: what is computed of them stays in the cache
_SMALLEST = 2.0**-120  # errors below it are those of denormal weights


def stored_parts(graph: Path, records: Sequence[MatrixRecord]) -> Iterator[tuple[str, Stored, NDArray[np.float32]]]:
    """Each part of the dense graph: its name there, its format, and its weights [out, in] as stored.

    The head is left out where it is not packed; embeddings may share it, and have it the other way round.
    """
    model = onnx.load(str(graph), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    checked = [record for record in records if record.format != "fp32" or record.parts != [HEAD]]

    def read(record: MatrixRecord) -> list[NDArray[np.float32]]:
        if record.format == "fp32":
            return [external_array(graph, tensors[part]).T for part in record.parts]
        return np.split(unpack(external_array(graph, tensors[record.name])), len(record.parts))

    for record, matrices in zip(checked, in_order(read, checked), strict=True):
        for part, weights in zip(record.parts, matrices, strict=True):
            yield part, record.format, weights


def check_stored(
    name: str, stored_as: Stored, stored: NDArray[np.float32], weight: NDArray[np.float32]
) -> tuple[float, float]:
    """Compare a stored weight [out, in] with the pruned one; the squares of their difference and of the weight, summed.

    Raises:
        CheckFailed: a zero is not one any more, or a value is further off than the format may be.
    """
    squares = np.zeros(2)
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        squares += _check_rows(name, stored_as, stored[rows], weight[rows])
    return float(squares[0]), float(squares[1])


def _check_rows(
    name: str, stored_as: Stored, stored: NDArray[np.float32], weight: NDArray[np.float32]
) -> tuple[float, float]:
    """`check_stored` of some rows."""
    if stored_as == "fp32":
        if not np.array_equal(stored, weight):
            raise CheckFailed(f"{name}: a weight that was to stay as it is was changed on the way into the graph")
        return 0.0, 0.0
    is_pruned, is_zero = weight == 0, stored == 0
    if (is_pruned > is_zero).any():
        raise CheckFailed(f"{name}: a pruned weight is not zero in the packed graph")
    if stored_as in ("packed32", "packed16") and (is_zero > is_pruned).any():
        raise CheckFailed(f"{name}: a weight was lost on the way into the packed graph")
    error, size = np.abs(stored - weight), np.abs(weight)
    if stored_as in ("int4", "dense4"):
        allowed = _largest_of_groups(size) * np.float32(_GROUP_ERROR) + np.float32(_HALF_STEPS)
    elif stored_as in _ROW_ERROR:
        allowed = size.max(axis=1, keepdims=True) * _ROW_ERROR[stored_as]
    else:
        allowed = size * np.float32(_OWN_ERROR)
    if not (error <= allowed + _SMALLEST).all():  # NaN fails too
        raise CheckFailed(f"{name}: packed as {stored_as}, a weight is off by {error.max():.3g}")
    return _squares(error), _squares(size)


def _largest_of_groups(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest of each row's group of columns, for each of them: [rows, columns]."""
    largest = np.maximum.reduceat(values, np.arange(0, values.shape[1], _GROUP), axis=1)
    return np.repeat(largest, _GROUP, axis=1)[:, : values.shape[1]]


def _squares(values: NDArray[np.float32]) -> float:
    """The sum of their squares: each row's in fp32, all rows' in fp64."""
    return float(np.einsum("ij,ij->i", values, values).sum(dtype=np.float64))


def rows_of_parts(linears: Mapping[str, str]) -> dict[str, list[tuple[int, str]]]:
    """The audit's `initializer[first column]` of each linear, the other way round: for each initializer its linears."""
    found: dict[str, list[tuple[int, str]]] = {}
    for linear, place in linears.items():
        initializer, _, first = place.rstrip("]").rpartition("[")
        found.setdefault(initializer, []).append((int(first), linear))
    return found
