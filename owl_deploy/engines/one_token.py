"""A static graph for a single token, without what only several tokens need.

DeepSparse's compiler searches the graph in a time that grows with the cube of the number of blocks, and fastest where
paths fork: of 22 small blocks it took 168 s with rotary embeddings as they are traced (Split, Neg, Concat), 57 s with
a half turn that is one product, and 24 s of what this module leaves. Tokens are decoded as fast as before.

Shapes: B = L = 1; H heads of E elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from owl_deploy.export.names import HALF_TURN

_SWAP = [0, 2, 1, 3]  # of heads and tokens: with one token, the same values in the same order


def simplified(
    nodes: Iterable[NodeProto], constants: Mapping[str, NDArray[np.generic]]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes in their order, some replaced, and the constants that are new. What is not read any more stays.

    Args:
        constants: the values of the graph's small initializers.
    """
    graph = _OneToken(list(nodes), constants)
    return list(graph.rewritten()), list(graph.added.values())


class _OneToken:
    def __init__(self, nodes: list[NodeProto], constants: Mapping[str, NDArray[np.generic]]) -> None:
        self._nodes = nodes
        self._constants = constants
        self._producers = {output: node for node in nodes for output in node.output}
        self._rotations: dict[tuple[str, str], str] = {}
        self.added: dict[str, TensorProto] = {}

    def rewritten(self) -> Iterator[NodeProto]:
        for node in self._nodes:
            yield from self._rotated(node) or self._split(node) or self._joined(node) or [node]

    def _rotated(self, node: NodeProto) -> list[NodeProto] | None:
        """x cos + (x R) sin as one product of x: cos and sin are the same in all blocks, and so is their matrix."""
        straight, across = self._inputs(node, "Add", "Mul", "Mul")
        turned = self._producers.get(across.input[0]) if across else None
        if straight is None or across is None or turned is None or list(turned.input) != [straight.input[0], HALF_TURN]:
            return None
        states, cos = straight.input
        made = self._rotation(cos, across.input[1])
        return [*made, helper.make_node("MatMul", [states, self._rotations[cos, across.input[1]]], node.output)]

    def _rotation(self, cos: str, sin: str) -> list[NodeProto]:
        """The nodes that make the matrix diag(cos) + R diag(sin), [1, 1, E, E], unless they are there."""
        if (cos, sin) in self._rotations:
            return []
        name = self._rotations[cos, sin] = f"rotation.{len(self._rotations)}"
        head_dim = len(self._constants[HALF_TURN])
        unit = self._constant("rotation.unit", np.eye(head_dim, dtype=np.float32))
        parts = [(unit, cos, f"{name}.straight"), (HALF_TURN, sin, f"{name}.across")]
        return [
            *(helper.make_node("Mul", [matrix, angles], [part]) for matrix, angles, part in parts),
            helper.make_node("Add", [part for _, _, part in parts], [name]),
        ]

    def _split(self, node: NodeProto) -> list[NodeProto] | None:
        """[1, 1, H * E] into heads [1, H, 1, E], without a step between."""
        reshape = self._swapped_reshape(node)
        shape = self._shape(reshape)
        if reshape is None or len(shape) != 4 or shape[:2] != [0, 0]:
            return None
        return [self._reshape(reshape.input[0], [1, shape[2], 1, shape[3]], node)]

    def _joined(self, node: NodeProto) -> list[NodeProto] | None:
        """Heads back into [1, 1, H * E], likewise."""
        if self._shape(node) != [0, 0, -1]:
            return None
        reshape = self._swapped_reshape(self._producers.get(node.input[0]))
        return None if reshape is None else [self._reshape(reshape.input[0], [1, 1, -1], node)]

    def _swapped_reshape(self, node: NodeProto | None) -> NodeProto | None:
        """The Reshape whose result `node` transposes."""
        if node is None or node.op_type != "Transpose" or list(helper.get_node_attr_value(node, "perm")) != _SWAP:
            return None
        source = self._producers.get(node.input[0])
        return source if source is not None and self._shape(source) else None

    def _shape(self, node: NodeProto | None) -> list[int]:
        """The constant that a Reshape takes; nothing for any other node."""
        if node is None or node.op_type != "Reshape" or node.input[1] not in self._constants:
            return []
        return [int(size) for size in self._constants[node.input[1]]]

    def _inputs(self, node: NodeProto, kind: str, *kinds: str) -> tuple[NodeProto | None, ...]:
        """The nodes of these kinds that a node of this kind reads; None for each where it is none, or reads others."""
        made = tuple(self._producers.get(name) for name in node.input)
        if node.op_type != kind or tuple(source.op_type if source else "" for source in made) != kinds:
            return (None,) * len(kinds)
        return made

    def _reshape(self, states: str, shape: list[int], node: NodeProto) -> NodeProto:
        name = self._constant("one_token." + "_".join(map(str, shape)), np.array(shape, np.int64))
        return helper.make_node("Reshape", [states, name], node.output)

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.added[name] = numpy_helper.from_array(value, name)
        return name
