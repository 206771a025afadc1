"""How many bytes the matrices of a flavor take, as its file has them: of the blocks' linears, and of the head.

A matrix takes its values, their scales and their zero points. Those of the blocks have a block's number in their names,
in every format; what else a product reads is the head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import onnx
from gguf import GGUFReader
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel

from owl_deploy.bundle.manifest import GRAPH, FlavorRecord
from owl_deploy.bundle.names import Flavor, model_file
from owl_deploy.bundle.records import StoredRecord
from owl_deploy.sparse.formats import SPARSE_OPERATOR

_OF_A_BLOCK = re.compile(r"\.\d+[./]")
_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm"})
_DECOMPRESSION = frozenset({"Convert", "Subtract", "Multiply", "Reshape", "Transpose"})
_BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_GGUF_BLOCK, _GGUF_HEAD, _GGUF_EMBEDDING = "blk.", "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class _Matrix:
    """One matrix: the path it goes by, its number of weights, and its bytes."""

    name: str
    weights: int
    bytes: int


def stored_in(folder: Path, flavor: Flavor, record: FlavorRecord, model: PreTrainedModel) -> StoredRecord:
    """What the file of a flavor of this model, in `folder`, holds."""
    if flavor.startswith("gguf"):
        matrices = _in_gguf(folder / model_file(flavor))
    elif flavor.startswith("openvino"):
        matrices = _in_openvino(folder / model_file(flavor))
    elif flavor == "torch":
        matrices = _in_safetensors(sorted(folder.glob("*.safetensors")))
    else:
        matrices = _in_onnx(folder / GRAPH, record)
    linears: list[_Matrix] = []
    others: list[_Matrix] = []
    for matrix in matrices:
        (linears if _OF_A_BLOCK.search(matrix.name) else others).append(matrix)
    return StoredRecord(
        parameters=sum(values.numel() for values in model.parameters()),
        linear_weights=sum(matrix.weights for matrix in linears),
        linear_bytes=sum(matrix.bytes for matrix in linears),
        head_weights=sum(matrix.weights for matrix in others),
        head_bytes=sum(matrix.bytes for matrix in others),
        cache_values=_cache_values(model.config.get_text_config()),
    )


def _cache_values(config: PretrainedConfig) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_size)


def _in_onnx(graph: Path, record: FlavorRecord) -> Iterator[_Matrix]:
    """The constant matrices of a graph's products; how packed ones are stored is what their record says.

    Of dense ones in blocks only what the audit found: a graph may turn heads by small matrices of its own.
    """
    model = onnx.load(str(graph), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    audited = {place.partition("[")[0] for place in record.audit.linears.values()} if record.audit else set()
    packed = {matrix.name: matrix for matrix in record.packed.matrices} if record.packed else {}
    for node in model.graph.node:
        read = [tensors[name] for name in node.input[1:] if name in tensors]
        if not read:
            continue
        if node.op_type == SPARSE_OPERATOR:
            matrix = packed[read[0].name]
            yield _Matrix(node.name, matrix.rows * matrix.columns, matrix.bytes)
        elif node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            yield _Matrix(node.name, sizes["K"] * sizes["N"], sum(_bytes_of(tensor) for tensor in read))
        elif node.op_type in _PRODUCTS and (read[0].name in audited or not _OF_A_BLOCK.search(node.name)):
            yield _Matrix(node.name, math.prod(read[0].dims), _bytes_of(read[0]))


def _bytes_of(tensor: onnx.TensorProto) -> int:
    size: int = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return size


def _in_gguf(path: Path) -> Iterator[_Matrix]:
    """The head is the token embedding where the file has no other."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    head = _GGUF_HEAD if _GGUF_HEAD in tensors else _GGUF_EMBEDDING
    for name, tensor in tensors.items():
        if len(tensor.shape) > 1 and (name.startswith(_GGUF_BLOCK) or name == head):
            yield _Matrix(name, int(tensor.n_elements), int(tensor.n_bytes))


def _in_openvino(path: Path) -> Iterator[_Matrix]:
    """Of each MatMul all constants behind its second input: the graph decompresses weights by operators of its own."""
    root = ElementTree.parse(path).getroot()
    layers = {layer.attrib["id"]: layer for layer in root.iter("layer")}
    sources: dict[str, list[str]] = {}
    for edge in sorted(root.iter("edge"), key=lambda edge: int(edge.attrib["to-port"])):
        sources.setdefault(edge.attrib["to-layer"], []).append(edge.attrib["from-layer"])
    for number, layer in layers.items():
        if layer.attrib["type"] == "MatMul":
            constants = _constants(sources[number][1], layers, sources)
            weights, is_matrix = max(((size.weights, size.is_matrix) for size in constants or ()), default=(0, False))
            if is_matrix:
                yield _Matrix(layer.attrib["name"], weights, sum(size.bytes for size in constants or ()))


@dataclass(frozen=True)
class _Constant:
    """A constant of OpenVINO's: its number of elements, its bytes, and whether it has two dimensions above 1."""

    weights: int
    bytes: int
    is_matrix: bool


def _constants(
    number: str, layers: dict[str, ElementTree.Element], sources: dict[str, list[str]]
) -> list[_Constant] | None:
    """What this layer is computed from; None if that is more than constants, decompressed."""
    layer = layers[number]
    if layer.attrib["type"] == "Const":
        data = layer.find("data")
        assert data is not None
        shape = [int(size) for size in data.attrib["shape"].split(",") if size.strip()]
        is_matrix = sum(size > 1 for size in shape) > 1
        return [_Constant(math.prod(shape), int(data.attrib["size"]), is_matrix)]
    if layer.attrib["type"] not in _DECOMPRESSION:
        return None
    found: list[_Constant] = []
    for source in sources[number]:
        constants = _constants(source, layers, sources)
        if constants is None:
            return None
        found += constants
    return found


def _in_safetensors(paths: Iterable[Path]) -> Iterator[_Matrix]:
    """The head is the token embedding where there is no other."""
    found = {name: matrix for path in paths for name, matrix in _matrices_in(path)}
    head = next((name for name in found if name.startswith("lm_head.")), None)
    for name, matrix in found.items():
        if _OF_A_BLOCK.search(name) or name == head or (head is None and "embed" in name):
            yield matrix


def _matrices_in(path: Path) -> Iterator[tuple[str, _Matrix]]:
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            if len(shape := part.get_shape()) == 2:
                weights = math.prod(shape)
                yield name, _Matrix(name, weights, weights * _BYTES_OF[part.get_dtype()])
