"""Variants of a `standard` graph with every shape fixed, for engines that compile for static shapes.

Shapes: L new tokens, S tokens that the cache and the new ones fill together; batch 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

from owl_deploy.bundle.names import ATTENTION_BIAS, LOGITS_FROM

Part = Literal["whole", "body", "head"]
"""Of a graph: all of it, up to the hidden states that its head reads, or from these to the logits."""

_PAST, _PRESENT = "past_key_values.", "present."


class StaticGraphs:
    """Makes variants of one graph that differ in L and share S, and the graph's external data.

    Where the graph lets its head see some positions only, it can be cut in two there: one body of L tokens then serves
    for prompts, whose last logits are needed, and for text whose logits are needed everywhere.

    Args:
        graph: an ONNX file with the inputs and outputs of optimum's text-generation-with-past graphs.
        total: S.
    """

    def __init__(self, graph: Path, total: int) -> None:
        self._folder = graph.parent
        self._model: ModelProto = onnx.load(str(graph), load_external_data=False)
        self.total = total
        self._hidden = self._join_head()
        self.past = [value.name for value in self._model.graph.input if value.name.startswith(_PAST)]
        self.outputs = [value.name for value in self._model.graph.output]
        self.present = [name.replace(_PAST, _PRESENT) for name in self.past]
        self._producers = {output: node for node in self._model.graph.node for output in node.output}
        cut = self._producers.get(ATTENTION_BIAS)
        self.query_groups = len(cut.input) if cut else None
        """G where variants take `attention_bias` [1, 1, G * L, S]; None where they take `attention_mask` [1, S]."""

    @property
    def has_parts(self) -> bool:
        """Whether there is a body and a head."""
        return self._hidden is not None

    @property
    def counts_positions(self) -> bool:
        """Whether rotary angles come from the cache's length, which a fixed shape makes the same for every token."""
        angles = any(node.op_type in ("Cos", "Sin") for node in self._model.graph.node)
        return angles and all(value.name != "position_ids" for value in self._model.graph.input)

    def cache_shape(self, length: int) -> tuple[int, int, int, int]:
        """Shape of a layer's keys or values that hold `length` tokens, [1, heads, length, head dimension]."""
        past = next(value for value in self._model.graph.input if value.name.startswith(_PAST))
        _, heads, _, head_dim = (dimension.dim_value for dimension in past.type.tensor_type.shape.dim)
        return 1, heads, length, head_dim

    def _join_head(self) -> ValueInfoProto | None:
        """Give the head every position, without a Slice between; the hidden states it reads, [1, L, D].

        None where there is no such Slice, or the head's matrix is not a plain initializer.
        """
        graph = self._model.graph
        selection = next((node for node in graph.node if LOGITS_FROM in node.input), None)
        if selection is None:
            return None
        (selected,), hidden = selection.output, selection.input[0]
        (head,) = (node for node in graph.node if selected in node.input)
        head.input[0] = hidden
        graph.node.remove(selection)
        widths = [tensor.dims[0] for tensor in graph.initializer if tensor.name == head.input[1]]
        return helper.make_tensor_value_info(hidden, onnx.TensorProto.FLOAT, [1, "L", widths[0]]) if widths else None

    def write(self, folder: Path, new: int, part: Part = "whole") -> Path:
        """Write the variant that takes `new` tokens (L) into `folder`, with links to the data it refers to.

        Args:
            part: "body" and "head" if the graph `has_parts`.
        """
        source = self._model.graph
        inputs = [self._fixed(value, new) for value in source.input]
        logits, *presents = (self._fixed(value, new) for value in source.output)
        outputs = [logits, *presents]
        if part != "whole":
            assert self._hidden is not None
            hidden = self._fixed(self._hidden, new)
            inputs, outputs = (inputs, [hidden, *presents]) if part == "body" else ([hidden], [logits])
        if self.query_groups is not None:
            bias_shape = [1, 1, self.query_groups * new, self.total]
            inputs.append(helper.make_tensor_value_info(ATTENTION_BIAS, onnx.TensorProto.FLOAT, bias_shape))
        nodes = self._needed({value.name for value in outputs}, {value.name for value in inputs})
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            source.name,
            [value for value in inputs if value.name in read],
            outputs,
            [tensor for tensor in source.initializer if tensor.name in read],
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        for location in {
            entry.value for t in graph.initializer for entry in t.external_data if entry.key == "location"
        }:
            (folder / location).symlink_to((self._folder / location).resolve())
        path = folder / f"{part}_{new}_of_{self.total}.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    def _fixed(self, value: ValueInfoProto, new: int) -> ValueInfoProto:
        """A graph input or output with its shape filled in."""
        tensor = value.type.tensor_type
        shape: tuple[int, ...]
        if value.name.startswith(_PAST):
            shape = self.cache_shape(self.total - new)
        elif value.name.startswith(_PRESENT):
            shape = self.cache_shape(self.total)
        elif value.name == "attention_mask":
            shape = (1, self.total)
        else:  # input_ids, position_ids; logits and hidden states, whose last dimension is known
            shape = (1, new, *(dimension.dim_value for dimension in tensor.shape.dim[2:]))
        return helper.make_tensor_value_info(value.name, tensor.elem_type, shape)

    def _needed(self, outputs: set[str], inputs: set[str]) -> list[NodeProto]:
        """The nodes on the way from `inputs` to `outputs`, in their order."""
        wanted: set[int] = set()
        tensors = list(outputs)
        while tensors:
            name = tensors.pop()
            node = None if name in inputs else self._producers.get(name)
            if node is not None and id(node) not in wanted:
                wanted.add(id(node))
                tensors.extend(node.input)
        return [node for node in self._model.graph.node if id(node) in wanted]
