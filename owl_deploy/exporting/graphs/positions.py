"""Which positions a graph computes logits of: all of them, unless whoever runs it asks for the last ones alone.

The head's product is the largest of all where the vocabulary is: of a prompt, generation needs its last row only.
"""

from __future__ import annotations

import numpy as np
import onnx

from owl_deploy.bundle.names import LOGITS_FROM

_PRODUCTS = frozenset({"MatMul", "MatMulNBits"})  # those that keep the axes of a [B, L, D] input
_AFTER_PRODUCT = frozenset({"Add", "Mul", "Div", "Tanh", "Cast"})  # a bias, a cap on the logits


def select_positions(model: onnx.ModelProto) -> None:
    """Let the head of `model` see the positions from `LOGITS_FROM` on; `logits` is then [B, positions, vocab].

    `LOGITS_FROM` is an input with a default of 0, which is all positions: those who do not know of it run the graph as
    before. A graph whose head does not look like one stays as it is.
    """
    graph = model.graph
    head = _head(graph)
    if head is None:
        return
    place = next(place for place, node in enumerate(graph.node) if node is head)
    bounds = {"logits_to": np.iinfo(np.int64).max, "logits_axis": 1}
    selected = f"{head.input[0]}.selected"
    graph.node.insert(
        place, onnx.helper.make_node("Slice", [head.input[0], LOGITS_FROM, *bounds], [selected], name=selected)
    )
    head.input[0] = selected
    for name, value in {LOGITS_FROM: 0, **bounds}.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    graph.input.append(onnx.helper.make_tensor_value_info(LOGITS_FROM, onnx.TensorProto.INT64, [1]))
    logits = next(value for value in graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "logits_length"
    inferred = {name for node in graph.node[place + 1 :] for name in node.output}
    for value in [value for value in graph.value_info if value.name in inferred]:
        graph.value_info.remove(value)  # their shapes are of all positions


def _head(graph: onnx.GraphProto) -> onnx.NodeProto | None:
    """The node that multiplies by the matrix of the vocabulary, if nothing but elementwise nodes follow it."""
    producers = {output: node for node in graph.node for output in node.output if node.op_type != "Constant"}
    node = producers.get("logits")
    while node is not None and node.op_type in _AFTER_PRODUCT:
        before = [producers[name] for name in node.input if name in producers]
        node = before[0] if len(before) == 1 else None
    return node if node is not None and node.op_type in _PRODUCTS else None
