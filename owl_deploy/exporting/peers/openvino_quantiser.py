"""NNCF's rounding of a whole model to 8 bits. Started as a script under the interpreter of OpenVINO's environment.

    python openvino_quantiser.py MODEL IDS OUT

MODEL is a stateful decoder of fp32, IDS an .npy file of windows of token ids [n, length]. It imports numpy, nncf and
OpenVINO alone.
"""

from __future__ import annotations

import sys
from typing import Any


def _quantise(model: str, ids: str, out: str) -> None:
    import nncf
    import numpy as np
    import openvino
    from openvino._offline_transformations import compress_quantize_weights_transformation

    graph = openvino.Core().read_model(model)
    names = {name for value in graph.inputs for name in value.names}
    windows = np.load(ids)

    def inputs(window: Any) -> dict[str, Any]:
        feeds = {
            "input_ids": window[None],
            "attention_mask": np.ones((1, len(window)), np.int64),
            "position_ids": np.arange(len(window))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return {name: values for name, values in feeds.items() if name in names}

    quantised = nncf.quantize(
        graph,
        nncf.Dataset(list(windows), inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric: a zero stays a zero
        subset_size=len(windows),
    )
    compress_quantize_weights_transformation(quantised)  # or the file would hold fp32, to be rounded when it is loaded
    openvino.save_model(quantised, out, compress_to_fp16=False)


if __name__ == "__main__":
    sys.path.pop(0)  # this script's folder, whose modules would shadow others
    _quantise(*sys.argv[1:])
