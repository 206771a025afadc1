"""OpenVINO's runtime on the stateful graph that OpenVINO GenAI runs too: its KV cache never leaves the engine.

Runs in an environment of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openvino

from owl_deploy.engines.protocol import Logits, TokenIds
from owl_deploy.machine.cpu import instruction_set

_DESCRIBED = (
    "INFERENCE_PRECISION_HINT",
    "KV_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "INFERENCE_NUM_THREADS",
    "NUM_STREAMS",
)


class OpenVinoEngine:
    """`protocol.Engine` on OpenVINO's CPU plugin, as it is by default but for the latency hint and the threads.

    By default it computes in bf16 where the CPU can, keeps keys and values in 8 bits, and rounds the inputs of
    products with compressed weights to 8 bits: what its users get. `describe` says what it chose.
    """

    properties: ClassVar[dict[str, str | int]] = {}
    """What is set beside the hint and the threads."""

    def __init__(
        self, model: Path, *, threads: int, context: int, prompts: tuple[int, ...] = (), batch: int = 1
    ) -> None:
        del context, prompts  # shapes are dynamic, and the cache grows
        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **self.properties}
        self._compiled = openvino.Core().compile_model(model, "CPU", properties)
        self._request = self._compiled.create_infer_request()
        self._names = {name for value in self._compiled.inputs for name in value.names}
        self._vocabulary = self._compiled.output("logits").partial_shape[2].get_length()
        self._batch = batch
        self._length = 0

    def describe(self) -> dict[str, Any]:
        """Beside the protocol's facts: the precisions it computes in and keeps its cache in."""
        facts = {name.lower(): _as_json(self._compiled.get_property(name)) for name in _DESCRIBED}
        return {"version": openvino.__version__, "instruction_set": instruction_set(), **facts}

    def prefill(self, ids: TokenIds) -> Logits:
        self._request.reset_state()
        self._length = 0
        return self._run(ids)

    def decode(self, tokens: TokenIds) -> Logits:
        logits: Logits = self._run(tokens[:, None])[:, 0]
        return logits

    def _run(self, ids: TokenIds) -> Logits:
        """Append `ids` [batch, new] to the sequences; logits [batch, new, vocab]."""
        new = ids.shape[1]
        total = self._length + new
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((self._batch, total), np.int64),
            "position_ids": np.tile(np.arange(self._length, total), (self._batch, 1)),
            "beam_idx": np.arange(self._batch, dtype=np.int32),
        }
        logits: Logits = np.empty((self._batch, new, self._vocabulary), np.float32)
        self._request.set_tensor("logits", openvino.Tensor(logits, shared_memory=True))  # written there, not copied
        self._request.infer({name: array for name, array in feeds.items() if name in self._names}, share_inputs=True)
        self._length = total
        return logits


class OpenVinoFp32Engine(OpenVinoEngine):
    """The same, all of it in fp32: what other engines compute in fp32 is compared with this."""

    properties: ClassVar[dict[str, str | int]] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }


def _as_json(value: Any) -> str | int:
    """A property's value: precisions are types of OpenVINO's own."""
    return value if isinstance(value, int) else str(getattr(value, "to_string", lambda: value)())
