"""Is every weight of the checkpoint in the graph, zeros included? Nothing densified, folded or merged unseen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from owl_deploy.errors import CheckFailed

_HASH_SEED = 0
_HASH_ROWS = 256  # rows hashed at a time: bounds the memory for 64-bit products
_NAMED = 3  # missing weights named in the error


@dataclass(frozen=True)
class AuditedWeight:
    """Where one linear's weight lies in the graph.

    Attributes:
        name: the linear, by module path.
        initializer: the graph's tensor that holds it, alone or beside others (merged q, k and v).
        first_column: of the initializer, [in, columns]; or its first row where the layout is [rows, in].
        zeros: equal in checkpoint and graph, as is every other value.
    """

    name: str
    initializer: str
    first_column: int
    weights: int
    zeros: int


def audit_graph(graph: Path, linears: Mapping[str, NDArray[np.float32]]) -> list[AuditedWeight]:
    """Find every linear's weight, unchanged, among the initializers of `graph`.

    Args:
        linears: weights [out, in] by module path, as pruned.

    Raises:
        CheckFailed: some weight is not in the graph as it is in the checkpoint.
    """
    tensors = [_Initializer(name, values) for name, values in _matrices(graph)]
    found = [_find(name, weight, tensors) for name, weight in linears.items()]
    missing = [name for name, place in zip(linears, found, strict=True) if place is None]
    if missing:
        named = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")
        raise CheckFailed(f"{graph.name}: weights changed or lost on the way into the graph: {named}")
    return [place for place in found if place is not None]


def _matrices(graph: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The graph's two-dimensional fp32 initializers; external ones are mapped, not read."""
    model = onnx.load(str(graph), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) != 2:
            continue
        shape = (tensor.dims[0], tensor.dims[1])
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            yield tensor.name, numpy_helper.to_array(tensor)
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        offset = int(place.get("offset", 0))
        yield tensor.name, np.memmap(graph.parent / place["location"], np.float32, "r", offset, shape)


class _Initializer:
    """A matrix of the graph, with a hash of each column and, when asked for, of each row."""

    def __init__(self, name: str, values: NDArray[np.float32]) -> None:
        self.name = name
        self.values = values
        self.hashes = _column_hashes(values)
        self._row_hashes: NDArray[np.uint64] | None = None

    @property
    def row_hashes(self) -> NDArray[np.uint64]:
        if self._row_hashes is None:
            self._row_hashes = _column_hashes(self.values.T)
        return self._row_hashes


def _column_hashes(matrix: NDArray[np.float32]) -> NDArray[np.uint64]:
    """A 64-bit hash of each column's bits, with -0.0 taken for 0.0."""
    rows, columns = matrix.shape
    multipliers = np.asarray(np.random.default_rng(_HASH_SEED).integers(1, 2**63, rows, dtype=np.uint64))
    hashes: NDArray[np.uint64] = np.zeros(columns, np.uint64)
    for start in range(0, rows, _HASH_ROWS):
        bits = (matrix[start : start + _HASH_ROWS] + np.float32(0)).view(np.uint32).astype(np.uint64)
        hashes += multipliers[start : start + _HASH_ROWS] @ bits
    return hashes


def _find(name: str, weight: NDArray[np.float32], tensors: Iterable[_Initializer]) -> AuditedWeight | None:
    transposed = np.ascontiguousarray(weight.T)
    first_hash = _column_hashes(transposed[:, :1])
    inputs, outputs = transposed.shape
    for tensor in tensors:
        rows, columns = tensor.values.shape
        layouts = []
        if rows == inputs and columns >= outputs:
            layouts.append((tensor.hashes, tensor.values))
        if columns == inputs and rows >= outputs:
            layouts.append((tensor.row_hashes, tensor.values.T))
        for hashes, values in layouts:
            for column in np.flatnonzero(hashes == first_hash):
                if np.array_equal(values[:, column : column + outputs], transposed):
                    zeros = int(weight.size - np.count_nonzero(weight))
                    return AuditedWeight(name, tensor.name, int(column), weight.size, zeros)
    return None
