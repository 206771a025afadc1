"""The `sparse-*` flavors: onnxruntime-genai's graph with its matrices packed, for `owl::SparseMatMul`.

The graph stays what it was but for three things. A MatMul with constant weights becomes a SparseMatMul, where packing
pays. A gate and an up projection of the same input become one, which applies the gate too: `silu(gate) * up`. And
where embedding and head share their weights, the embedding is stored as its rows, so that a lookup touches one row of
a mapped file and nothing is transposed when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from owl_deploy.bundle.records import MatrixRecord
from owl_deploy.bundle.tensors import ExternalData, external_array, transposed
from owl_deploy.errors import UserError
from owl_deploy.exporting.graphs.cache import exact_cache
from owl_deploy.exporting.graphs.selection import choose, choose_head
from owl_deploy.machine.threads import in_order
from owl_deploy.sparse.formats import SPARSE_DOMAIN, SPARSE_OPERATOR, Head, Weights
from owl_deploy.sparse.library import pack

HEAD = "lm_head.MatMul.weight"  # what onnxruntime-genai's builder calls it
_INLINE_BYTES = 1 << 12

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Product:
    """A product with constant weights, and the nodes that it stands for."""

    x: str
    y: str
    parts: list[str]
    paired: bool
    nodes: list[onnx.NodeProto]


def write_sparse(
    dense: Path, out: Path, *, weights: Weights, head: Head, linears: Mapping[str, Mapping[str, NDArray[np.float32]]]
) -> list[MatrixRecord]:
    """Rewrite the graph `dense`, as onnxruntime-genai's builder made it, as `out`; its data goes beside it.

    Args:
        linears: of the initializers of `dense` that are made of pruned linears, and of the head, what they are to
            hold: weights [out, in], one after the other. Nothing else is packed; it is taken from `dense`.

    Raises:
        UserError: a weight cannot be packed, or the library of the kernels is missing.
    """
    model = onnx.load(str(dense), load_external_data=False)
    exact_cache(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    packable = {name for name, tensor in tensors.items() if _holds(tensor, linears.get(name, {}))}
    products = [product for product in _products(model.graph, tensors) if packable.issuperset(product.parts)]
    records: list[MatrixRecord] = []
    initializers: list[onnx.TensorProto] = []
    nodes: dict[int, onnx.NodeProto] = {}  # by the place of the last node that each stands for
    gone: set[int] = set()
    places = {id(node): place for place, node in enumerate(model.graph.node)}

    def packed(product: _Product) -> tuple[MatrixRecord, NDArray[Any] | None]:
        return _pack(product, _joined(*(linears[part] for part in product.parts)), weights, head)

    with ExternalData(out.with_name(f"{out.name}.data")) as data:
        for product, (record, stored) in zip(products, in_order(packed, products), strict=True):
            records.append(record)
            if stored is None:
                continue
            initializers.append(data.add(record.name, stored))
            taken = [places[id(node)] for node in product.nodes]
            gone.update(taken)
            nodes[max(taken)] = onnx.helper.make_node(
                SPARSE_OPERATOR,
                [product.x, record.name],
                [product.y],
                name=f"/{record.name}/{SPARSE_OPERATOR}",
                domain=SPARSE_DOMAIN,
            )
        kept = [
            nodes.get(place, node) for place, node in enumerate(model.graph.node) if place not in gone or place in nodes
        ]
        kept, embedding = _untied(kept, tensors)
        del model.graph.node[:]
        model.graph.node.extend(kept)
        unpacked = {part for record in records if record.format == "fp32" for part in record.parts} - {HEAD}
        used = {name for node in kept for name in node.input} - {tensor.name for tensor in initializers}
        for name, tensor in tensors.items():
            if name not in used:
                continue
            values = external_array(dense, tensor)
            if name == embedding:
                values = values.T
            elif name in unpacked:
                values = transposed(_joined(linears[name]))
            small = values.nbytes <= _INLINE_BYTES
            initializers.append(
                onnx.numpy_helper.from_array(np.ascontiguousarray(values), name) if small else data.add(name, values)
            )
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)
    model.opset_import.append(onnx.helper.make_opsetid(SPARSE_DOMAIN, 1))
    onnx.save(model, str(out))
    return records


def _holds(tensor: onnx.TensorProto, linears: Mapping[str, NDArray[np.float32]]) -> bool:
    """Whether an initializer [in, out] is made of these linears and nothing else."""
    return _is_matrix(tensor) and sum(len(weights) for weights in linears.values()) == tensor.dims[1]


def _joined(*parts: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """All weights [out, in] of these linears, one below the other; copied only if there are several."""
    weights = [weight for linears in parts for weight in linears.values()]
    return weights[0] if len(weights) == 1 else np.concatenate(weights)


def _products(graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto]) -> Iterator[_Product]:
    """The products of a graph with constant fp32 matrices, gate and up projections joined."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    matmuls = [node for node in graph.node if node.op_type == "MatMul" and _is_matrix(tensors.get(node.input[1]))]
    joined: set[str] = set()
    pairs = {}
    for gate in matmuls:
        found = _gated(gate, matmuls, users, tensors)
        if found is not None:
            pairs[gate.name] = found
            joined |= {node.name for node in found.nodes}
    for node in matmuls:
        if node.name in pairs:
            yield pairs[node.name]
        elif node.name not in joined:
            yield _Product(node.input[0], node.output[0], [node.input[1]], False, [node])


