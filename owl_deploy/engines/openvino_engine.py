"""OpenVINO's runtime on the stateful graph that OpenVINO GenAI runs too: its KV cache never leaves the engine.

Runs in an environment of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openvino
from openvino import opset8

from owl_deploy.bundle.names import LOGITS_FROM
from owl_deploy.engines.protocol import Logits, TokenIds
from owl_deploy.machine.cpu import Widest, instruction_set

_AFTER_PRODUCT = frozenset({"Add", "Multiply", "Divide", "Tanh", "Convert"})  # a bias, a cap on the logits
_SPARSE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
_DESCRIBED = (
    "INFERENCE_PRECISION_HINT",
    "KV_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "INFERENCE_NUM_THREADS",
    "NUM_STREAMS",
)


class OpenVinoEngine:
    """`protocol.Engine` on OpenVINO's CPU plugin, as it is by default but for the latency hint and the threads.

    As OpenVINO GenAI does, it lets the head see the last position of a prompt only.

    By default it computes in bf16 where the CPU can, keeps keys and values in 8 bits, and rounds the inputs of
    products with compressed weights to 8 bits: what its users get. `describe` says what it chose.
    """

    properties: ClassVar[dict[str, str | int | float]] = {}
    """What is set beside the hint and the threads."""

    widest: ClassVar[Widest] = "amx"
    """Of the instruction sets that its products know: of bf16 and of integers."""

    def __init__(
        self, model: Path, *, threads: int, context: int, prompts: tuple[int, ...] = (), batch: int = 1
    ) -> None:
        del context, prompts  # shapes are dynamic, and the cache grows
        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **self.properties}
        core = openvino.Core()
        graph = core.read_model(model)
        self._selects_positions = _select_positions(graph)
        self._compiled = core.compile_model(graph, "CPU", properties)
        self._request = self._compiled.create_infer_request()
        self._names = {name for value in self._compiled.inputs for name in value.names}
        self._vocabulary = self._compiled.output("logits").partial_shape[2].get_length()
        self._batch = batch
        self._length = 0

    def describe(self) -> dict[str, Any]:
        """Beside the protocol's facts: the precisions it computes in and keeps its cache in."""
        facts = {name.lower(): _as_json(self._compiled.get_property(name)) for name in _DESCRIBED}
        return {
            "version": openvino.__version__,
            "instruction_set": instruction_set(self.widest),
            "prefill_logits": "last" if self._selects_positions else "all",
            **facts,
        }

    def prefill(self, ids: TokenIds) -> Logits:
        self._begin()
        logits: Logits = self._run(ids)[:, -1]
        return logits

    def score(self, ids: TokenIds) -> Logits:
        self._begin()
        return self._run(ids, every_position=True)

    def decode(self, tokens: TokenIds) -> Logits:
        logits: Logits = self._run(tokens[:, None])[:, -1]
        return logits

    def _begin(self) -> None:
        self._request.reset_state()
        self._length = 0

    def _run(self, ids: TokenIds, *, every_position: bool = False) -> Logits:
        """Append `ids` [batch, new] to the sequences; logits [batch, positions, vocab].

        These are of the last position alone, unless `every_position` is asked for or the graph knows no other way.
        """
        new = ids.shape[1]
        total = self._length + new
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((self._batch, total), np.int64),
            "position_ids": np.tile(np.arange(self._length, total), (self._batch, 1)),
            "beam_idx": np.arange(self._batch, dtype=np.int32),
            LOGITS_FROM: np.array([0 if every_position else -1]),
        }
        positions = new if every_position or not self._selects_positions else 1
        logits: Logits = np.empty((self._batch, positions, self._vocabulary), np.float32)
        self._request.set_tensor("logits", openvino.Tensor(logits, shared_memory=True))  # written there, not copied
        self._request.infer({name: array for name, array in feeds.items() if name in self._names}, share_inputs=True)
        self._length = total
        return logits


class OpenVinoFp32Engine(OpenVinoEngine):
    """The same, all of it in fp32: what other engines compute in fp32 is compared with this."""

    properties: ClassVar[dict[str, str | int | float]] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    widest: ClassVar[Widest] = "avx512"


class OpenVinoSparseEngine(OpenVinoEngine):
    """The same, allowed to read sparse weights without their zeros: its `CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE`.

    The plugin does so where the CPU has AMX, a product's inputs and weights are of 8 bits, its sizes are multiples of
    64, and the share of zeros is at least the rate. All other products run as they do without the property: `describe`
    says how many do not.
    """

    properties: ClassVar[dict[str, str | int | float]] = {_SPARSE: 0.1}

    def __init__(
        self, model: Path, *, threads: int, context: int, prompts: tuple[int, ...] = (), batch: int = 1
    ) -> None:
        super().__init__(model, threads=threads, context=context, prompts=prompts, batch=batch)
        self.prefill(np.zeros((batch, 1), np.int64))  # the plugin chooses a product's kernel when it first runs

    def describe(self) -> dict[str, Any]:
        """Beside the others' facts: how many of the products the plugin runs on sparse weights."""
        kernels = [
            operation.get_rt_info()["primitiveType"].astype(str)
            for operation in self._compiled.get_runtime_model().get_ops()
            if operation.get_rt_info()["layerType"].astype(str) == "FullyConnected"
        ]
        sparse = sum("sparse" in kernel for kernel in kernels)
        found = f"{sparse} of {len(kernels)} products"
        if not sparse:
            found += f" (it needs AMX and a rate of zeros of {self.properties[_SPARSE]:g}): dense weights instead"
        return {**super().describe(), "sparse_weights": found}


def _select_positions(graph: Any) -> bool:
    """Let the head see the positions from a new input `LOGITS_FROM` on; False, and nothing changed, if there is none.

    See `export.graphs.positions`, which does the same to an ONNX graph.
    """
    node = graph.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in _AFTER_PRODUCT:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        return False
    first = opset8.parameter([1], np.int64, LOGITS_FROM)
    first.output(0).set_names({LOGITS_FROM})
    last, step, axis = (opset8.constant([value], np.int64) for value in (np.iinfo(np.int64).max, 1, 1))
    selected = opset8.slice(node.input_value(0), first, last, step, axis)
    node.input(0).replace_source_output(selected.output(0))
    graph.add_parameters([first])
    graph.validate_nodes_and_infer_types()
    return True


def _as_json(value: Any) -> str | int:
    """A property's value: precisions are types of OpenVINO's own."""
    return value if isinstance(value, int) else str(getattr(value, "to_string", lambda: value)())
