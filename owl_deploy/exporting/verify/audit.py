"""Is every weight of the checkpoint in the graph, zeros included? Nothing densified, folded or merged unseen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from owl_deploy.bundle.tensors import external_array
from owl_deploy.errors import CheckFailed
from owl_deploy.machine.threads import in_order

_HASH_SEED = 0
_HASHED_ROWS = 48  # enough to tell columns apart; what matches is then compared in full
_STRIP = 64  # columns of a matrix that are compared together
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
    found = list(in_order(lambda linear: _find(*linear, tensors), linears.items()))
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
        yield tensor.name, external_array(graph, tensor)


class _Initializer:
    """A matrix of the graph, in the layout [in, columns] and, where that is not how it lies, transposed."""

    def __init__(self, name: str, values: NDArray[np.float32]) -> None:
        self.name = name
        self.layouts = (_Hashed(values), _Hashed(values.T))


class _Hashed:
    """A matrix with a hash of each column, made when first asked for."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        return _column_hashes(self.values)


def _column_hashes(matrix: NDArray[np.float32]) -> NDArray[np.uint64]:
    """A 64-bit hash of some of each column's values, with -0.0 taken for 0.0."""
    rows = np.linspace(0, len(matrix) - 1, min(len(matrix), _HASHED_ROWS)).astype(int)
    multipliers = np.asarray(np.random.default_rng(_HASH_SEED).integers(1, 2**63, len(rows), dtype=np.uint64))
    bits = (matrix[rows] + np.float32(0)).view(np.uint32).astype(np.uint64)
    hashes: NDArray[np.uint64] = multipliers @ bits
    return hashes


def _find(name: str, weight: NDArray[np.float32], tensors: Iterable[_Initializer]) -> AuditedWeight | None:
    inputs, outputs = weight.shape[1], weight.shape[0]
    first_hash = _column_hashes(weight[:1].T)
    for tensor in tensors:
        for layout in tensor.layouts:
            rows, columns = layout.values.shape
            if rows != inputs or columns < outputs:
                continue
            for column in np.flatnonzero(layout.hashes == first_hash):
                if _equal(layout.values[:, column : column + outputs], weight):
                    zeros = int(weight.size - np.count_nonzero(weight))
                    return AuditedWeight(name, tensor.name, int(column), weight.size, zeros)
    return None


def _equal(matrix: NDArray[np.float32], weight: NDArray[np.float32]) -> bool:
    """Whether a matrix [in, out] is the transpose of a weight [out, in]; in strips, as one of them is read across."""
    strips = (slice(first, first + _STRIP) for first in range(0, len(weight), _STRIP))
    return all(np.array_equal(matrix[:, strip], weight[strip].T) for strip in strips)
