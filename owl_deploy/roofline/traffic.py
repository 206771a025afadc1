"""What decoding one token reads: every matrix of a product, the KV cache, and the small rest.

Activations and logits are not counted: they are written and read while they are in a cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from owl_deploy.bundle.manifest import GRAPH, FlavorRecord
from owl_deploy.bundle.names import Flavor
from owl_deploy.errors import UserError
from owl_deploy.files import read_json
from owl_deploy.sparse.formats import SPARSE_OPERATOR

QKV, OUTPUT, GATE_UP, DOWN, HEAD, OTHER = (
    "attention qkv",
    "attention output",
    "mlp gate+up",
    "mlp down",
    "head",
    "other matrices",
)
KINDS = (QKV, OUTPUT, GATE_UP, DOWN, HEAD, OTHER)

# As onnxruntime-genai's builder names them, which is as transformers does.
_PATTERNS = {
    QKV: ("qkv_proj", "q_proj", "k_proj", "v_proj"),
    OUTPUT: ("o_proj", "out_proj"),
    GATE_UP: ("gate_up_proj", "gate_proj", "up_proj", "fc1"),
    DOWN: ("down_proj", "fc2"),
    HEAD: ("lm_head",),
}
_PRODUCTS = (SPARSE_OPERATOR, "MatMul", "FusedMatMul")
_FP32_BYTES = 4
_GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True)
class Matrix:
    """A constant matrix that a product reads.

    Attributes:
        name: the initializer that holds it.
        node: the graph's node that multiplies by it.
        rows, columns: outputs and inputs.
        bytes: as stored.
    """

    name: str
    node: str
    kind: str
    rows: int
    columns: int
    format: str
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """Bytes read for one token.

    Attributes:
        cache_bytes: keys and values of the tokens before it.
        rest_bytes: norms and biases, and one row of the embedding and of each rotary table.
    """

    matrices: list[Matrix]
    cache_format: str
    cache_bytes: int
    rest_bytes: int

    @property
    def bytes(self) -> int:
        return sum(matrix.bytes for matrix in self.matrices) + self.cache_bytes + self.rest_bytes


def kind_of(name: str) -> str:
    """The kind of the matrix of this name."""
    return next((kind for kind, parts in _PATTERNS.items() if any(part in name for part in parts)), OTHER)


def read_traffic(bundle: Path, flavor: Flavor, record: FlavorRecord, past: int) -> Traffic:
    """What the graph of a genai or sparse flavor reads for a token that `past` others precede.

    The cache is counted whole: a model whose attention looks back less far than `past` reads less.

    Raises:
        UserError: the flavor's genai_config.json is missing, or does not describe a decoder.
    """
    graph = onnx.load(str(bundle / flavor / GRAPH), load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    matrices = list(_matrices(graph, tensors, record))
    read_whole = {matrix.name for matrix in matrices}
    rest = (_rest_bytes(tensor) for name, tensor in tensors.items() if name not in read_whole)
    cache_format, element_bytes = ("fp32", _FP32_BYTES) if record.kv_cache is None else ("int8", 1)
    cache_bytes = _cache_elements(bundle / flavor / _GENAI_CONFIG, past) * element_bytes
    return Traffic(matrices, cache_format, cache_bytes, sum(rest))


def _matrices(graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto], record: FlavorRecord) -> Iterator[Matrix]:
    """The manifest says how a packed matrix is stored; of the others the graph's own shape does."""
    matrices = record.packed.matrices if record.packed else []
    stored = {matrix.name: matrix for matrix in matrices if matrix.format != "fp32"}
    for node in graph.node:
        tensor = tensors.get(node.input[1]) if node.op_type in _PRODUCTS else None
        if tensor is None:
            continue
        if tensor.name in stored:
            known = stored[tensor.name]
            yield Matrix(
                name=known.name,
                node=node.name,
                kind=kind_of(known.name),
                rows=known.rows,
                columns=known.columns,
                format=known.format,
                bytes=known.bytes,
            )
        elif len(tensor.dims) == 2:
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            columns, rows = reversed(tensor.dims) if transposed else tensor.dims
            yield Matrix(
                name=tensor.name,
                node=node.name,
                kind=kind_of(tensor.name),
                rows=rows,
                columns=columns,
                format="fp32",
                bytes=rows * columns * _FP32_BYTES,
            )


def _rest_bytes(tensor: onnx.TensorProto) -> int:
    """Of a vector all, of a table one row; constants that are not weights count as nothing."""
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return 0
    row: list[int] = list(tensor.dims[1:] if len(tensor.dims) > 1 else tensor.dims)
    return math.prod(row) * _FP32_BYTES


def _cache_elements(config: Path, past: int) -> int:
    if not config.is_file():
        raise UserError(f"{config} is missing; export the model again")
    try:
        decoder: dict[str, Any] = read_json(config)["model"]["decoder"]
        names = ("num_hidden_layers", "num_key_value_heads", "head_size")
        layers, heads, head_size = (int(decoder[name]) for name in names)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{config}: does not describe a decoder ({error}); export the model again") from error
    return 2 * layers * heads * head_size * past