def _is_matrix(tensor: onnx.TensorProto | None) -> bool:
    return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2


def _gated(
    gate: onnx.NodeProto,
    matmuls: Iterable[onnx.NodeProto],
    users: dict[str, list[onnx.NodeProto]],
    tensors: dict[str, onnx.TensorProto],
) -> _Product | None:
    """`gate` with all that makes it a gated unit: Mul(Mul(gate, Sigmoid(gate)), up), nothing of it used elsewhere."""
    sigmoid = _only(user for user in users.get(gate.output[0], ()) if user.op_type == "Sigmoid")
    silu = _only(user for user in users.get(gate.output[0], ()) if user.op_type == "Mul")
    if sigmoid is None or silu is None or len(users[gate.output[0]]) != 2:
        return None
    if set(silu.input) != {gate.output[0], sigmoid.output[0]} or len(users[sigmoid.output[0]]) != 1:
        return None
    product = _only(users.get(silu.output[0], ()))
    if product is None or product.op_type != "Mul":
        return None
    other = next((name for name in product.input if name != silu.output[0]), None)
    up = _only(node for node in matmuls if node.output[0] == other)
    if up is None or up.input[0] != gate.input[0] or len(users[up.output[0]]) != 1:
        return None
    if list(tensors[up.input[1]].dims) != list(tensors[gate.input[1]].dims):
        return None
    nodes = [gate, up, sigmoid, silu, product]
    return _Product(gate.input[0], product.output[0], [gate.input[1], up.input[1]], True, nodes)


def _only(items: Iterable[Item]) -> Item | None:
    """The one item there is; None for none or several."""
    first = list(islice(items, 2))
    return first[0] if len(first) == 1 else None


def _pack(
    product: _Product, matrix: NDArray[np.float32], weights: Weights, head: Head
) -> tuple[MatrixRecord, NDArray[Any] | None]:
    """A matrix [out, in] as it is to be stored; None if the graph keeps it as it is."""
    rows, columns = matrix.shape
    nonzeros = int(np.count_nonzero(matrix))
    is_head = product.parts == [HEAD]
    wanted = choose_head(head) if is_head else choose(weights, nonzeros / matrix.size)
    stored = None
    if wanted != "fp32":
        try:
            stored = pack(matrix, wanted, paired=product.paired)
        except ValueError as error:
            raise UserError(f"{product.parts[0]}: cannot be packed as {wanted} ({error})") from error
    name = product.parts[0] if stored is None else f"{product.parts[0]}.{wanted}"
    record = MatrixRecord(
        name=name,
        parts=product.parts,
        rows=rows,
        columns=columns,
        nonzeros=nonzeros,
        format=wanted,
        bytes=matrix.nbytes if stored is None else stored.nbytes,
    )
    return record, stored


def _untied(
    nodes: list[onnx.NodeProto], tensors: dict[str, onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], str | None]:
    """Without the Transpose between a shared matrix and the embedding's Gather; the name of that matrix, if any.

    It is then stored as the embedding has it, and a head that still reads it does so with `transB`.
    """
    transpose = _only(node for node in nodes if node.op_type == "Transpose" and _is_matrix(tensors.get(node.input[0])))
    if transpose is None:
        return nodes, None
    shared = transpose.input[0]
    kept = []
    for node in nodes:
        if node is transpose:
            continue
        if node.op_type == "MatMul" and node.input[1] == shared:
            node = onnx.helper.make_node(
                "FusedMatMul", node.input, node.output, name=node.name, domain="com.microsoft", transB=1
            )
        for place, name in enumerate(node.input):
            if name == transpose.output[0]:
                node.input[place] = shared
        kept.append(node)
    return kept, shared
