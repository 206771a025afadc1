"""An 8-bit KV cache: onnxruntime-genai's graph, its GroupQueryAttention told to keep keys and values as integers.

Each channel of each head has a scale of its own, found beforehand: some channels of the keys are many times as large
as others. ONNX Runtime rounds what it appends, after the rotary embedding, and attends to what it has rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from owl_deploy.bundle.names import CACHE_BITS, CACHE_SCALES, CACHES
from owl_deploy.errors import UnsupportedFamily

LARGEST = 127  # of the integers: both signs have as many

_ATTENTION = "GroupQueryAttention"
_PRESENT = slice(1, 3)  # its outputs that are caches
_ATTRIBUTES = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", CACHE_BITS: 8}


def exact_cache(model: onnx.ModelProto) -> None:
    """Undo `round_cache`: the caches are fp32 again, and not a byte tells that they were not."""
    scales: set[str] = set()
    caches: set[str] = set()
    for node in model.graph.node:
        if node.op_type != _ATTENTION or not any(attribute.name in _ATTRIBUTES for attribute in node.attribute):
            continue
        scales.update(node.input[CACHE_SCALES])
        caches.update([*node.input[CACHES], *node.output[_PRESENT]])
        del node.input[CACHE_SCALES]
        for attribute in [attribute for attribute in node.attribute if attribute.name in _ATTRIBUTES]:
            node.attribute.remove(attribute)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in scales]:
        model.graph.initializer.remove(tensor)
    for value in (*model.graph.input, *model.graph.output):
        if value.name in caches:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def round_cache(graph: Path, largest: Mapping[str, NDArray[np.float32]]) -> None:
    """Rewrite the graph so that its caches are int8.

    Args:
        largest: by the name of each cache that the graph takes, the magnitude that is to become 127, [heads, channels].

    Raises:
        UnsupportedFamily: some cache belongs to another operator, which cannot round it.
    """
    model = onnx.load(str(graph), load_external_data=False)
    caches: set[str] = set()
    for node in model.graph.node:
        if node.op_type != _ATTENTION:
            continue
        node.input.extend([""] * (CACHE_SCALES.start - len(node.input)))
        for past in node.input[CACHES]:
            scale = f"{past}.scale"
            values = np.ascontiguousarray(scales_of(largest[past])[None, :, None, :])
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, scale))
            node.input.append(scale)
        caches.update([*node.input[CACHES], *node.output[_PRESENT]])
        node.attribute.extend(onnx.helper.make_attribute(*attribute) for attribute in _ATTRIBUTES.items())
    if not caches >= largest.keys():
        raise UnsupportedFamily(f"{graph.parent.name}: this model's graph has caches that ONNX Runtime cannot round")
    for value in (*model.graph.input, *model.graph.output):
        if value.name in caches:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    graph.write_bytes(model.SerializeToString())


def scales_of(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """What 1 of the integers stands for; of a channel that was never anything but 0, as good as 0."""
    return np.maximum(largest, np.finfo(np.float32).tiny * LARGEST).astype(np.float32) / np.float32(LARGEST)
